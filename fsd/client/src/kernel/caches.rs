//! What the kernel caches, and is told to drop.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rt::channel::bounded;
use rt::sync::{Condvar, Mutex};

use crate::cache::edges::{EDGE_WAIT, around, edge_of};
use crate::cache::inode::Inode;
use crate::cache::pages::PAGE;
use crate::cache::state::State;
use crate::kernel::notifier::Notifier;
use crate::session::Session;
use fsd_node::config::CacheMode;
use fsd_proto::wire::Kind;

/// Time to live of attributes that a lease protects: until told otherwise.
pub const LEASED_TTL: Duration = Duration::from_secs(24 * 3600);

/// Time to live of the attributes of a file that the kernel has just made: until it has looked whether that may be opened, and the program at
/// what it has opened.
const CREATED_TTL: Duration = Duration::from_millis(8);
/// As long as that lasts at most: the kernel counts in ticks, of up to 10 ms, rounds up, and takes the last one for still valid.
const CREATED_GONE: Duration = Duration::from_millis(30);

/// Whoever waits for an answer has taken it in after that time, however busy the host is.
const ON_ITS_WAY: Duration = Duration::from_secs(5);

/// Whose a kernel is: who has it drop what it caches.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Whose {
    /// This mount's.
    #[default]
    Ours,
    /// Another mount's, this one's successor or predecessor: nothing is dropped from here. A page that is locked there may be waiting for a
    /// lease of the other, which waits for this mount.
    Theirs,
    /// It is just being decided: who wants something dropped waits.
    Undecided,
}

/// The kernel passes from one mount to another.
#[derive(Debug, Default)]
pub struct Passing {
    /// It is about to, to a successor: it gets no attributes to keep any more, for the successor would have to hold the leases that protect them.
    pub begun: AtomicBool,
    whose: Mutex<Whose>,
    /// It is [`Whose::Undecided`].
    undecided: AtomicBool,
    decided: Condvar,
    /// Inodes of which something was not dropped while it was another's.
    owed: Mutex<Vec<u64>>,
    /// Invalidations under way.
    under_way: AtomicUsize,
}

/// An invalidation is under way; until this is dropped.
struct UnderWay<'a>(&'a AtomicUsize);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Passing {
    /// The right to tell the kernel something; none where it is another mount's.
    fn enter(&self, inode: u64) -> Option<UnderWay<'_>> {
        let mut whose = self.whose.lock();
        while *whose == Whose::Undecided {
            self.decided.wait(&mut whose);
        }
        if *whose == Whose::Theirs {
            self.owed.lock().push(inode);
            return None;
        }
        self.under_way.fetch_add(1, Ordering::SeqCst);
        Some(UnderWay(&self.under_way))
    }

    /// What was not dropped because the kernel was another mount's.
    #[must_use]
    pub fn owed(&self) -> Vec<u64> {
        std::mem::take(&mut *self.owed.lock())
    }

    /// Whose it is from now on.
    pub fn set(&self, whose: Whose) {
        self.undecided.store(whose == Whose::Undecided, Ordering::SeqCst);
        *self.whose.lock() = whose;
        self.decided.notify_all();
    }

    /// Does who wants something dropped wait?
    #[must_use]
    pub fn is_undecided(&self) -> bool {
        self.undecided.load(Ordering::SeqCst)
    }

    /// Does no thread have the kernel drop anything?
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.under_way.load(Ordering::SeqCst) == 0
    }
}

/// What the kernel caches, and is told to drop.
pub struct KernelCaches {
    /// How the kernel caches ([`CacheMode::Auto`] has been decided).
    pub mode: CacheMode,
    /// Tells the kernel to drop what it has cached.
    pub notifier: OnceLock<Notifier>,
    /// Whether the kernel is about to be, or is, another mount's.
    pub passing: Passing,
    pub(crate) session: Arc<Session>,
}

impl KernelCaches {
    /// How long the kernel may keep attributes that are answered now, under a lease.
    pub fn attr_ttl(&self, inode: &Inode, kind: Kind) -> Duration {
        if self.mode == CacheMode::Writeback && kind == Kind::File {
            // The kernel extension asks for a lease first, and a grant brings the attributes.
            return LEASED_TTL;
        }
        inode.kernel.answered.store(self.session.now(), Ordering::SeqCst);
        // The kernel takes in late how far a write has made the file grow, and for a moment shows that beside attributes
        // that are newer: so it keeps none while this mount has the file open for writing.
        let written = kind == Kind::File && inode.opens.try_lock().is_none_or(|o| o.writers > 0);
        if written
            || inode.kernel.revoking.load(Ordering::SeqCst)
            || self.passing.begun.load(Ordering::SeqCst)
        {
            return Duration::ZERO;
        }
        inode.kernel.attrs.store(true, Ordering::SeqCst);
        LEASED_TTL
    }

