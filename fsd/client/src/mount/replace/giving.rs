//! A mount passes its kernel to a successor, while programs go on.
//!
//! What takes long is done before, while this mount serves: the successor joins, and opens what is open. Then the event loops are held, for at
//! most [`HOLD`]: whatever this thread is waiting for then, they go on by themselves, for a revocation may wait for a page that is locked
//! in the kernel by a read that nobody answers. What is under way ends, everything is told, and the successor goes on. Until it is told to, nothing has passed, and
//! all of it can be tried again.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rt::time::Instant;

use super::messages::{Begin, Message, OpenFile, Pass, PassedInode};
use super::standing::Standing;
use super::talk::Talk;
use crate::cache::inode::Inode;
use crate::client::Client;
use crate::fuse::loops::{Held, are_idle, duplicates};
use crate::kernel::caches::Whose;
use crate::session::ctx::Stop;
use fsd_node::config::CacheMode;
use fsd_proto::ask;

/// Longest time for which nobody serves the kernel.
const HOLD: Duration = Duration::from_secs(1);
/// Longest wait for a moment in which nothing is under way, while this mount serves.
const CALM: Duration = Duration::from_millis(300);
/// Longest time until all event loops are held.
const COME: Duration = Duration::from_millis(200);
/// How often it is tried with one successor …
const TRIES: u32 = 12;
/// … and the pause before it is tried again, times the number of the try.
const PAUSE: Duration = Duration::from_millis(100);
/// Longest wait for requests that are under way, times the number of the try: one may be waiting for what only a loop that is held can do.
const END: Duration = Duration::from_millis(100);
/// Longest wait for a successor to join.
const JOINS: Duration = Duration::from_secs(30);
/// Longest wait for it to open what is open, while this mount serves.
const OPENS: Duration = Duration::from_secs(30);
/// Longest wait for it to take everything in: longer than the loops are held, for it says so if it cannot.
const TAKES: Duration = Duration::from_secs(10);
/// Longest wait for it to begin to serve.
const BEGINS: Duration = Duration::from_secs(5);
/// How often is looked whether something is over.
const LOOK: Duration = Duration::from_micros(200);
/// How often requests for locks are taken back that had not come to the metadata server.
const WITHDRAW: Duration = Duration::from_millis(20);

/// Why a kernel has not passed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotGiven {
    /// It cannot.
    #[error("{0}")]
    Never(String),
    /// It may with the same successor.
    #[error("{0}")]
    Yet(String),
    /// It may with another successor.
    #[error("{0}")]
    ToThis(String),
}

/// The successor's side of it has failed.
fn lost(what: &str) -> impl Fn(std::io::Error) -> NotGiven + '_ {
    move |error| NotGiven::ToThis(format!("{what}: {error}"))
}

/// Looks until something holds.
fn until(end: Instant, what: &str, mut holds: impl FnMut() -> bool) -> Result<(), NotGiven> {
    while !holds() {
        if Instant::now() > end {
            return Err(NotGiven::Yet(what.into()));
        }
        rt::thread::sleep(LOOK);
    }
    Ok(())
}

/// For what comes soon, or not before the loops go on.
fn in_a_moment(end: Instant) -> Instant {
    (Instant::now() + END).min(end)
}

/// One who passes its kernel on.
pub(super) struct Giving<'a> {
    pub(super) place: &'a Standing,
    pub(super) talk: &'a mut Talk,
    /// Ends the successor's process.
    pub(super) kill: &'a mut dyn FnMut(),
}

