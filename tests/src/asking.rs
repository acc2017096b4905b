//! Programs beside a test that ask a mount for something: the test itself must not have files of a mount open when it starts others, for
//! closing them in the child waits for a mount that waits.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::quiet::Stopwatch;

/// A program that asks a mount for something, and may have to wait; it is ended with this.
#[derive(Debug)]
pub struct Asking(Child);

impl Asking {
    /// Starts a shell with a script, whose `$0` is the file.
    ///
    /// # Errors
    /// It does not start.
    pub fn shell(script: &str, file: &Path) -> anyhow::Result<Self> {
        let child = Command::new("sh")
            .args(["-c", script])
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    /// Has it not ended?
    ///
    /// # Errors
    /// The system does not say.
    pub fn waits(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// The next line that it says; it may not have said one yet.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn says(&mut self) -> anyhow::Result<String> {
        let out = self.0.stdout.as_mut().context("no output")?;
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Says a line to it, and that there is no other.
    ///
    /// # Errors
    /// It does not listen.
    pub fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let mut input = self.0.stdin.take().context("no input")?;
        Ok(writeln!(input, "{line}")?)
    }

    /// What it says, once it has ended; nothing if it failed.
    ///
    /// # Errors
    /// It has not ended within the limit.
    pub fn answer(self, limit: Duration) -> anyhow::Result<Option<String>> {
        self.answer_by(&Stopwatch::start(), limit)
    }

    /// As [`Asking::answer`], within a time that runs already.
    ///
    /// # Errors
    /// As [`Asking::answer`].
    pub fn answer_by(mut self, watch: &Stopwatch, limit: Duration) -> anyhow::Result<Option<String>> {
        watch.until("an answer", limit, || Ok(!self.waits()?))?;
        let text = self.says()?;
        Ok(self.0.wait()?.success().then_some(text))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
