//! How long to look for a completion before sleeping.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Longest time to look for a completion, if operations have not taken more than half of it lately. Between emulated
/// guests they take half a millisecond; where they take longer, processors are short and better left to others.
const LONG: Duration = Duration::from_millis(2);

/// How long operations that are waited for have taken lately, ns.
#[derive(Default)]
pub(super) struct Pace(AtomicU64);

impl Pace {
    /// Sleeping costs two changes of threads, so it is worth while to look somewhat longer than operations have taken
    /// lately, if that is not long. At least for `spin`.
    pub(super) fn patience(&self, spin: Duration) -> Duration {
        let lately = Duration::from_nanos(self.0.load(Ordering::Relaxed));
        if spin.is_zero() || lately * 2 > LONG {
            spin
        } else {
            spin.max(lately * 2)
        }
    }

    /// An operation has taken so long.
    pub(super) fn took(&self, time: Duration) {
        let now = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX).min(1 << 32);
        let before = self.0.load(Ordering::Relaxed);
        // Not exact where several do it at once, and need not be.
        self.0.store(before - before / 8 + now / 8, Ordering::Relaxed);
    }
}
