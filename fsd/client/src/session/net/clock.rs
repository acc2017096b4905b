//! The cluster's time: that of the metadata server, as far as messages tell.
//!
//! Mounts are let in whose clocks are up to two seconds apart, and give files their times. So that the times of a file do not
//! go back where it goes from one mount to another, a mount adds to its own clock what it knows to be missing. That is asked
//! anew every now and then while times are needed, for clocks are set and drift.

use std::sync::Weak;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use rt::time::Instant;

use super::Net;
use fsd_proto::ask;
use fsd_proto::clock::Skew;
use fsd_proto::wire::Time;

/// How old a comparison may be.
const FRESH: Duration = Duration::from_secs(30);

/// What is added to the host's clock.
#[derive(Debug)]
pub struct Clock {
    ahead: AtomicI64,
    began: Instant,
    /// When it was compared last, milliseconds since the beginning.
    compared: AtomicU64,
    asking: AtomicBool,
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

    fn is_old(&self) -> bool {
        let compared = Duration::from_millis(self.compared.load(Ordering::Relaxed));
        self.began.elapsed().saturating_sub(compared) > FRESH
    }

    fn now(&self) -> Time {
        Time(Time::now().0.saturating_add(self.ahead.load(Ordering::Relaxed)))
    }
}

impl Net {
    /// The time to give a file.
    #[must_use]
    pub fn now(&self) -> Time {
        if self.clock.is_old() && !self.clock.asking.swap(true, Ordering::AcqRel) {
            self.compare_again();
        }
        self.clock.now()
    }

    /// Asks for the server's time; the answer comes when it comes.
    fn compare_again(&self) {
        let me = Weak::clone(&self.me);
        let (start, sent) = (Instant::now(), Time::now());
        self.meta_async(ask::meta::Clock {}, move |answer| {
            let Some(net) = me.upgrade() else { return };
            let clock = &net.clock;
            let took = start.elapsed();
            match answer {
                // One that was asked for again on another connection says little.
                Ok(theirs) if took < Duration::from_secs(1) => {
                    clock.set(Skew::of_exchange(sent, theirs, took));
                }
                _ => clock.compared.store(
                    u64::try_from(clock.began.elapsed().as_millis()).unwrap_or(u64::MAX),
                    Ordering::Relaxed,
                ),
            }
            clock.asking.store(false, Ordering::Release);
        });
    }
}
