//! What the kernel and the daemon tell each other through the rings, and its form there.

use crate::layout;
use crate::table::Time;
use crate::word::Mode;

/// What the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Tasks wait for a lease. Always to be answered by [`Command::Wake`], after it was granted.
    Need {
        /// On what.
        ino: u64,
        /// Which.
        mode: Mode,
    },
    /// The last one inside has left, while the lease was being revoked.
    Drained {
        /// Which.
        ino: u64,
    },
    /// A flush is done.
    Flushed {
        /// Of what.
        ino: u64,
        /// The command's.
        cookie: u32,
        /// What writing back failed with, as errno.
        error: Option<i32>,
        /// Size, mtime and ctime in the kernel, if it still has the inode. Else all was sent before.
        inode: Option<(u64, Time, Time)>,
        /// No file is open: what was written last may still come, before the RELEASE of the last handle.
        no_file: bool,
        /// Pages are still cached.
        kept: bool,
    },
    /// A task that found the lease not held, and [`crate::Table::hint_calls`] on, wants something done; or one that has it wants
    /// space. Always to be answered by [`Command::Answer`]; until then the buffer is the daemon's.
    Call(Call),
}

/// Something that a task wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// Its number, and that of its buffer.
    pub number: u32,
    /// On what.
    pub ino: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u32,
    /// What.
    pub act: Act,
}

/// What a call is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Reading, into the buffer.
    Read,
    /// Writing, out of the buffer.
    Write {
        /// Set-user-id bits are to be cleared.
        kill_priv: bool,
    },
    /// Nothing but to make sure that it can be stored when the kernel writes it: [`Answer::Done`] says how much of it from
    /// its beginning can, and [`crate::Table::set_space`] has said so before. There is no buffer.
    Space,
}

/// How a call ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// So many bytes were read or written, or can be.
    Done(u32),
    /// Nothing was done: the kernel holds the lease, or shall ask for it.
    Again,
    /// An errno.
    Failed(i32),
}

/// What the kernel is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Waiters look again, or fail.
    Wake {
        /// On what.
        ino: u64,
        /// With what errno, if they are to fail.
        error: Option<i32>,
    },
    /// A lease is being revoked: once all have left, dirty pages are written, and [`Event::Flushed`] comes.
    Flush {
        /// Which.
        ino: u64,
        /// Comes back with the event.
        cookie: u32,
        /// Pages are unmapped: needed where nothing shall be left of the lease.
        unmap: bool,
        /// Pages are dropped. Not needed: the next grant's version decides.
        drop: bool,
    },
    /// A call is done.
    Answer {
        /// Which.
        call: u32,
        /// How.
        answer: Answer,
    },
}

/// An event from the ring; None: of a kind that this version does not know.
pub(crate) fn decode(raw: &layout::Event) -> Option<Event> {
    let ino = raw.ino;
    Some(match raw.r#type {
        layout::EVENT_NEED => Event::Need {
            ino,
            mode: if raw.mode == Mode::Exclusive as u32 {
                Mode::Exclusive
            } else {
                Mode::Shared
            },
        },
        layout::EVENT_CALL => Event::Call(Call {
            number: raw.cookie,
            ino,
            offset: raw.size,
            len: match raw.flags & layout::CALL_SPACE {
                0 => raw.mode.min(layout::BUFFER_SIZE as u32),
                _ => raw.mode,
            },
            act: if raw.flags & layout::CALL_SPACE != 0 {
                Act::Space
            } else if raw.flags & layout::CALL_WRITE == 0 {
                Act::Read
            } else {
                Act::Write {
                    kill_priv: raw.flags & layout::CALL_KILL_PRIV != 0,
                }
            },
        }),
        layout::EVENT_DRAINED => Event::Drained { ino },
        layout::EVENT_FLUSHED => Event::Flushed {
            ino,
            cookie: raw.cookie,
            error: (raw.error != 0).then_some(raw.error.saturating_neg()),
            inode: (raw.flags & layout::FLUSHED_INODE != 0).then_some((
                raw.size,
                Time {
                    seconds: raw.mtime,
                    nanos: raw.mtime_nsec,
                },
                Time {
                    seconds: raw.ctime,
                    nanos: raw.ctime_nsec,
                },
            )),
            no_file: raw.flags & layout::FLUSHED_NOFILE != 0,
            kept: raw.flags & layout::FLUSHED_KEPT != 0,
        },
        _ => return None,
    })
}

/// A command as it is in the ring.
pub(crate) fn encode(command: Command) -> layout::Command {
    match command {
        Command::Wake { ino, error } => layout::Command {
            r#type: layout::COMMAND_WAKE,
            ino,
            error: error.map_or(0, i32::saturating_neg),
            ..layout::Command::default()
        },
        Command::Flush {
            ino,
            cookie,
            unmap,
            drop,
        } => layout::Command {
            r#type: layout::COMMAND_FLUSH,
            flags: if unmap { layout::FLUSH_UNMAP } else { 0 } | if drop { layout::FLUSH_DROP } else { 0 },
            ino,
            cookie,
            ..layout::Command::default()
        },
        Command::Answer { call, answer } => {
            let (flags, error, result) = match answer {
                Answer::Done(bytes) => (0, 0, bytes),
                Answer::Again => (layout::ANSWER_AGAIN, 0, 0),
                Answer::Failed(error) => (0, error.saturating_neg(), 0),
            };
            layout::Command {
                r#type: layout::COMMAND_ANSWER,
                flags,
                ino: 0,
                cookie: call,
                error,
                result: result.into(),
            }
        }
    }
}
