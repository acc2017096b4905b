//! An open file of the device, attached to a mount.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::counters::{self, Counters};
use crate::error::Error;
use crate::layout::{self, ABI_VERSION, Attach};
use crate::pace::Pace;
use crate::ring::Ends;
use crate::sync::Ordering;
use crate::sys::{self, Map};
use crate::table::{Table, Time};
use crate::word::Mode;

/// So long the kernel may take to make room in the command ring, which it reads in the daemon's own call.
const PATIENCE: Duration = Duration::from_secs(10);

/// How to attach.
#[derive(Debug, Clone)]
pub struct Options {
    /// The device.
    pub device: PathBuf,
    /// Entries of the lease table, 128 bytes each; made a power of two.
    pub entries: u32,
    /// Of the event ring.
    pub events: u32,
    /// Of the command ring.
    pub commands: u32,
    /// For calls, 16 KiB each: so many may be under way. 0: there are none.
    pub buffers: u32,
    /// The kernel answers stat from the entry.
    pub stat: bool,
    /// The kernel holds names valid under the lease of their directory. Names must have no time to live.
    pub names: bool,
    /// The kernel checks permissions of inodes with a lease: only for mounts with `default_permissions` and
    /// `allow_other`.
    pub access: bool,
    /// So long a side looks for what the other is about to say, before it sleeps: in that time neither makes a system
    /// call for the other. Tried less where it does not pay.
    pub spin: Duration,
    /// Per cent of the memory for dirty pages that the mount may take; 0 leaves the stock 1.
    pub max_ratio: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            device: PathBuf::from(layout::DEVICE),
            entries: 1 << 15,
            events: 4096,
            commands: 4096,
            buffers: 0,
            stat: true,
            names: false,
            access: false,
            spin: Duration::ZERO,
            max_ratio: 40,
        }
    }
}

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
    /// A task that found the lease not held, and [`Table::hint_calls`] on, wants something done; or one that has it wants
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
    /// its beginning can, and [`Table::set_space`] has said so before. There is no buffer.
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

/// The version of the interface that the loaded module speaks.
///
/// # Errors
/// It is not loaded, or may not be used.
pub fn kernel_version(device: &Path) -> Result<u32, Error> {
    version_of(&open(device)?)
}

fn open(device: &Path) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(device)
        .map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::NotLoaded(device.to_owned()),
            Some(libc::EACCES | libc::EPERM) => Error::NotAllowed(device.to_owned()),
            _ => Error::System {
                what: "open the kernel extension's device",
                source,
            },
        })
}

fn version_of(device: &File) -> Result<u32, Error> {
    sys::version(device).map_err(|source| Error::System {
        what: "ask the kernel extension for its version",
        source,
    })
}

/// The attachment. When it goes, all leases do, and the kernel's tasks that wait fail with ENOTCONN.
#[derive(Debug)]
pub struct Attachment {
    device: File,
    map: Arc<Map>,
    table: Table,
    spin: Duration,
    reader: Mutex<Pace>,
    writer: Mutex<()>,
}

