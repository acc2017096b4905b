//! What the two programs say to each other: a line of JSON each.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::progress::check;

/// Longest time for the other one to appear.
const APPEAR: Duration = Duration::from_secs(60);
/// Longest time for an answer: some phases of some file systems take minutes.
const ANSWER: Duration = Duration::from_secs(600);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(200);

/// A connection to the other program.
pub struct Link {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Link {
    /// Waits for the other one.
    ///
    /// # Errors
    /// It cannot be waited for there.
    pub fn accept(address: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))?;
        let (stream, _) = listener.accept()?;
        Self::new(stream)
    }

    /// Goes to the other one, which may not be there yet.
    ///
    /// # Errors
    /// It does not come.
    pub fn connect(address: &str) -> anyhow::Result<Self> {
        let start = Instant::now();
        loop {
            check()?;
            match TcpStream::connect(address) {
                Ok(stream) => return Self::new(stream),
                Err(error) if start.elapsed() > APPEAR => {
                    return Err(error).with_context(|| format!("nobody at {address}"));
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    fn new(stream: TcpStream) -> anyhow::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(Self {
            reader: BufReader::new(stream.try_clone()?),
            writer: stream,
        })
    }

    /// Says something.
    ///
    /// # Errors
    /// The other one is gone.
    pub fn send<T: Serialize>(&mut self, what: &T) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(what)?;
        line.push(b'\n');
        Ok(self.writer.write_all(&line)?)
    }

    /// What the other one says next; None once it is done.
    ///
    /// # Errors
    /// It says nothing, or nothing that is understood.
    pub fn receive<T: DeserializeOwned>(&mut self) -> anyhow::Result<Option<T>> {
        let mut line = String::new();
        if self.reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        ensure!(line.ends_with('\n'), "the other one is gone");
        Ok(Some(serde_json::from_str(&line)?))
    }
}
