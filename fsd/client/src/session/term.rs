//! For how long this mount may act on what it was told.
//!
//! The metadata server declares a mount dead that it has not heard of for a term and a margin; then others get what the mount had
//! leased. So the mount answers nothing from its caches once a term has passed since it *sent* the last heartbeat that was answered:
//! it is frozen, and what is asked of it waits. Another heartbeat that is answered thaws it with all it had. It may learn instead that
//! it was declared dead; then everything fails.
//!
//! Time is that since the host was started, which goes on while the host is suspended.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rt::sync::{Condvar, Mutex};
use rt::time::{Instant, since_boot};

use fsd_proto::rpc::Errno;

/// Is told the end of the term, nanoseconds since the host was started: 0 while the mount is frozen before its end, or dead.
pub type Watcher = Box<dyn Fn(u64) + Send + Sync>;

/// See the module.
pub struct Term {
    length: Duration,
    /// Longest time that who waits for it to be renewed does so; none: for ever.
    patience: Option<Duration>,
    /// Its end, nanoseconds since the host was started.
    end: AtomicU64,
    /// Frozen before its end: the kernel's caches are being dropped, and must not be filled again.
    early: AtomicBool,
    /// This life has been declared dead.
    over: AtomicBool,
    /// Guards the sleep of those who wait, and changes: whoever watches sees them in the order in which they were made.
    waiting: Mutex<()>,
    changed: Condvar,
    watcher: OnceLock<Watcher>,
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Term {
    /// One that began at a time since the host was started, when the last sign of life was sent that has been answered. Past its end,
    /// requests wait for a new one, at most for `patience`, or for ever.
    #[must_use]
    pub fn new(length: Duration, began: Duration, patience: Option<Duration>) -> Self {
        Self {
            length,
            patience,
            end: AtomicU64::new(nanos(began + length)),
            early: AtomicBool::new(false),
            over: AtomicBool::new(false),
            waiting: Mutex::new(()),
            changed: Condvar::new(),
            watcher: OnceLock::new(),
        }
    }

    /// Has one who cannot ask told when the term ends: now, and whenever that changes. The first one only.
    pub fn watch(&self, watcher: Watcher) {
        let _guard = self.waiting.lock();
        let _ = self.watcher.set(watcher);
        self.tell();
    }

    /// With `waiting` locked. Those who wait are woken after it: what they are about to answer is of a term that is known.
    fn tell(&self) {
        if let Some(watcher) = self.watcher.get() {
            let ended = self.early.load(Ordering::Acquire) || self.is_over();
            watcher(if ended {
                0
            } else {
                self.end.load(Ordering::Acquire)
            });
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
        let _guard = self.waiting.lock();
        let end = nanos(sent + self.length).max(self.end.load(Ordering::Acquire));
        self.end.store(end, Ordering::Release);
        self.early.store(false, Ordering::Release);
        self.tell();
        self.changed.notify_all();
    }

    /// Nothing is answered until the next heartbeat is.
    pub fn freeze(&self) {
        let _guard = self.waiting.lock();
        self.early.store(true, Ordering::Release);
        self.tell();
    }

    /// This life has been declared dead. True: for the first time.
    pub fn finish(&self) -> bool {
        let _guard = self.waiting.lock();
        let first = !self.over.swap(true, Ordering::AcqRel);
        self.tell();
        self.changed.notify_all();
        first
    }

    /// Waits while the mount is frozen.
    ///
    /// # Errors
    /// `EIO`: it has been declared dead. `ETIMEDOUT`: it has been waited for long enough.
    pub fn hold(&self) -> Result<(), Errno> {
        if self.is_valid() {
            return Ok(());
        }
        let deadline = self.patience.map(|patience| Instant::now() + patience);
        let mut guard = self.waiting.lock();
        while !self.is_valid() {
            if self.is_over() {
                return Err(Errno(libc::EIO));
            }
            match deadline {
                Some(deadline) if self.changed.wait_until(&mut guard, deadline).timed_out() => {
                    return Err(Errno(libc::ETIMEDOUT));
                }
                Some(_) => {}
                None => self.changed.wait(&mut guard),
            }
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
        let term = Term::new(Duration::from_secs(100), since_boot(), None);
        assert!(term.is_valid());
        let now = since_boot();
        term.renew(now + Duration::from_secs(50));
        assert!(term.left() > Duration::from_secs(140));
        // An earlier one that is answered late takes nothing away.
        term.renew(now);
        assert!(term.left() > Duration::from_secs(140));
    }

    #[test]
    fn who_watches_is_told_every_end() {
        let (term, told) = (
            Term::new(Duration::from_secs(5), since_boot(), None),
            Arc::new(Mutex::new(Vec::new())),
        );
        let ends = Arc::clone(&told);
        term.watch(Box::new(move |end| ends.lock().push(end)));
        let sent = since_boot() + Duration::from_secs(1);
        term.renew(sent);
        term.freeze();
        term.renew(sent);
        term.finish();
        // A late answer brings nobody back to life.
        term.renew(sent);
        let later = nanos(sent + Duration::from_secs(5));
        let told = told.lock();
        assert_eq!(told[1..], [later, 0, later, 0, 0]);
        assert!(told[0] > 0 && told[0] < later);
    }

    #[test]
    fn a_frozen_mount_waits_until_it_is_heard_or_dead() {
        for dead in [false, true] {
            let term = Arc::new(Term::new(Duration::ZERO, since_boot(), None));
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
