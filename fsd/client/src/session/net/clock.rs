//! The cluster's time: that of the metadata server, as far as messages tell.
//!
//! Mounts are let in whose clocks are up to two seconds apart, and give files their times. So that the times of a file do not
//! go back where it goes from one mount to another, a mount adds to its own clock what it knows to be missing. That is asked
//! anew every now and then while times are needed, for clocks are set and drift.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use rt::time::Instant;

use fsd_proto::clock::Skew;
use fsd_proto::wire::Time;

/// How old a comparison may be.
const FRESH: Duration = Duration::from_secs(30);

/// What is added to the host's clock.
#[derive(Debug)]
pub struct Clock {
    pub(super) ahead: AtomicI64,
    pub(super) began: Instant,
    /// When it was compared last, milliseconds since the beginning.
    pub(super) compared: AtomicU64,
    pub(super) asking: AtomicBool,
}

impl Default for Clock {
    fn default() -> Self {
        Self {
            ahead: AtomicI64::new(0),
            began: Instant::now(),
            compared: AtomicU64::new(0),
            asking: AtomicBool::new(false),
        }
    }
}

impl Clock {
    /// The clocks have been compared.
    pub(super) fn set(&self, skew: Skew) {
        self.ahead.store(skew.estimate(), Ordering::Relaxed);
        let now = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.compared.store(now, Ordering::Relaxed);
    }

    pub(super) fn is_old(&self) -> bool {
        let compared = Duration::from_millis(self.compared.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(compared) > FRESH
    }

    pub(super) fn now(&self) -> Time {
        Time(Time::now().0.saturating_add(self.ahead.load(Ordering::Relaxed)))
    }
}