impl Giving<'_> {
    /// Passes the kernel to the successor; `listener` is where the next replacement is asked for. After an error [`take_back`] is due,
    /// when the successor's process has ended.
    ///
    /// # Errors
    /// [`NotGiven`]: this mount serves its kernel.
    pub(super) fn give(&mut self, listener: BorrowedFd<'_>) -> Result<(), NotGiven> {
        let client = Arc::clone(&self.place.client);
        self.begin(listener).map_err(|e| NotGiven::Never(e.to_string()))?;
        let node = match self.talk.hear(JOINS) {
            Ok(Message::Ready(node)) => node,
            Ok(_) => return Err(NotGiven::Never("the new process does not say who it is".into())),
            Err(error) => return Err(NotGiven::Never(format!("the new process: {error}"))),
        };
        client.opens.records.twin.set(Some(node));
        client.kernel.caches.passing.begun.store(true, Ordering::SeqCst);
        let mut tries = 0;
        loop {
            self.prepare()?;
            tries += 1;
            match self.attempt(node, END * tries) {
                Err(NotGiven::Yet(why)) if tries < TRIES => {
                    tracing::info!("the kernel does not pass yet: {why}; tried again");
                    rt::thread::sleep(PAUSE * tries);
                }
                result => return result,
            }
        }
    }

    fn begin(&mut self, listener: BorrowedFd<'_>) -> Result<(), NotGiven> {
        let place = self.place;
        let (client, mounted) = (&place.client, &place.mounted);
        let (Some(handshake), Some(mounted)) = (place.loops.handshake.get(), mounted) else {
            return Err(NotGiven::ToThis("what is mounted is not known".into()));
        };
        let devices = duplicates(&place.ours()).map_err(lost("/proc"))?;
        // Whoever is to be answered there holds them as well; no more can come.
        let needed = Arc::strong_count(&place.inherited) > 1;
        let inherited = place.inherited.iter().filter(|_| needed);
        let inherited = inherited.map(|device| device.as_fd());
        let all = devices.iter().map(|device| device.as_fd()).chain(inherited);
        let all: Vec<BorrowedFd<'_>> = [listener].into_iter().chain(all).collect();
        self.talk
            .send_descriptors(&all)
            .map_err(lost("the new process"))?;
        let begin = Begin {
            node: client.session.node.0,
            mounted: mounted.to_text(),
            direct: client.kernel.caches.mode == CacheMode::Direct,
            cache_shared: client.opens.open_files.cache_shared,
            handshake: *handshake,
        };
        self.say(&Message::Begin(begin), BEGINS)
    }

    fn say(&mut self, message: &Message, limit: Duration) -> Result<(), NotGiven> {
        self.talk.send(message, limit).map_err(lost("the new process"))
    }

    /// Does what takes long, while programs are served: what the kernel has cached of files that are not open is dropped, for the successor has no
    /// leases on them; what is dirty is stored; and what is open is opened there.
    fn prepare(&mut self) -> Result<(), NotGiven> {
        let client = &self.place.client;
        for inode in client.cache.inodes.all() {
            client.kernel.caches.take_attrs(&inode, true);
            let unused = inode.opens.try_lock().is_some_and(|opens| opens.count == 0);
            if unused && inode.kernel.pages.load(Ordering::SeqCst) {
                client.revoke.revocations.empty_kernel(&inode);
            }
        }
        client.storing.writeback.write_dirty();
        // Or the successor waits for that when it looks at what was made here.
        if let Err(error) = client.session.net.meta.ask(ask::meta::Sync {}) {
            return Err(NotGiven::Yet(format!("the metadata server: {error}")));
        }
        let (handles, _) = client.opens.open_files.passed();
        let files = handles.iter().filter(|h| h.is_file);
        let mut open: Vec<OpenFile> = files
            .map(|h| OpenFile {
                ino: h.ino,
                writer: h.writer,
                cached: client.cache.inodes.find(h.ino).is_some_and(|i| is_cached(&i)),
            })
            .collect();
        open.sort_unstable();
        open.dedup();
        self.say(&Message::Ahead(open), OPENS)?;
        self.talk.done(OPENS).map_err(lost("the new process"))
    }

    /// Holds the event loops, and passes everything.
    fn attempt(&mut self, node: u16, patience: Duration) -> Result<(), NotGiven> {
        let place = self.place;
        // A moment in which nothing is under way is the best one, if it comes soon.
        let threads = &place.client.session.threads;
        let passing = &place.client.kernel.caches.passing;
        let calm = || threads.busy.is_over() && passing.is_quiet() && are_idle();
        let _ = until(Instant::now() + CALM, "a calm moment", calm);
        let held = Held::hold(&place.loops, place.count, &place.ours(), COME);
        let held = held.map_err(|error| NotGiven::Yet(format!("requests cannot be held: {error}")))?;
        let (began, late) = (Instant::now(), Arc::clone(&held));
        let watching = rt::thread::Builder::new().name("fsd-hold".into()).spawn(move || {
            rt::thread::sleep(HOLD);
            late.let_go();
        });
        let passed = match watching {
            Ok(_) => self.pass(&held, (began + patience, began + HOLD), node),
            Err(error) => Err(NotGiven::Yet(format!("a thread: {error}"))),
        };
        held.let_go();
        match &passed {
            Ok(()) => tracing::info!("the kernel has passed in {:?}", began.elapsed()),
            Err(_) => {
                place.client.kernel.caches.passing.set(Whose::Ours);
                place.client.files.locks.ask_again();
            }
        }
        passed
    }

    fn pass(&mut self, held: &Held, (soon, end): (Instant, Instant), node: u16) -> Result<(), NotGiven> {
        let client = Arc::clone(&self.place.client);
        until(soon, "requests are under way that do not end", || {
            client.session.threads.busy.is_over() && !is_mapped_waiting(&client.cache.inodes.all())
        })?;
        let locks = &client.files.locks;
        let mut asked: Option<Instant> = None;
        until(
            in_a_moment(end),
            "requests for locks cannot be taken back",
            || {
                if asked.is_none_or(|at| at.elapsed() > WITHDRAW) {
                    locks.withdraw();
                    asked = Some(Instant::now());
                }
                locks.are_withdrawn()
            },
        )?;
        until(end, "there are data that cannot be stored", || {
            client.storing.writeback.write_dirty();
            client.cache.dirty.lock().is_empty()
        })?;
        // Who syncs what is open must find that the metadata server knows its size.
        for (_, handle) in client.opens.open_files.handles.all().0 {
            let pushed = client.storing.push.push_attrs_now(&handle.inode);
            pushed.map_err(|stop| NotGiven::Yet(format!("attributes: {}", stop.errno())))?;
        }
        // Or the successor might wait for a lease that cannot be given up while nobody reads requests.
        until(
            in_a_moment(end),
            "the kernel is dropping pages that are being read",
            || client.kernel.caches.passing.is_quiet(),
        )?;
        let all = self.everything();
        let has_locks = !all.locks.is_empty();
        self.say(&Message::Pass(all), BEGINS)?;
        match self.talk.hear(TAKES).map_err(lost("the new process"))? {
            Message::Done => {}
            Message::NotYet(why) => return Err(NotGiven::Yet(why)),
            _ => return Err(NotGiven::ToThis("the new process says something else".into())),
        }
        let done = self.finish(held, end, has_locks.then_some(node));
        if let Err(NotGiven::Yet(_)) = done {
            held.let_go();
            client.kernel.caches.passing.set(Whose::Ours);
            // Before the successor gives up what it has leased.
            drop_owed(&client);
            self.say(&Message::Undo, BEGINS)?;
            self.talk.done(TAKES).map_err(lost("the new process"))?;
        }
        done
    }

    /// The successor has taken everything in: locks are its own, if any are to be, and it begins.
    fn finish(&mut self, held: &Held, end: Instant, locks_to: Option<u16>) -> Result<(), NotGiven> {
        let client = Arc::clone(&self.place.client);
        // From here on what the kernel has is the successor's to drop. What is being dropped here ends before.
        let passing = &client.kernel.caches.passing;
        passing.set(Whose::Theirs);
        until(
            in_a_moment(end),
            "the kernel is dropping pages that are being read",
            || passing.is_quiet(),
        )?;
        let locks = &client.files.locks;
        let given = locks_to.map_or(Ok(()), |node| locks.give(node));
        let refused = |stop: Stop| NotGiven::Yet(format!("file locks: {}", stop.errno()));
        let done = given.map_err(refused).and_then(|()| self.go(held));
        match (&done, locks_to) {
            (Ok(()), _) => locks.have_passed(),
            (Err(_), Some(node)) => locks.reclaim(node),
            _ => {}
        }
        done
    }

    /// Has the successor begin: the last step.
    fn go(&mut self, held: &Held) -> Result<(), NotGiven> {
        let session = &self.place.client.session;
        if session.fate.doomed.load(Ordering::SeqCst) || !session.term.is_valid() {
            // Others may have what it has leased.
            return Err(NotGiven::Never(
                "the metadata server has not heard of this mount for too long".into(),
            ));
        }
        let Some(kept) = held.keep() else {
            return Err(NotGiven::Yet(format!("it took longer than {HOLD:?}")));
        };
        let begun = self
            .say(&Message::Go, BEGINS)
            .and_then(|()| self.talk.done(BEGINS).map_err(lost("the new process")));
        if let Err(error) = begun {
            // It must not read requests beside this process.
            (self.kill)();
            self.place.client.kernel.caches.passing.set(Whose::Ours);
            kept.let_go();
            return Err(error);
        }
        Ok(())
    }

    fn everything(&self) -> Pass {
        let client = &self.place.client;
        let (handles, last_handle) = client.opens.open_files.passed();
        let (locks, waiting) = client.files.locks.passed();
        let mut inodes: Vec<PassedInode> = client.cache.inodes.known().iter().map(|i| inode(i)).collect();
        inodes.retain(|i| i.lookups > 0 || i.cached || i.errors.1.is_some());
        // Of those that share a record the later one takes the place of the earlier.
        inodes.sort_unstable_by_key(|i| i.ino);
        Pass {
            inodes,
            handles,
            last_handle,
            locks,
            waiting,
        }
    }
}

