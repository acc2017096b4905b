//! For how long this mount may act on what it was told.
//!
//! The metadata server declares a mount dead that it has not heard of for a term and a margin; then others get what the mount had
//! leased. So the mount answers nothing from its caches once a term has passed since it *sent* the last heartbeat that was answered:
//! it is frozen, and what is asked of it waits. Another heartbeat that is answered thaws it with all it had. It may learn instead that
//! it was declared dead; then everything fails.
//!
//! Time is that since the host was started, which goes on while the host is suspended.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::since_boot;

use fsd_proto::rpc::Errno;

/// See the module.
pub struct Term {
    length: Duration,
    /// Its end, nanoseconds since the host was started.
    end: AtomicU64,
    /// Frozen before its end: the kernel's caches are being dropped, and must not be filled again.
    early: AtomicBool,
    /// This life has been declared dead.
    over: AtomicBool,
    /// Guards nothing but the sleep of those who wait.
    waiting: Mutex<()>,
    changed: Condvar,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Term {
    /// One that begins now.
    #[must_use]
    pub fn new(length: Duration) -> Self {
        Self {
            length,
            end: AtomicU64::new(nanos(since_boot() + length)),
            early: AtomicBool::new(false),
            over: AtomicBool::new(false),
            waiting: Mutex::new(()),
            changed: Condvar::new(),
        }
    }

    /// May this mount act?
    #[must_use]
    pub fn is_valid(&self) -> bool {
        nanos(since_boot()) < self.end.load(Ordering::Acquire)
            && !self.early.load(Ordering::Acquire)
            && !self.is_over()
    }

    /// Has it been declared dead?
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// What is left of it.
    #[must_use]
    pub fn left(&self) -> Duration {
        Duration::from_nanos(
            self.end
                .load(Ordering::Acquire)
                .saturating_sub(nanos(since_boot())),
        )
    }

    /// A heartbeat that was sent at `sent`, time since the host was started, has been answered.
    pub fn renew(&self, sent: Duration) {
        self.end.fetch_max(nanos(sent + self.length), Ordering::AcqRel);
        self.early.store(false, Ordering::Release);
        self.wake();
    }

    /// Nothing is answered until the next heartbeat is.
    pub fn freeze(&self) {
        self.early.store(true, Ordering::Release);
    }

    /// This life has been declared dead. True: for the first time.
    pub fn finish(&self) -> bool {
        let first = !self.over.swap(true, Ordering::AcqRel);
        self.wake();
        first
    }

    fn wake(&self) {
        let _guard = self.waiting.lock();
        self.changed.notify_all();
    }

    /// Waits while the mount is frozen.
    ///
    /// # Errors
    /// `EIO`: it has been declared dead.
    pub fn hold(&self) -> Result<(), Errno> {
        if self.is_valid() {
            return Ok(());
        }
        let mut guard = self.waiting.lock();
        while !self.is_valid() {
            if self.is_over() {
                return Err(Errno(libc::EIO));
            }
            self.changed.wait(&mut guard);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_heartbeat_counts_from_when_it_was_sent() {
        let term = Term::new(Duration::from_secs(100));
        assert!(term.is_valid());
        let now = since_boot();
        term.renew(now + Duration::from_secs(50));
        assert!(term.left() > Duration::from_secs(140));
        // An earlier one that is answered late takes nothing away.
        term.renew(now);
        assert!(term.left() > Duration::from_secs(140));
    }

    #[test]
    fn a_frozen_mount_waits_until_it_is_heard_or_dead() {
        for dead in [false, true] {
            let term = Arc::new(Term::new(Duration::ZERO));
            assert!(!term.is_valid());
            let waiting = Arc::clone(&term);
            let held = std::thread::spawn(move || waiting.hold());
            if dead {
                assert!(term.finish() && !term.finish());
                term.renew(since_boot() + Duration::from_secs(9));
            } else {
                term.renew(since_boot() + Duration::from_secs(9));
            }
            assert_eq!(held.join().unwrap().is_err(), dead);
            assert_eq!(term.is_valid(), !dead);
        }
    }
}
