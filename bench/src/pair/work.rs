//! What each of the two does on its host when it is its turn, or at the same time as the other.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::fs::micro_ops::open;
use crate::names::phases::{Phase, call};
use crate::progress::check;

/// The file that goes to and fro.
const TURNS: &str = "turns";
/// Bytes of it that are written and read.
const MESSAGE: usize = 64;

/// Something to be done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Job {
    /// Opens the file that goes to and fro, in this directory; it stays open.
    Open(PathBuf),
    /// Closes it.
    Close,
    /// Overwrites its beginning with this number.
    Overwrite(u64),
    /// Reads that, and looks whether it is this number.
    Read(u64),
    /// Does this to so many files of whom in this directory.
    Names {
        /// Where.
        dir: PathBuf,
        /// What.
        phase: Phase,
        /// Whose files.
        whose: usize,
        /// How many.
        files: usize,
    },
    /// Makes a directory.
    Mkdir(PathBuf),
    /// Removes it.
    Rmdir(PathBuf),
    /// Has everything written back of the file system that this directory is in.
    Settle(PathBuf),
}

/// How it went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// How long it took, in seconds.
    pub seconds: f64,
    /// It was read what had been overwritten before.
    pub stale: bool,
}

/// One of the two.
#[derive(Default)]
pub struct Worker {
    turns: Option<File>,
}

impl Worker {
    /// Does something.
    ///
    /// # Errors
    /// A call fails, or finds what cannot be.
    pub fn run(&mut self, job: &Job) -> anyhow::Result<Done> {
        check()?;
        let mut stale = false;
        let start = Instant::now();
        match job {
            Job::Open(dir) => self.turns = Some(open(&dir.join(TURNS))?),
            Job::Close => self.turns = None,
            Job::Overwrite(number) => self.turns()?.write_all_at(&message(*number), 0)?,
            Job::Read(number) => {
                let mut seen = [0; MESSAGE];
                self.turns()?.read_exact_at(&mut seen, 0)?;
                stale = seen != message(*number);
            }
            Job::Names {
                dir,
                phase,
                whose,
                files,
            } => (0..*files).try_for_each(|n| {
                if n % 64 == 0 {
                    check()?;
                }
                call(*phase, dir, *whose, n).with_context(|| format!("{}, file {n}", phase.name()))
            })?,
            Job::Mkdir(dir) => fs::create_dir(dir).with_context(|| dir.display().to_string())?,
            Job::Rmdir(dir) => fs::remove_dir(dir).with_context(|| dir.display().to_string())?,
            Job::Settle(dir) => rustix::fs::syncfs(File::open(dir)?)?,
        }
        Ok(Done {
            seconds: start.elapsed().as_secs_f64(),
            stale,
        })
    }

    fn turns(&self) -> anyhow::Result<&File> {
        self.turns.as_ref().context("the file is not open")
    }
}

/// No part of it is that of another number.
fn message(number: u64) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    for word in message.chunks_exact_mut(8) {
        word.copy_from_slice(&number.to_le_bytes());
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_data_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (mut a, mut b) = (Worker::default(), Worker::default());
        assert!(a.run(&Job::Overwrite(1)).is_err(), "not open");
        for worker in [&mut a, &mut b] {
            worker.run(&Job::Open(dir.path().into())).unwrap();
        }
        a.run(&Job::Overwrite(7)).unwrap();
        assert!(!b.run(&Job::Read(7)).unwrap().stale);
        assert!(b.run(&Job::Read(8)).unwrap().stale);
        b.run(&Job::Close).unwrap();
        assert!(b.run(&Job::Read(7)).is_err());
    }
}