    /// As [`KernelCaches::attr_ttl`], for answers that the kernel takes in whatever it was told meanwhile (SETATTR, LINK, MKDIR, MKNOD,
    /// SYMLINK, CREATE; with those to GETATTR and LOOKUP it looks whether an invalidation has overtaken them): not at all, for the lease may
    /// be gone by then. Who walks to what was made asks once more, for names are not kept. Files are the kernel extension's, where it is: without
    /// attributes the first write would ask for them.
    pub fn late_attr_ttl(&self, kind: Kind) -> Duration {
        if self.mode == CacheMode::Writeback && kind == Kind::File {
            return LEASED_TTL;
        }
        Duration::ZERO
    }

    /// As [`KernelCaches::late_attr_ttl`], for a file that was just made and opened, as `number`, under its exclusive lease.
    ///
    /// The kernel takes that answer in whatever it is told meanwhile. But it does not know the inode before, so who has it dropped waits until it
    /// does ([`KernelCaches::notify`]); what lives for a moment may be put there a little later still, and is gone [`CREATED_GONE`] after
    /// that (`KernelCache::created`). Nobody else on this host comes to the inode before, for the kernel has its directory locked until it has taken
    /// the answer in.
    pub fn created_ttl(&self, inode: &Inode, number: u64) -> Duration {
        let kernel = &inode.kernel;
        if self.mode == CacheMode::Writeback
            || kernel.revoking.load(Ordering::SeqCst)
            || self.passing.begun.load(Ordering::SeqCst)
        {
            return self.late_attr_ttl(Kind::File);
        }
        kernel.answered.store(self.session.now(), Ordering::SeqCst);
        kernel.created.store(number, Ordering::SeqCst);
        kernel.attrs.store(true, Ordering::SeqCst);
        CREATED_TTL
    }

    /// The kernel has sent something about an open file.
    pub fn knows_handle(&self, inode: &Inode, number: u64) {
        let created = &inode.kernel.created;
        if created.load(Ordering::Relaxed) == number {
            let _ = created.compare_exchange(number, 0, Ordering::SeqCst, Ordering::Relaxed);
        }
    }

    /// Attributes that came with the answer to CREATE may be in the kernel though it has been told to drop them: waits until they are old.
    /// False: it would have to wait.
    fn outlive_created(&self, inode: &Inode, may_wait: bool) -> bool {
        if inode.kernel.created.load(Ordering::SeqCst) == 0 {
            return true;
        }
        if may_wait {
            rt::thread::sleep(CREATED_GONE);
            inode.kernel.created.store(0, Ordering::SeqCst);
        }
        may_wait
    }

    /// Drops the attributes the kernel has of an inode after a change under the exclusive lease, before
    /// the lease can be given down: until the kernel has taken in the answer it would show the old ones.
    pub fn invalidate_attrs(&self, inode: &Inode) {
        if inode.kernel.attrs.swap(false, Ordering::SeqCst) {
            self.tell(inode, -1, 0);
        }
    }

    /// Drops the attributes the kernel has of an inode, because its lease goes or the mount's term ends. False: that would have to wait,
    /// and is to be done again.
    pub fn take_attrs(&self, inode: &Inode, may_wait: bool) -> bool {
        if inode.kernel.attrs.swap(false, Ordering::SeqCst) {
            if may_wait {
                self.notify(inode, -1, 0);
            } else if !self.notify_at_once(inode, -1, 0) {
                inode.kernel.attrs.store(true, Ordering::SeqCst);
                return false;
            }
        }
        self.outlive_created(inode, may_wait)
    }

    /// Tells the kernel to drop attributes and, for `offset >= 0`, pages. False: it does not know the inode.
    fn tell(&self, inode: &Inode, offset: i64, len: i64) -> bool {
        let Some(notifier) = self.notifier.get() else {
            return true;
        };
        let Some(_entered) = self.passing.enter(inode.ino) else {
            return true;
        };
        notifier
            .inval_inode(inode.ino, offset, len)
            .unwrap_or_else(|error| {
                // The kernel is unmounting: there is no cache any more.
                tracing::debug!("invalidating {:#x}: {error}", inode.ino);
                true
            })
    }

    /// May the kernel be about to learn of an inode, from an answer that somebody waits for who has not had a processor since? It would
    /// keep what that says. Else it has forgotten the inode, and this mount has just not read that yet, or never will: of what is unmounted the
    /// kernel says nothing any more.
    fn is_on_its_way(&self, inode: &Inode) -> bool {
        if self.session.fate.leaving.load(Ordering::SeqCst) {
            return false;
        }
        let since = |at: u64| Duration::from_nanos(self.session.now().saturating_sub(at));
        inode.kernel.lookups.load(Ordering::SeqCst) > 0
            && since(inode.kernel.answered.load(Ordering::SeqCst)) < ON_ITS_WAY
    }

