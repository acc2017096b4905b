//! Messages between the lab and the agent in a guest: length-prefixed frames over a virtio-serial port.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The port's name in a guest.
pub const PORT: &str = "fsd-lab";
/// Longest frame.
pub const MAX_FRAME: usize = 1 << 20;
/// Bytes of output that travel in one message.
pub const CHUNK: usize = 32 << 10;

/// A terminal's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A program to be started in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Environment variables besides the agent's own.
    pub env: Vec<(String, String)>,
    /// The folder it starts in.
    pub dir: String,
    /// It gets a terminal of this size.
    pub terminal: Option<Size>,
}

/// From the lab to an agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Asks for a sign of life.
    Hello {
        /// Comes back in the answer.
        nonce: u64,
        /// The host's clock: guests from a snapshot would be in the past.
        unix_ms: u64,
    },
    /// Starts a program.
    Start {
        /// Names it from here on.
        id: u32,
        /// What to start.
        program: Program,
    },
    /// Input for a program that has a terminal.
    Input {
        /// Which program.
        id: u32,
        /// What was typed.
        data: Vec<u8>,
    },
    /// A program's terminal has another size now.
    Resize {
        /// Which program.
        id: u32,
        /// The new size.
        size: Size,
    },
    /// Ends a program, and all that it has started in its process group.
    Kill {
        /// Which program.
        id: u32,
    },
    /// Switches the guest off.
    PowerOff,
}

/// Where a program printed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stream {
    /// Standard output, or the terminal.
    Out,
    /// Standard error.
    Err,
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// It exited with this status.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It could not be started.
    NotStarted(String),
}

impl Ending {
    /// Whether it exited with status 0.
    pub fn ok(&self) -> bool {
        *self == Ending::Code(0)
    }

    /// The exit status as a shell has it.
    pub fn code(&self) -> u8 {
        match self {
            Ending::Code(code) => u8::try_from(*code).unwrap_or(u8::MAX),
            Ending::Signal(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
            Ending::NotStarted(_) => 127,
        }
    }
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ending::Code(code) => write!(f, "exited with status {code}"),
            Ending::Signal(signal) => write!(f, "was ended by signal {signal}"),
            Ending::NotStarted(why) => write!(f, "could not be started: {why}"),
        }
    }
}

/// From an agent to the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// The agent listens.
    Ready {
        /// That of the [`ToGuest::Hello`] this answers.
        nonce: u64,
        /// Time since the guest's kernel started.
        uptime_ms: u64,
    },
    /// A program printed something.
    Output {
        /// Which program.
        id: u32,
        /// Where.
        stream: Stream,
        /// What.
        data: Vec<u8>,
    },
    /// A program has ended, and all that it printed was sent.
    Ended {
        /// Which program.
        id: u32,
        /// How.
        ending: Ending,
    },
}

/// Sends a message.
///
/// # Errors
/// Those of writing; a message longer than [`MAX_FRAME`].
pub fn send<T: Serialize>(out: &mut impl Write, message: &T) -> io::Result<()> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a message that is too long",
        ));
    }
    if let (Some(head), Ok(length)) = (frame.get_mut(..4), u32::try_from(length)) {
        head.copy_from_slice(&length.to_le_bytes());
    }
    // In one piece: several threads may write in turn.
    out.write_all(&frame)?;
    out.flush()
}

/// Receives a message.
///
/// # Errors
/// Those of reading; a frame that is too long or not understood.
pub fn receive<T: DeserializeOwned>(input: &mut impl Read) -> io::Result<T> {
    let mut head = [0; 4];
    input.read_exact(&mut head)?;
    let length = usize::try_from(u32::from_le_bytes(head)).unwrap_or(usize::MAX);
    if length > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes"),
        ));
    }
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    postcard::from_bytes(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in() {
        let program = Program {
            argv: vec!["sh".into(), "-c".into(), "true".into()],
            env: vec![("A".into(), "b=c".into())],
            dir: "/".into(),
            terminal: Some(Size {
                rows: 25,
                columns: 80,
            }),
        };
        let messages = [
            ToGuest::Hello {
                nonce: u64::MAX,
                unix_ms: 1,
            },
            ToGuest::Start { id: 7, program },
            ToGuest::Input {
                id: 7,
                data: vec![0, 1, 255],
            },
            ToGuest::PowerOff,
        ];
        let mut wire = Vec::new();
        for message in &messages {
            send(&mut wire, message).unwrap();
        }
        let mut input = wire.as_slice();
        for message in &messages {
            assert_eq!(&receive::<ToGuest>(&mut input).unwrap(), message);
        }
        assert_eq!(
            receive::<ToGuest>(&mut input).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn what_is_no_message_is_an_error() {
        let long = receive::<FromGuest>(&mut [255u8; 8].as_slice()).unwrap_err();
        assert_eq!(long.kind(), io::ErrorKind::InvalidData);
        let unknown = receive::<FromGuest>(&mut [1u8, 0, 0, 0, 99].as_slice()).unwrap_err();
        assert_eq!(unknown.kind(), io::ErrorKind::InvalidData);
        let big = FromGuest::Output {
            id: 1,
            stream: Stream::Out,
            data: vec![0; MAX_FRAME + 1],
        };
        assert_eq!(
            send(&mut Vec::new(), &big).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn endings_have_a_shells_status() {
        assert_eq!(Ending::Code(3).code(), 3);
        assert_eq!(Ending::Signal(9).code(), 137);
        assert_eq!(Ending::NotStarted(String::new()).code(), 127);
    }
}
