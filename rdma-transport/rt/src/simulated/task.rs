//! What the scheduler knows of a thread.

use std::panic::Location;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Thread;

pub(super) type TaskId = usize;

/// Why a thread waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    Lock,
    Condition,
    Channel,
    Sleep,
    Join,
}

/// What a thread waits for, and where in the source it does.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wait {
    pub(super) why: Why,
    /// Addresses of what may wake it; zero: none.
    pub(super) on: [usize; 2],
    pub(super) at: &'static Location<'static>,
    pub(super) since: u64,
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Woken,
    TimedOut,
}

/// Passed to the thread that is to run next.
pub(super) struct Baton {
    mine: AtomicBool,
}

impl Baton {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            mine: AtomicBool::new(false),
        })
    }

    /// Waits for it, on the thread it belongs to.
    pub(super) fn take(&self) {
        while !self.mine.swap(false, Ordering::Acquire) {
            std::thread::park();
        }
    }

    pub(super) fn pass(&self, to: &Thread) {
        self.mine.store(true, Ordering::Release);
        to.unpark();
    }
}

pub(super) struct Task {
    pub(super) name: String,
    pub(super) group: u32,
    pub(super) wait: Option<Wait>,
    pub(super) until: Option<u64>,
    pub(super) outcome: Outcome,
    /// It is to end where it is: the next time it runs its stack is unwound.
    pub(super) killed: bool,
    pub(super) done: bool,
    pub(super) baton: Arc<Baton>,
    pub(super) thread: Option<Thread>,
}

/// What a thread that is killed is unwound with.
pub(super) struct Killed;
