//! The emulator's monitor (QMP): commands as JSON lines.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::{At, Error, Result};

/// Longest time for an answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A connection to a monitor.
#[derive(Debug)]
pub struct Monitor {
    socket: UnixStream,
    input: BufReader<UnixStream>,
}

impl Monitor {
    /// Takes over the socket and agrees with the emulator on how to talk.
    ///
    /// # Errors
    /// It does not answer.
    pub fn new(socket: &UnixStream) -> Result<Monitor> {
        let clone = || socket.try_clone().at(|| "share a socket".into());
        socket
            .set_read_timeout(Some(ANSWER_LIMIT))
            .at(|| "limit a socket's wait".into())?;
        let mut monitor = Monitor {
            socket: clone()?,
            input: BufReader::new(clone()?),
        };
        monitor.line()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Carries out a command and returns its answer.
    ///
    /// # Errors
    /// It fails, or there is no answer.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({"execute": command, "arguments": arguments}));
        self.socket
            .write_all(line.as_bytes())
            .at(|| format!("send {command} to the emulator"))?;
        loop {
            let mut answer = self.line()?;
            if let Some(error) = answer.get("error") {
                return Err(protocol(format!("{command}: {error}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Asks `query` for its status until that is one of `wanted`.
    ///
    /// # Errors
    /// It is not in time.
    pub fn wait_status(&mut self, query: &str, wanted: &[&str], limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let answer = self.execute(query, &json!({}))?;
            let status = answer.get("status").and_then(Value::as_str).unwrap_or("");
            if wanted.contains(&status) {
                return Ok(status.to_owned());
            }
            if Instant::now() > deadline {
                let what = format!("{query} of the emulator (it says {answer})");
                return Err(Error::TimeOut {
                    what,
                    seconds: limit.as_secs(),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn line(&mut self) -> Result<Value> {
        let mut line = String::new();
        let count = self
            .input
            .read_line(&mut line)
            .at(|| "hear from the emulator".into())?;
        if count == 0 {
            return Err(protocol("it has ended".into()));
        }
        serde_json::from_str(&line).map_err(|error| protocol(error.to_string()))
    }
}

fn protocol(why: String) -> Error {
    Error::Protocol {
        peer: "the emulator".into(),
        why,
    }
}
