//! File locks that pass from one mount to its successor: those that are held, and requests that wait for one.
//!
//! The metadata server changes the owner of what is held at once, so that nobody can get it in between. A request that waits there is
//! taken back, and made again by the successor.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::files::locks::{Locks, PassedWaiter, Withdrawn};
use crate::session::ctx::Res;
use fsd_proto::ask;
use fsd_proto::wire::{LockOwner, LockSpec};

/// A lock that is held, and the open file that its owner took one through last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassedLock {
    /// The lock.
    pub lock: LockSpec,
    /// The open file.
    pub handle: u64,
}

impl Locks {
    /// Takes all requests back that wait at the metadata server; none of them is answered from now on. To be called until
    /// [`Locks::are_withdrawn`], for one may not have come there yet.
    pub fn withdraw(&self) {
        self.file_locks.withdrawn().lock().get_or_insert_default();
        for lock in self.file_locks.waiting() {
            self.take_back(lock);
        }
    }

    /// Does no request wait any more?
    #[must_use]
    pub fn are_withdrawn(&self) -> bool {
        self.file_locks.waiting().is_empty()
    }

    /// What passes: what is held, and what was withdrawn.
    #[must_use]
    pub fn passed(&self) -> (Vec<PassedLock>, Vec<PassedWaiter>) {
        let held = self.file_locks.held_through().into_iter();
        let withdrawn = self.file_locks.withdrawn().lock();
        let waiters = withdrawn.iter().flatten().map(|w| w.asked);
        (
            held.map(|(lock, handle)| PassedLock { lock, handle }).collect(),
            waiters.collect(),
        )
    }

    /// What was withdrawn is asked for again: it does not pass.
    pub fn ask_again(self: &Arc<Self>) {
        let withdrawn = self.file_locks.withdrawn().lock().take();
        for Withdrawn { asked, done } in withdrawn.into_iter().flatten() {
            self.setlk_wait(asked, done);
        }
    }

    /// Everything has passed: what was withdrawn is the successor's to answer, and nothing is held here.
    pub fn have_passed(&self) {
        let withdrawn = self.file_locks.withdrawn().lock().replace(Vec::new());
        for Withdrawn { done, .. } in withdrawn.into_iter().flatten() {
            // An answer that is dropped is sent as an error.
            std::mem::forget(done);
        }
        self.file_locks.clear();
    }

    /// What a predecessor holds is this mount's.
    pub fn adopt(&self, passed: &[PassedLock]) {
        for PassedLock { lock, handle } in passed {
            self.file_locks.note(&self.mine(*lock), *handle);
        }
    }

    /// It is the predecessor's after all.
    pub fn disown(&self) {
        self.file_locks.clear();
    }

    /// What a predecessor asked for, in this mount's name.
    #[must_use]
    pub fn mine(&self, lock: LockSpec) -> LockSpec {
        let owner = LockOwner {
            node: self.session.node.0,
            ..lock.owner
        };
        LockSpec { owner, ..lock }
    }

    /// What is held here is another mount's at the metadata server from now on.
    ///
    /// # Errors
    /// That mount is no more; the metadata server cannot be reached.
    pub fn give(&self, to: u16) -> Res<()> {
        let from = self.session.node.0;
        Ok(self.session.net.meta.ask(ask::meta::GiveLocks { from, to })?)
    }

    /// What was given to a mount is held here again. If that mount is gone its locks went with it, and are asked for one by one.
    pub fn reclaim(&self, from: u16) {
        let to = self.session.node.0;
        let Err(error) = self.session.net.meta.ask(ask::meta::GiveLocks { from, to }) else {
            return;
        };
        tracing::warn!("file locks are asked for once more: {error}");
        for lock in self.file_locks.all() {
            let request = ask::meta::SetLock { lock, wait: false };
            if let Err(error) = self.session.net.meta.ask(request) {
                tracing::error!(
                    "a file lock of process {} on {:#x} is lost: {error}",
                    lock.pid,
                    lock.ino
                );
            }
        }
    }
}
