//! Deadlines of parked operations, and ends of minimum hold times.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::lease::LeaseHandle;

pub(crate) enum Timer {
    /// The parked operation with this ticket gives up.
    Deadline,
    /// The tenure with this number has lasted long enough.
    Held(u64),
}

/// By time; the ticket makes the key unique.
type Queue = BTreeMap<(Instant, u64), (Arc<LeaseHandle>, Timer)>;

#[derive(Default)]
pub(crate) struct Timers(Mutex<Queue>);

impl Timers {
    pub(crate) fn insert(&self, at: Instant, ticket: u64, lease: Arc<LeaseHandle>, timer: Timer) {
        self.0.lock().insert((at, ticket), (lease, timer));
    }

    pub(crate) fn remove(&self, at: Instant, ticket: u64) {
        self.0.lock().remove(&(at, ticket));
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.0.lock().keys().next().map(|k| k.0)
    }

    /// Takes the first that is due.
    pub(crate) fn due(&self, now: Instant) -> Option<(u64, Arc<LeaseHandle>, Timer)> {
        let mut timers = self.0.lock();
        let first = timers.first_entry()?;
        if first.key().0 > now {
            return None;
        }
        let ticket = first.key().1;
        let (lease, timer) = first.remove();
        Some((ticket, lease, timer))
    }
}
