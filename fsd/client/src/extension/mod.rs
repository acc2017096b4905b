//! The kernel extension: what this mount holds is lent on to the kernel, which then reads and writes its page cache
//! without asking.
//!
//! A lease of the cluster (lockmgr) is the mount's; the kernel gets a part of it by an entry in the table shared with
//! the module, and only while the mount holds as much. So a revocation first takes back what was lent: nobody
//! enters in the kernel any more, dirty pages come as WRITE requests *under the lease that is still held*, size and
//! times come with the answer; then the mount gives up its own (`revoke`). Pages stay in the kernel: the version
//! of the next grant says whether they are still right.
//!
//! | who | does |
//! | --- | --- |
//! | thread `fsd-kernel` ([`run`]) | reads events; lends at once what is at hand, else a worker does |
//! | workers | get the lease that the kernel asks for, and lend it |
//! | threads for revocations, or who brought it | take back ([`Client::take_back`]) |
//! | the same, and workers | do short reads and writes themselves where mounts take a file from each other (`calls`), or have the owner of the lease do them (`visit`) |
//! | the same, and workers | set space aside before the kernel takes writes in (`space`) |
//! | requests | lend what the kernel will want next: a file just made, or looked up |

mod calls;
mod lend;
mod range;
mod space;
mod take;
mod visit;

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use distfuse_abi::{Answer, Attachment, Attributes, Command, Counters, Error, Event, Options};
use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

use super::Client;
use super::ctx::Permits;
use fsd_proto::wire::{Attr, Time};
use visit::{Away, Visitors};

/// How long the thread for events sleeps at most, so that it ends with its mount.
const LOOK: Duration = Duration::from_secs(5);

/// Calls that may be under way; further ones ask for the lease.
const CALLS: u32 = 64;

/// Visitors that may wait at this mount for a lease; others take it themselves.
const WAITING_VISITS: usize = 64;

/// An attachment to the kernel extension.
#[derive(Debug)]
pub struct Extension {
    attachment: Attachment,
    answers: Mutex<Answers>,
    answered: Condvar,
    cookie: AtomicU32,
    /// What page caches are known by: the last one.
    stamp: AtomicU64,
    /// Calls that another mount was asked to do.
    away: Away,
    /// For the thread that reads events: it never waits.
    nobody_waits: Permits,
    /// Visitors that wait here for a lease: not so many that those are left without a thread whom it depends on.
    waiting_visits: Permits,
    /// Held while promises of space are taken back.
    recalling: Mutex<()>,
}

#[derive(Debug, Default)]
struct Answers {
    flushed: HashMap<u32, Flushed>,
    /// Moves with every answer.
    seen: u64,
}

/// A flush that the kernel has carried out.
#[derive(Debug, Clone, Copy)]
struct Flushed {
    /// What writing back failed with.
    error: Option<i32>,
    /// Size and times, if the kernel has the inode.
    last: Option<(u64, Time, Time)>,
    /// No file is open: what was written last comes before the last RELEASE.
    no_file: bool,
}

/// What of an inode's lease is lent to the kernel.
#[derive(Debug, Default)]
pub struct Lent {
    state: Mutex<LentState>,
    changed: Condvar,
    /// How often the size was set here.
    resized: AtomicU64,
}

#[derive(Debug, Default)]
struct LentState {
    /// It is being taken back: nothing is lent meanwhile.
    taking: bool,
    /// The kernel's pages are those of this version of the record, and the kernel knows them by that stamp.
    caches: Option<(u64, u64)>,
    /// Calls being carried out: nothing is lent meanwhile.
    calling: usize,
    /// Tasks that space is being arranged for, under the mount's lease: it is not taken back before they have been lent it.
    arranging: usize,
    /// Calls since the mount got its lease.
    rent: u32,
    /// Who else came meanwhile.
    visitors: Visitors,
    /// When it was lent to tasks that wait, which must come to use it.
    asked: Option<Instant>,
    /// When nobody was let in any more, while it is being taken back.
    closed: Option<Instant>,
    /// How long taking it back, and giving the mount's lease up, took the last time.
    took: Duration,
}

impl Lent {
    /// This mount has made version `to` out of version `from`, through the kernel's pages.
    pub fn carry(&self, from: u64, to: u64) {
        let mut state = self.state.lock();
        if let Some(caches) = state.caches.as_mut().filter(|c| c.0 == from) {
            caches.0 = to;
        }
    }

    /// The size was set here: what the kernel says of it may be older.
    pub fn resize(&self) {
        self.resized.fetch_add(1, Ordering::SeqCst);
    }