fn is_mapped_waiting(inodes: &[Arc<Inode>]) -> bool {
    let mut mapped = inodes.iter().filter_map(|inode| inode.waiting.mapped.get());
    mapped.any(|mapped| !mapped.is_empty())
}

/// May the kernel have pages or attributes of it?
fn is_cached(inode: &Inode) -> bool {
    let kernel = &inode.kernel;
    kernel.pages.load(Ordering::SeqCst)
        || kernel.attrs.load(Ordering::SeqCst)
        || kernel.drops.load(Ordering::SeqCst) > 0
}

fn inode(inode: &Inode) -> PassedInode {
    let kernel = &inode.kernel;
    let place = inode.try_lock_raw().and_then(|state| state.lasting.place.clone());
    let (count, last) = inode.errors.all();
    PassedInode {
        ino: inode.ino,
        lookups: kernel.lookups.load(Ordering::SeqCst),
        cached: is_cached(inode),
        refilled: kernel.refills.get().is_some(),
        errors: (count, last.map(|e| e.0)),
        place: place.map(|p| *p),
    }
}

/// Has the kernel drop what was not dropped because it was taken for the successor's.
fn drop_owed(client: &Client) {
    let caches = &client.kernel.caches;
    let owed = caches.passing.owed().into_iter();
    for inode in owed.filter_map(|ino| client.cache.inodes.find(ino)) {
        client.revoke.revocations.empty_kernel(&inode);
    }
}

/// Nothing has passed, and the successor's process has ended: this mount goes on as before.
pub(super) fn take_back(place: &Standing) {
    let client = &place.client;
    let caches = &client.kernel.caches;
    caches.passing.set(Whose::Ours);
    caches.passing.begun.store(false, Ordering::SeqCst);
    client.opens.records.twin.set(None);
    drop_owed(client);
}