impl Attachment {
    /// Attaches to the mount that `root` is the root of.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(root: BorrowedFd<'_>, options: &Options) -> Result<Attachment, Error> {
        let device = open(&options.device)?;
        let kernel = version_of(&device)?;
        if kernel != ABI_VERSION {
            return Err(Error::Version { kernel });
        }
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let mut layout = Attach {
            abi: ABI_VERSION,
            root_fd: root.as_raw_fd(),
            flags: flag(options.stat, layout::ATTACH_STAT)
                | flag(options.names, layout::ATTACH_NAMES)
                | flag(options.access, layout::ATTACH_ACCESS),
            max_ratio: options.max_ratio,
            entries: options.entries,
            events: options.events,
            commands: options.commands,
            buffers: options.buffers,
            spin_us: u32::try_from(options.spin.as_micros()).unwrap_or(layout::MAX_SPIN_US),
            ..Attach::default()
        };
        let end = Instant::now() + PATIENCE;
        while let Err(source) = sys::attach(&device, &mut layout) {
            match source.raw_os_error() {
                Some(libc::EPROTONOSUPPORT) => return Err(Error::Version { kernel: layout.abi }),
                Some(libc::EBUSY) => return Err(Error::Busy),
                Some(libc::EINVAL | libc::EBADF) => return Err(Error::NotAMount),
                // What a daemon before us has left is still being cleaned up.
                Some(libc::EAGAIN) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                _ => {
                    return Err(Error::System {
                        what: "attach to the mount",
                        source,
                    });
                }
            }
        }
        Attachment::over(device, layout, options.spin)
    }

    /// Over a device that is attached.
    pub(crate) fn over(device: File, layout: Attach, spin: Duration) -> Result<Attachment, Error> {
        let map = Arc::new(Map::new(&device, layout)?);
        Ok(Attachment {
            device,
            table: Table::new(Arc::clone(&map)),
            map,
            spin,
            reader: Mutex::default(),
            writer: Mutex::new(()),
        })
    }

    /// As the kernel would: the ends of the events' ring, and the types of what is in it.
    #[cfg(test)]
    pub(crate) fn set_events(&self, tail: u64, head: u64, kinds: &[u32]) {
        use crate::ring::Slots;
        let (ends, slots) = (self.events(), self.map.events());
        for (at, kind) in kinds.iter().enumerate() {
            let mut event: layout::Event = slots.take(at as u64);
            event.r#type = *kind;
            slots.put(at as u64, event);
        }
        ends.tail.store(tail, Ordering::Relaxed);
        ends.head.store(head, Ordering::Relaxed);
    }

    /// The lease table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// What the kernel has counted.
    pub fn counters(&self) -> Counters {
        counters::read(&self.map)
    }

    /// Whether the mount has ended: nothing is held any more.
    pub fn is_gone(&self) -> bool {
        self.map.shared().state.load(Ordering::Acquire) == layout::STATE_GONE
    }

    /// The device, for polling along with others: readable when there are events, after
    /// [`Attachment::try_event`] had none.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// What a call's buffer has, to fill `into`.
    pub fn read_buffer(&self, call: u32, into: &mut [u8]) {
        for (part, word) in into.chunks_mut(8).zip(self.map.buffer(call)) {
            let bytes = word.load(Ordering::Relaxed).to_ne_bytes();
            part.copy_from_slice(bytes.get(..part.len()).unwrap_or(&[]));
        }
    }

    /// Fills a call's buffer.
    pub fn fill_buffer(&self, call: u32, from: &[u8]) {
        for (part, word) in from.chunks(8).zip(self.map.buffer(call)) {
            let mut bytes = [0; 8];
            bytes.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn kick(&self) -> Result<(), Error> {
        sys::kick(&self.device).map_err(|source| match source.raw_os_error() {
            Some(libc::ENODEV) => Error::Gone,
            _ => Error::System {
                what: "ring the kernel extension",
                source,
            },
        })
    }

    fn events(&self) -> Ends<'_> {
        let shared = self.map.shared();
        Ends {
            head: &shared.event_head,
            tail: &shared.event_tail,
            sleeping: &shared.event_need_wakeup,
        }
    }

    fn pop(&self) -> Result<Option<Event>, Error> {
        loop {
            let Some(raw) = self.events().pop::<layout::Event>(&self.map.events()) else {
                let shared = self.map.shared();
                if shared.event_overflow.load(Ordering::Acquire) == 0 {
                    return Ok(None);
                }
                self.kick()?;
                continue;
            };
            // Of a kind that this version does not know: nothing to be done about it.
            if let Some(event) = decode(&raw) {
                return Ok(Some(event));
            }
        }
    }

    /// The next event, if there is one; the kernel is told to wake whoever polls [`Attachment::device`] if not.
    ///
    /// # Errors
    /// [`Error::Gone`] when the mount has ended.
    pub fn try_event(&self) -> Result<Option<Event>, Error> {
        let _guard = self.reader.lock();
        self.events().awake();
        loop {
            if let Some(event) = self.pop()? {
                return Ok(Some(event));
            }
            if self.is_gone() {
                return Err(Error::Gone);
            }
            if self.events().sleep() {
                return Ok(None);
            }
        }
    }

    /// The next event, if it comes soon: the kernel does not wake anybody for it.
    fn look(&self) -> Result<Option<Event>, Error> {
        let mut pace = self.reader.lock();
        self.events().awake();
        let first = self.pop()?;
        if first.is_some() || self.spin.is_zero() || !pace.is_worth_looking() {
            return Ok(first);
        }
        let end = Instant::now() + self.spin;
        loop {
            if let Some(event) = self.pop()? {
                pace.looked(true);
                return Ok(Some(event));
            }
            if Instant::now() >= end {
                pace.looked(false);
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }

    /// The next event; sleeps for it, for ever without a time. Without one after that time: `None`.
    ///
    /// # Errors
    /// [`Error::Gone`] when the mount has ended.
    pub fn next_event(&self, timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let end = timeout.map(|time| Instant::now() + time);
        loop {
            if let Some(event) = self.look()? {
                return Ok(Some(event));
            }
            if let Some(event) = self.try_event()? {
                return Ok(Some(event));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let since = Instant::now();
            sys::poll(&self.device, left).map_err(|source| Error::System {
                what: "wait for the kernel extension",
                source,
            })?;
            if since.elapsed() < self.spin {
                self.reader.lock().slept_shortly();
            }
        }
    }

    /// Sends a command.
    ///
    /// # Errors
    /// The mount has ended, or the kernel does not read its ring.
    pub fn command(&self, command: Command) -> Result<(), Error> {
        self.commands(&[command])
    }

    /// Sends commands, with one doorbell at most. May be called by threads that answer FUSE requests: the
    /// kernel only takes note.
    ///
    /// # Errors
    /// The mount has ended, or the kernel does not read its ring.
    pub fn commands(&self, commands: &[Command]) -> Result<(), Error> {
        let shared = self.map.shared();
        let ends = Ends {
            head: &shared.command_head,
            tail: &shared.command_tail,
            sleeping: &shared.command_need_kick,
        };
        let end = Instant::now() + PATIENCE;
        {
            let _guard = self.writer.lock();
            for command in commands {
                let raw = encode(*command);
                while !ends.push(&self.map.commands(), raw) {
                    if Instant::now() > end {
                        return Err(Error::Stuck);
                    }
                    self.kick()?;
                }
            }
        }
        if ends.ring() { self.kick() } else { Ok(()) }
    }
}

fn decode(raw: &layout::Event) -> Option<Event> {
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

fn encode(command: Command) -> layout::Command {
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

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        match error {
            Error::System { source, .. } => source,
            other => io::Error::other(other),
        }
    }
}