    /// What is held may be lent again.
    pub fn again(&self) {
        let mut state = self.state.lock();
        state.taking = false;
        if let Some(closed) = state.closed.take() {
            state.took = closed.elapsed();
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Is somebody taking it back?
    pub fn is_taken_back(&self) -> bool {
        self.state.lock().taking
    }

    /// Space is about to be arranged for a task, and the lease lent with it, unless somebody is taking that back: whoever begins to
    /// do so meanwhile waits for this. That costs nothing, for the mount's lease is entered besides; without it two mounts
    /// could take a file from each other for ever, each while it asks for space.
    fn arrange(&self) -> Option<Arranging<'_>> {
        let mut state = self.state.lock();
        if state.taking {
            return None;
        }
        state.arranging += 1;
        Some(Arranging(self))
    }

    /// Waits until nobody is taking it back, and no call is being carried out.
    fn settled(&self) {
        let mut state = self.state.lock();
        while state.taking || state.calling > 0 {
            self.changed.wait(&mut state);
        }
    }
}

/// Space is being arranged for a task.
struct Arranging<'a>(&'a Lent);

impl Drop for Arranging<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.arranging -= 1;
        if state.arranging == 0 {
            self.0.changed.notify_all();
        }
    }
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
            // What stat shows is the kernel's own under a lease. Names it has looked up are good while it is lent the directory;
            // they lead past the look-up that brings a file's permissions, too.
            stat: false,
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
            away: Away::default(),
            nobody_waits: Permits::new(0, 0),
            waiting_visits: Permits::new(WAITING_VISITS, 0),
            recalling: Mutex::default(),
        })
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

    fn wake(&self, ino: u64, error: Option<i32>) {
        self.tell(Command::Wake { ino, error });
    }

    fn note(&self, flushed: Option<(u32, Flushed)>) {
        let mut answers = self.answers.lock();
        answers.flushed.extend(flushed);
        answers.seen += 1;
        drop(answers);
        self.answered.notify_all();
    }
}

/// Answers the kernel until its mount has ended.
pub fn run(client: &Weak<Client>, ext: &Arc<Extension>) {
    let mut looked = Instant::now();
    loop {
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if let Some(client) = client.upgrade() {
                client.give_up_calls(ext);
                client.share_space(ext);
            }
        }
        let event = match ext.attachment.next_event(Some(LOOK)) {
            Ok(Some(event)) => event,
            Ok(None) if client.strong_count() > 0 => continue,
            Ok(None) | Err(Error::Gone) => break,
            Err(error) => {
                tracing::error!("the kernel extension: {error}: this mount ends");
                if let Some(client) = client.upgrade() {
                    client.doomed.store(true, Ordering::SeqCst);
                }
                break;
            }
        };
        match event {
            Event::Need { ino, mode } => match client.upgrade() {
                Some(client) => client.lend_to_waiters(ext, ino, mode),
                None => ext.wake(ino, Some(libc::ENOTCONN)),
            },
            Event::Call(call) => match client.upgrade() {
                Some(client) => client.answer_call(ext, call),
                None => ext.answer(&call, Answer::Failed(libc::ENOTCONN)),
            },
            Event::Drained { .. } => ext.note(None),
            Event::Flushed {
                cookie,
                error,
                inode,
                no_file,
                ..
            } => {
                let flushed = Flushed {
                    error,
                    last: inode.map(|(size, mtime, ctime)| (size, from_kernel(mtime), from_kernel(ctime))),
                    no_file,
                };
                ext.note(Some((cookie, flushed)));
            }
        }
    }
    // Whoever waits for an answer finds that there is nothing left to be taken back.
    ext.note(None);
}

const SECOND: i64 = 1_000_000_000;

fn from_kernel(time: distfuse_abi::Time) -> Time {
    Time(
        time.seconds
            .saturating_mul(SECOND)
            .saturating_add(i64::from(time.nanos)),
    )
}

fn to_kernel(time: Time) -> distfuse_abi::Time {
    distfuse_abi::Time {
        seconds: time.0.div_euclid(SECOND),
        nanos: u32::try_from(time.0.rem_euclid(SECOND)).unwrap_or(0),
    }
}

fn attributes(attr: &Attr) -> Attributes {
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

    #[test]
    fn pages_are_right_for_the_versions_made_through_them() {
        let lent = Lent::default();
        lent.carry(3, 4);
        assert_eq!(lent.state.lock().caches, None);
        lent.state.lock().caches = Some((3, 1));
        lent.carry(3, 4);
        lent.carry(4, 5);
        lent.carry(7, 8);
        assert_eq!(lent.state.lock().caches, Some((5, 1)));
    }
}
