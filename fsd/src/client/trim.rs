//! Forgetting inodes that neither the kernel nor an open file refers to: with their caches go their leases,
//! which other mounts then need not ask for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::Client;
use super::inode::Inode;
use crate::ino;

/// When inodes are forgotten.
#[derive(Debug)]
pub struct Trim {
    /// Beyond this many known inodes those are forgotten that can be.
    limit: usize,
    /// How many have become candidates since the last time.
    candidates: AtomicUsize,
    running: AtomicBool,
}

impl Trim {
    /// Keeps up to `limit` inodes, and all that are in use.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            candidates: AtomicUsize::new(0),
            running: AtomicBool::new(false),
        }
    }
}

impl Client {
    /// The kernel gives back `count` references to an inode.
    pub fn forget(self: &Arc<Self>, number: u64, count: u64) {
        let Some(inode) = self.inodes.find_any(number) else {
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
        self.inodes.forgotten(&inode);
        self.forget_lent(&inode);
        let candidates = self.trim.candidates.fetch_add(1, Ordering::Relaxed) + 1;
        // Looking through all of them must be worth it.
        if self.inodes.len() > self.trim.limit
            && candidates > self.trim.limit / 8
            && !self.trim.running.swap(true, Ordering::AcqRel)
        {
            self.trim.candidates.store(0, Ordering::Relaxed);
            let me = Arc::clone(self);
            self.workers.run(move || {
                me.forget_idle();
                me.trim.running.store(false, Ordering::Release);
            });
        }
    }

    fn forget_idle(&self) {
        let keep = self.trim.limit - self.trim.limit / 8;
        let excess = self.inodes.len().saturating_sub(keep);
        let idle: Vec<Arc<Inode>> = self.inodes.idle(excess);
        for inode in &idle {
            self.leases.release(inode.record());
        }
        for inode in idle {
            let number = inode.ino;
            drop(inode);
            // Where the lease takes longer to give up, it is for the next time.
            let gone = self.leases.handle(ino::record(number)).is_none();
            if let Some(inode) = gone.then(|| self.inodes.remove_idle(number)).flatten() {
                let state = inode.lock_raw();
                self.count_pages(state.pages.len(), 0);
            }
        }
    }
}