    /// Has the kernel drop attributes and, for `offset >= 0`, pages. An inode that it is just about to learn of from an answer already sent is
    /// waited for. Not on a thread that brings answers from the fabric.
    pub fn notify(&self, inode: &Inode, offset: i64, len: i64) {
        while !self.tell(inode, offset, len) && self.is_on_its_way(inode) {
            rt::thread::sleep(Duration::from_micros(20));
        }
    }

    /// As [`KernelCaches::notify`]. False: it would have to wait.
    pub fn notify_at_once(&self, inode: &Inode, offset: i64, len: i64) -> bool {
        self.tell(inode, offset, len) || !self.is_on_its_way(inode)
    }

    pub(crate) fn invalidate_range(&self, inode: &Inode, offset: u64, len: u64) {
        if let Some(notifier) = self.notifier.get()
            && let Some(_entered) = self.passing.enter(inode.ino)
        {
            // An inode the kernel does not know (any more) has no pages.
            let _ = notifier.inval_inode(inode.ino, offset as i64, len as i64);
        }
    }

    /// Drops the pages of a write through the page cache that is not answered yet. The kernel may keep one folio of them locked until it is
    /// answered, which then holds nothing old: that one aside, and for a while only. False: that was not long enough.
    pub(crate) fn invalidate_written(self: &Arc<Self>, inode: &Inode, offset: u64, len: u64) -> bool {
        let end = offset + len;
        let Some((first, last)) = edge_of(offset, len) else {
            self.invalidate_range(inode, offset, len);
            return true;
        };
        let (first, last) = ((first * PAGE).max(offset), ((last + 1) * PAGE).min(end));
        if first > offset {
            self.invalidate_range(inode, offset, first - offset);
        }
        if end > last {
            self.invalidate_range(inode, last, end - last);
        }
        if self.notifier.get().is_none() {
            return true;
        }
        let (tx, rx) = bounded(1);
        let (ino, me) = (inode.ino, Arc::clone(self));
        self.session.threads.invalidators.run(move || {
            if let Some(notifier) = me.notifier.get()
                && let Some(_entered) = me.passing.enter(ino)
            {
                // An inode the kernel does not know (any more) has no pages.
                let _ = notifier.inval_inode(ino, first as i64, (last - first) as i64);
            }
            let _ = tx.send(());
        });
        rx.recv_timeout(EDGE_WAIT).is_ok()
    }

    /// Another mount has removed a directory: has the kernel know, so that getcwd(2) says so, too. Aside, for it takes the inode lock
    /// that the request may hold on whose behalf this was found out.
    pub fn tell_gone(&self, dir: &Inode, state: &mut State) {
        let (Some(place), Some(notifier)) = (state.lasting.place.take(), self.notifier.get().cloned()) else {
            return;
        };
        let (above, name) = *place;
        let gone = dir.ino;
        self.session.threads.revokers.run(move || {
            // It is refused where the name is another directory's by now, or none: then the kernel knows.
            let _ = notifier.delete(above, gone, &name);
        });
    }

    /// Drops all pages and attributes the kernel has of an inode, but for folios that hold nothing old and stay locked.
    pub fn invalidate_pages(self: &Arc<Self>, inode: &Arc<Inode>) {
        // Only handles that write through the page cache lock pages for longer than it takes to serve a read. Whoever opens
        // or closes one just now holds `opens`; who opens one from now on gets one that goes past it (`make_handle`).
        if inode
            .opens
            .try_lock()
            .is_some_and(|opens| opens.page_writers == 0)
        {
            return self.notify(inode, 0, 0);
        }
        // One that was left behind, and ends after all, has gone around fewer pages than the next one.
        let done = Arc::new(AtomicBool::new(false));
        let edges = loop {
            let (edges, seen) = inode.waiting.edges.now();
            let (me, target, ranges) = (Arc::clone(self), Arc::clone(inode), around(&edges));
            let ended = Arc::clone(&done);
            self.session.threads.invalidators.run(move || {
                for (offset, len) in ranges {
                    me.notify(&target, offset as i64, len as i64);
                }
                target.waiting.edges.finish(&ended);
            });
            if inode.waiting.edges.wait_for(&done, seen) {
                break edges;
            }
        };
        for (first, last) in edges {
            let (me, target) = (Arc::clone(self), Arc::clone(inode));
            let (tx, rx) = bounded(1);
            self.session.threads.invalidators.run(move || {
                let len = (last + 1 - first) * PAGE;
                me.notify(&target, (first * PAGE) as i64, len as i64);
                let _ = tx.send(());
            });
            let _ = rx.recv_timeout(EDGE_WAIT);
        }
    }
}
