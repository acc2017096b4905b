//! Deadlines of parked operations, ends of minimum hold times, and words that were kept long enough.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rt::sync::{Condvar, Mutex};
use rt::time::Instant;

use crate::lease::LeaseHandle;

pub(crate) enum Timer {
    /// The parked operation with this ticket gives up.
    Deadline,
    /// The tenure with this number, which began then, may have lasted long enough.
    Held(u64, Instant),
    /// A word that was kept may have been kept long enough.
    Kept,
}

/// By time; the ticket makes the key unique.
type Queue = BTreeMap<(Instant, u64), (Arc<LeaseHandle>, Timer)>;

#[derive(Default)]
struct State {
    queue: Queue,
    stopped: bool,
}

#[derive(Default)]
pub(crate) struct Timers {
    state: Mutex<State>,
    earlier: Condvar,
}

impl Timers {
    pub(crate) fn insert(&self, at: Instant, ticket: u64, lease: Arc<LeaseHandle>, timer: Timer) {
        let mut state = self.state.lock();
        state.queue.insert((at, ticket), (lease, timer));
        let first = state.queue.keys().next().is_some_and(|k| k.1 == ticket);
        drop(state);
        if first {
            self.earlier.notify_one();
        }
    }

    pub(crate) fn remove(&self, at: Instant, ticket: u64) {
        self.state.lock().queue.remove(&(at, ticket));
    }

    pub(crate) fn next(&self) -> Option<Instant> {
        self.state.lock().queue.keys().next().map(|k| k.0)
    }

    /// Takes the first that is due.
    pub(crate) fn due(&self, now: Instant) -> Option<(u64, Arc<LeaseHandle>, Timer)> {
        let mut state = self.state.lock();
        let first = state.queue.first_entry()?;
        if first.key().0 > now {
            return None;
        }
        let ticket = first.key().1;
        let (lease, timer) = first.remove();
        Some((ticket, lease, timer))
    }

    /// Sleeps until something is due; false once stopped.
    pub(crate) fn wait(&self) -> bool {
        let mut state = self.state.lock();
        loop {
            if state.stopped {
                return false;
            }
            match state.queue.keys().next().map(|k| k.0) {
                Some(at) if at <= Instant::now() => return true,
                Some(at) => {
                    self.earlier.wait_until(&mut state, at);
                }
                None => self.earlier.wait(&mut state),
            }
        }
    }

    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.earlier.notify_all();
    }
}

/// All timers of a manager.
#[derive(Default)]
pub(crate) struct Alarms {
    /// Of parked operations, which mostly watch them themselves.
    pub(crate) deadlines: Timers,
    /// Of leases.
    pub(crate) tenures: Timers,
    tickets: AtomicU64,
}

impl Alarms {
    /// A number that no other timer has.
    pub(crate) fn ticket(&self) -> u64 {
        self.tickets.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes the first of all that is due.
    pub(crate) fn due(&self, now: Instant) -> Option<(u64, Arc<LeaseHandle>, Timer)> {
        self.deadlines.due(now).or_else(|| self.tenures.due(now))
    }

    /// When the first of all is due.
    pub(crate) fn next(&self) -> Option<Instant> {
        self.deadlines.next().into_iter().chain(self.tenures.next()).min()
    }
}
