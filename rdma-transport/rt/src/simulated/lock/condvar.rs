//! A condition variable.

use std::panic::Location;
use std::time::Duration;

use super::super::sched;
use super::super::task::{Outcome, Why};
use super::super::time::Instant;
use super::mutex::MutexGuard;

/// As that of `parking_lot`.
#[derive(Debug, Default)]
pub struct Condvar {
    real: parking_lot::Condvar,
}

/// Whether a wait ended because of its deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitTimeoutResult(bool);

impl WaitTimeoutResult {
    /// Did it?
    #[must_use]
    pub fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    /// Nobody waits.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            real: parking_lot::Condvar::new(),
        }
    }

    fn address(&self) -> usize {
        std::ptr::from_ref(self).cast::<()>() as usize
    }

    /// One of those who wait goes on.
    pub fn notify_one(&self) -> bool {
        sched::wake(self.address(), false);
        self.real.notify_one()
    }

    /// All of them do.
    pub fn notify_all(&self) -> usize {
        sched::wake(self.address(), true);
        self.real.notify_all()
    }

    fn simulated<T: ?Sized>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        until: Option<Instant>,
        at: &'static Location<'static>,
    ) -> Option<Outcome> {
        if !sched::simulated() {
            return None;
        }
        let lock = guard.lock;
        // Nobody else runs before this thread is among those who wait.
        drop(guard.real.take());
        let until = until.map(Instant::virtual_nanos);
        let address = lock.address();
        let outcome = sched::block(Why::Condition, [self.address(), 0], until, at, |state| {
            state.wake(address, true);
        });
        guard.real = Some(lock.lock_real(at));
        outcome
    }

    /// Waits.
    #[track_caller]
    pub fn wait<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>) {
        if self.simulated(guard, None, Location::caller()).is_none()
            && let Some(real) = &mut guard.real
        {
            self.real.wait(real);
        }
    }

    /// Waits at most until then.
    #[track_caller]
    pub fn wait_until<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, until: Instant) -> WaitTimeoutResult {
        let outcome = self.simulated(guard, Some(until), Location::caller());
        match (outcome, &mut guard.real) {
            (None, Some(real)) => WaitTimeoutResult(self.real.wait_until(real, until.real()).timed_out()),
            (outcome, _) => WaitTimeoutResult(outcome == Some(Outcome::TimedOut)),
        }
    }

    /// Waits at most so long.
    #[track_caller]
    pub fn wait_for<T: ?Sized>(&self, guard: &mut MutexGuard<'_, T>, time: Duration) -> WaitTimeoutResult {
        self.wait_until(guard, Instant::now() + time)
    }
}
