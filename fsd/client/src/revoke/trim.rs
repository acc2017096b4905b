//! Forgetting inodes that neither the kernel nor an open file refers to: with their caches go their leases,
//! which other mounts then need not ask for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rt::sync::Mutex;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::kernel::front::Front;
use crate::session::Session;
use fsd_proto::ino;

/// So many files without names are forgotten together.
const TOGETHER: usize = 1024;
/// After so many inodes have been forgotten, the allocator is asked to give the system its free pages. It looks through all it has.
const GIVE_BACK: usize = 16 * TOGETHER;

/// When inodes are forgotten.
#[derive(Debug)]
pub struct Trim {
    /// Beyond this many known inodes those are forgotten that can be.
    limit: usize,
    /// How many have become candidates since the last time.
    candidates: AtomicUsize,
    /// Inodes that are gone, and that the kernel has forgotten: nothing of them is worth keeping.
    gone: Mutex<Vec<u64>>,
    running: AtomicBool,
    /// Forgotten since memory was last given back.
    forgotten: AtomicUsize,
}

impl Trim {
    /// Keeps up to `limit` inodes, and all that are in use.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            candidates: AtomicUsize::new(0),
            gone: Mutex::default(),
            running: AtomicBool::new(false),
            forgotten: AtomicUsize::new(0),
        }
    }

    fn note_gone(&self, number: u64) -> bool {
        let mut gone = self.gone.lock();
        gone.push(number);
        // Those that could not be forgotten the last time are not looked at for each that comes.
        gone.len().is_multiple_of(TOGETHER)
    }
}

/// Forgetting inodes.
pub struct Forgetting {
    /// When inodes are forgotten.
    pub trim: Trim,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) front: Arc<Front>,
}

impl Forgetting {
    /// The kernel gives back `count` references to an inode.
    pub fn forget(self: &Arc<Self>, number: u64, count: u64) {
        let Some(inode) = self.cache.inodes.find_any(number) else {
            return;
        };
        let less = |n: u64| Some(n.saturating_sub(count));
        let before = inode
            .kernel
            .lookups
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        if before.is_ok_and(|n| n > count) {
            return;
        }
        self.cache.inodes.forgotten(&inode);
        self.front.forgotten(&inode);
        let gone = inode.try_lock_raw().is_some_and(|state| state.lasting.gone);
        let many_gone = gone && self.trim.note_gone(number);
        let candidates = self.trim.candidates.fetch_add(1, Ordering::Relaxed) + 1;
        // Looking through all of them must be worth it.
        let too_many = self.cache.inodes.len() > self.trim.limit && candidates > self.trim.limit / 8;
        if (many_gone || too_many) && !self.trim.running.swap(true, Ordering::AcqRel) {
            let me = Arc::clone(self);
            self.session.threads.workers.run(move || {
                me.forget_gone();
                if too_many {
                    me.trim.candidates.store(0, Ordering::Relaxed);
                    me.forget_idle();
                }
                me.give_memory_back();
                me.trim.running.store(false, Ordering::Release);
            });
        }
    }

    fn forget_gone(&self) {
        let gone = std::mem::take(&mut *self.trim.gone.lock());
        // The lease of one that is superseded is its successor's.
        let known = gone.into_iter().filter_map(|n| self.cache.inodes.find(n));
        let (settled, open): (Vec<Arc<Inode>>, Vec<Arc<Inode>>) = known.partition(|i| self.is_settled(i));
        let records = settled.iter().map(|inode| inode.record());
        self.session.leases.release_together(records);
        let settled: Vec<u64> = settled.into_iter().map(|inode| inode.ino).collect();
        let mut later: Vec<u64> = settled.into_iter().filter(|&n| !self.forget_one(n)).collect();
        later.extend(open.into_iter().map(|inode| inode.ino));
        self.trim.gone.lock().append(&mut later);
    }

    fn forget_idle(&self) {
        let keep = self.trim.limit - self.trim.limit / 8;
        let excess = self.cache.inodes.len().saturating_sub(keep);
        let idle: Vec<Arc<Inode>> = self.cache.inodes.idle(excess);
        let records = idle.iter().map(|inode| inode.record());
        self.session.leases.release_together(records);
        for inode in idle {
            let number = inode.ino;
            drop(inode);
            self.forget_one(number);
        }
    }

    /// Does the metadata server know what became of an inode, and will it not forget that? Before, its lease would wait to be given up.
    fn is_settled(&self, inode: &Inode) -> bool {
        let (meta, linked) = (&self.session.net.meta, inode.transit.push.lock().linked);
        meta.knows(inode.ino) && (linked == 0 || meta.is_durable_low(linked))
    }

    /// False: it is known still. Where the lease takes longer to give up, it is for the next time.
    fn forget_one(&self, number: u64) -> bool {
        let released = self.session.leases.handle(ino::record(number)).is_none();
        if let Some(inode) = released.then(|| self.cache.inodes.remove_idle(number)).flatten() {
            self.cache.count_pages(inode.lock_raw().pages.len(), 0);
            self.trim.forgotten.fetch_add(1, Ordering::Relaxed);
            return true;
        }
        self.cache.inodes.find(number).is_none()
    }

    fn give_memory_back(&self) {
        if self.trim.forgotten.load(Ordering::Relaxed) >= GIVE_BACK {
            self.trim.forgotten.store(0, Ordering::Relaxed);
            fsd_node::heap::give_back();
        }
    }
}
