//! What a blocked caller waits on.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// A value that another thread brings.
#[derive(Debug)]
pub(crate) struct Waiter<T> {
    done: AtomicBool,
    value: Mutex<Option<T>>,
    cond: Condvar,
}

impl<T> Default for Waiter<T> {
    fn default() -> Self {
        Self {
            done: AtomicBool::new(false),
            value: Mutex::new(None),
            cond: Condvar::new(),
        }
    }
}

impl<T> Waiter<T> {
    pub(crate) fn put(&self, value: T) {
        *self.value.lock() = Some(value);
        self.done.store(true, Ordering::Release);
        self.cond.notify_one();
    }

    /// The value if it is there, without a lock if it is not.
    #[cfg_attr(not(feature = "verbs"), allow(dead_code))]
    pub(crate) fn take(&self) -> Option<T> {
        if self.done.load(Ordering::Acquire) {
            self.value.lock().take()
        } else {
            None
        }
    }

    /// The value, or None at the deadline. Looks for it for `spin` before it sleeps.
    pub(crate) fn wait(&self, spin: Duration, deadline: Instant) -> Option<T> {
        if !spin.is_zero() {
            let start = Instant::now();
            while !self.done.load(Ordering::Acquire) && start.elapsed() < spin {
                // The thread that brings the value may need this core.
                std::thread::yield_now();
            }
        }
        let mut value = self.value.lock();
        while value.is_none() {
            if self.cond.wait_until(&mut value, deadline).timed_out() {
                break;
            }
        }
        value.take()
    }
}
