//! Writes of mapped pages.
//!
//! The kernel writes dirty mapped pages back whenever it likes, without asking for a lease first, and
//! keeps them locked to invalidation until the write is answered. Such a write may therefore not wait for
//! the exclusive lease while this mount's shared lease is being revoked: it is then answered at once and
//! applied when the lease has come. A shared writable mapping on a stock kernel promises no more.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

use crate::rpc::Errno;

/// A reply that either the writer or a revocation gives.
pub type Answer = Box<dyn FnOnce(Result<(), Errno>) + Send>;

/// A write that waits for its lease.
#[derive(Clone)]
pub struct Waiting(Arc<Mutex<Option<Answer>>>);

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Waiting")
    }
}

impl Waiting {
    /// Answers it. False: somebody has before.
    pub fn answer(&self, result: Result<(), Errno>) -> bool {
        let answer = self.0.lock().take();
        let first = answer.is_some();
        if let Some(answer) = answer {
            answer(result);
        }
        first
    }
}

#[derive(Debug, Default)]
struct State {
    waiting: Vec<(u64, Waiting)>,
    next: u64,
    revoking: bool,
}

/// The waiting writes of mapped pages of one file.
#[derive(Debug, Default)]
pub struct MappedWrites {
    state: Mutex<State>,
    applied: Condvar,
}

impl MappedWrites {
    /// A write begins to wait. During a revocation it is answered at once.
    pub fn begin(&self, answer: Answer) -> (u64, Waiting) {
        let waiting = Waiting(Arc::new(Mutex::new(Some(answer))));
        let mut state = self.state.lock();
        let number = state.next;
        state.next += 1;
        state.waiting.push((number, waiting.clone()));
        let now = state.revoking;
        drop(state);
        if now {
            waiting.answer(Ok(()));
        }
        (number, waiting)
    }

    /// A write has been applied, or has failed.
    pub fn end(&self, number: u64) {
        self.state.lock().waiting.retain(|(n, _)| *n != number);
        self.applied.notify_all();
    }

    /// A revocation begins or ends; when it begins, everything that waits is answered.
    pub fn revoking(&self, yes: bool) {
        let mut state = self.state.lock();
        state.revoking = yes;
        let waiting: Vec<Waiting> = if yes {
            state.waiting.iter().map(|(_, w)| w.clone()).collect()
        } else {
            Vec::new()
        };
        drop(state);
        for w in waiting {
            w.answer(Ok(()));
        }
    }

    /// Is nothing waiting?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().waiting.is_empty()
    }

    /// Waits until everything that waits now has been applied.
    pub fn drain(&self) {
        let mut state = self.state.lock();
        let last = state.next;
        while state.waiting.iter().any(|(n, _)| *n < last) {
            self.applied.wait(&mut state);
        }
    }
}
