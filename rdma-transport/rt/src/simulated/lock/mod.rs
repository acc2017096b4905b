//! Locks. Each has a real one inside: in a simulation nobody waits for that, the scheduler knows who may try again.

pub(super) mod condvar;
pub(super) mod mutex;
pub(super) mod rwlock;

use std::panic::Location;

use super::sched;
use super::task::Why;

/// Tries until it succeeds, in a simulation; `None` outside.
fn acquire<G>(address: usize, at: &'static Location<'static>, attempt: impl Fn() -> Option<G>) -> Option<G> {
    if !sched::point() {
        return None;
    }
    loop {
        if let Some(guard) = attempt() {
            return Some(guard);
        }
        sched::block(Why::Lock, [address, 0], None, at, |_| {});
    }
}

/// What was held is free.
fn released(address: usize) {
    sched::wake(address, true);
    if !std::thread::panicking() {
        sched::point();
    }
}
