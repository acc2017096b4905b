//! The kernel extension: what this mount holds is delegated to the kernel, which then reads and writes its page cache
//! without asking.
//!
//! A lease of the cluster (lockmgr) is the mount's; the kernel gets a part of it by an entry in the table shared with
//! the module, and only while the mount holds as much. So a revocation first recalls what was delegated: nobody
//! enters in the kernel any more, dirty pages come as WRITE requests *under the lease that is still held*, size and
//! times come with the answer; then the mount gives up its own (`revoke`). Pages stay in the kernel: the version
//! of the next grant says whether they are still right.
//!
//! | who | does |
//! | --- | --- |
//! | thread `fsd-kernel` ([`run`](crate::fuse::events::run)) | reads events; delegates at once what is at hand, else a worker does |
//! | workers | get the lease that the kernel asks for, and delegate it |
//! | threads for revocations, or who brought it | recall ([`Recalls::recall`](crate::kernel::recalls::Recalls::recall)) |
//! | the same, and workers | do short reads and writes themselves where mounts take a file from each other (`calls`), or have the owner of the lease do them (`forward`) |
//! | the same, and workers | set space aside before the kernel takes writes in (`space`) |
//! | requests | delegate what the kernel will want next: a file just made, or looked up |

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use distfuse_abi::{Answer, Attachment, Attributes, Call, Command, Counters, Error, Options};
use rt::sync::{Condvar, Mutex};

use crate::session::ctx::Permits;
use fsd_proto::wire::{Attr, Time};

/// Calls that may be under way; further ones ask for the lease.
const CALLS: u32 = 64;

/// Forwarders that may wait at this mount for a lease; others take it themselves.
const WAITING_FORWARDED: usize = 64;

/// An attachment to the kernel extension.
#[derive(Debug)]
pub struct Extension {
    pub(crate) attachment: Attachment,
    pub(crate) answers: Mutex<Answers>,
    pub(crate) answered: Condvar,
    pub(crate) cookie: AtomicU32,
    /// What page caches are known by: the last one.
    pub(crate) stamp: AtomicU64,
    /// For the thread that reads events: it never waits.
    pub(crate) nobody_waits: Permits,
    /// Forwarders that wait here for a lease: not so many that those are left without a thread whom it depends on.
    pub(crate) waiting_forwarded: Permits,
}

#[derive(Debug, Default)]
pub(crate) struct Answers {
    pub(crate) flushed: HashMap<u32, Flushed>,
    /// Moves with every answer.
    pub(crate) seen: u64,
}

/// A flush that the kernel has carried out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flushed {
    /// What writing back failed with.
    pub(crate) error: Option<i32>,
    /// Size and times, if the kernel has the inode.
    pub(crate) last: Option<(u64, Time, Time)>,
    /// No file is open: what was written last comes before the last RELEASE.
    pub(crate) no_file: bool,
}

impl Extension {
    /// Attaches to the mount at `point`, before anybody uses it.
    ///
    /// # Errors
    /// The module is not there, of another version, or refuses.
    pub fn attach(point: &Path, entries: u32, spin: Duration) -> Result<Self, Error> {
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(point)
            .map_err(|source| Error::System {
                what: "open the mount's root",
                source,
            })?;
        let options = Options {
            entries,
            buffers: CALLS,
            // What changes attributes here tells the entry before it is answered, so stat needs to ask nobody. Names that the kernel has
            // looked up are good while the directory is delegated to it; they lead past the look-up that brings a file's permissions, too.
            stat: true,
            names: true,
            access: true,
            spin,
            ..Options::default()
        };
        Ok(Self {
            attachment: Attachment::open(root.as_fd(), &options)?,
            answers: Mutex::default(),
            answered: Condvar::new(),
            cookie: AtomicU32::new(1),
            stamp: AtomicU64::new(0),
            nobody_waits: Permits::new(0, 0),
            waiting_forwarded: Permits::new(WAITING_FORWARDED, 0),
        })
    }

    /// What is to be written.
    pub(crate) fn data_of(&self, call: &Call) -> Vec<u8> {
        let mut data = vec![0; call.len as usize];
        self.attachment.read_buffer(call.number, &mut data);
        data
    }

    pub(crate) fn answer(&self, call: &Call, answer: Answer) {
        self.tell(Command::Answer {
            call: call.number,
            answer,
        });
    }

    /// Until when the kernel may use what is delegated to it, nanoseconds since the host was started.
    pub fn set_term(&self, end: u64) {
        self.attachment.set_term(end);
    }

    /// What the kernel has counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.attachment.counters()
    }

    /// Sends a command; a mount that has ended has nobody who waits for it.
    fn tell(&self, command: Command) {
        match self.attachment.command(command) {
            Ok(()) | Err(Error::Gone) => {}
            Err(error) => tracing::error!("the kernel extension: {error}"),
        }
    }

    pub(crate) fn wake(&self, ino: u64, error: Option<i32>) {
        self.tell(Command::Wake { ino, error });
    }

    pub(crate) fn note(&self, flushed: Option<(u32, Flushed)>) {
        let mut answers = self.answers.lock();
        answers.flushed.extend(flushed);
        answers.seen += 1;
        drop(answers);
        self.answered.notify_all();
    }
}

const SECOND: i64 = 1_000_000_000;

pub(crate) fn from_kernel(time: distfuse_abi::Time) -> Time {
    Time(
        time.seconds
            .saturating_mul(SECOND)
            .saturating_add(i64::from(time.nanos)),
    )
}

pub(crate) fn to_kernel(time: Time) -> distfuse_abi::Time {
    distfuse_abi::Time {
        seconds: time.0.div_euclid(SECOND),
        nanos: u32::try_from(time.0.rem_euclid(SECOND)).unwrap_or(0),
    }
}

pub(crate) fn attributes(attr: &Attr) -> Attributes {
    Attributes {
        size: attr.size,
        blocks: attr.blocks,
        mtime: to_kernel(attr.mtime),
        ctime: to_kernel(attr.ctime),
        atime: to_kernel(attr.atime),
        mode: u32::from(attr.mode),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        xattrs: attr.has_xattr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_kernel() {
        for nanos in [
            0,
            1,
            -1,
            1_500_000_000,
            -1_500_000_000,
            i64::MAX,
            i64::MIN + SECOND,
        ] {
            let time = Time(nanos);
            let there = to_kernel(time);
            assert!(i64::from(there.nanos) < SECOND);
            assert_eq!(from_kernel(there), time);
        }
    }
}
