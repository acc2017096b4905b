//! Where a request runs, and whether it may wait.
//!
//! A request starts on a FUSE event loop. While everything it needs is at hand it runs there to its end.
//! When it has to wait (for a lease, a peer, the storage) it may do so on the event loop as long as enough
//! other loops remain to serve the kernel; otherwise it stops with [`Stop::Park`] before it has changed
//! anything, and starts again on a worker thread. So there is always a loop that answers, which
//! revocations depend on.

use std::sync::atomic::{AtomicUsize, Ordering};

use rt::sync::{Mutex, MutexGuard};

use fsd_proto::rpc::{Errno, RpcError};

/// Why a request did not come to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It must wait, but not here.
    Park,
    /// It failed.
    Errno(Errno),
}

impl Stop {
    /// The error for what a request cannot do.
    #[must_use]
    pub fn errno(self) -> Errno {
        match self {
            Self::Errno(e) => e,
            Self::Park => Errno(libc::EAGAIN),
        }
    }
}

/// Result of a step of a request.
pub type Res<T> = Result<T, Stop>;

impl From<Errno> for Stop {
    fn from(e: Errno) -> Self {
        Self::Errno(e)
    }
}

impl From<RpcError> for Stop {
    fn from(error: RpcError) -> Self {
        Self::Errno(error.errno())
    }
}

/// A refusal with an error number.
pub fn fail<T>(number: i32) -> Res<T> {
    Err(Stop::Errno(Errno(number)))
}

/// There is no space for it.
#[must_use]
pub fn is_full<T>(result: &Res<T>) -> bool {
    matches!(result, Err(Stop::Errno(Errno(libc::ENOSPC))))
}

/// Counts the event loops that may still wait.
#[derive(Debug)]
pub struct Permits(AtomicUsize);

impl Permits {
    /// `loops` event loops, of which `spare` must never wait.
    #[must_use]
    pub fn new(loops: usize, spare: usize) -> Self {
        Self(AtomicUsize::new(loops.saturating_sub(spare)))
    }

    fn take(&self) -> bool {
        self.0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1))
            .is_ok()
    }
}

/// The right of one request to wait, or to ask for it.
pub struct Ctx<'a> {
    permits: Option<&'a Permits>,
    holds: std::cell::Cell<bool>,
    /// Is told when it waits for the first time.
    on_wait: std::cell::Cell<Option<&'a dyn Fn()>>,
}

impl<'a> Ctx<'a> {
    /// On an event loop.
    #[must_use]
    pub fn on_loop(permits: &'a Permits) -> Self {
        Self {
            permits: Some(permits),
            holds: std::cell::Cell::new(false),
            on_wait: std::cell::Cell::new(None),
        }
    }

    /// Is the request served on the event loop that has read it?
    #[must_use]
    pub const fn is_on_loop(&self) -> bool {
        self.permits.is_some()
    }

    /// Has `on_wait` told when it waits for the first time.
    #[must_use]
    pub fn telling(self, on_wait: &'a dyn Fn()) -> Self {
        self.on_wait.set(Some(on_wait));
        self
    }

    /// On a worker thread: may always wait.
    #[must_use]
    pub fn on_worker() -> Ctx<'static> {
        Ctx {
            permits: None,
            holds: std::cell::Cell::new(false),
            on_wait: std::cell::Cell::new(None),
        }
    }

    /// Locks what another thread may have locked for as long as it waits for a server.
    ///
    /// # Errors
    /// Park, where another thread has it and waiting is not allowed here.
    pub fn lock<'m, T>(&self, mutex: &'m Mutex<T>) -> Res<MutexGuard<'m, T>> {
        if let Some(locked) = mutex.try_lock() {
            return Ok(locked);
        }
        self.may_wait()?;
        Ok(mutex.lock())
    }

    /// To be called before waiting.
    ///
    /// # Errors
    /// [`Stop::Park`]: not here.
    pub fn may_wait(&self) -> Res<()> {
        if let Some(on_wait) = self.on_wait.take() {
            on_wait();
        }
        match self.permits {
            Some(permits) if !self.holds.get() => {
                if permits.take() {
                    self.holds.set(true);
                    Ok(())
                } else {
                    Err(Stop::Park)
                }
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Ctx<'_> {
    fn drop(&mut self) {
        if let (Some(permits), true) = (self.permits, self.holds.get()) {
            permits.0.fetch_add(1, Ordering::AcqRel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_loop_always_stays_free() {
        let permits = Permits::new(3, 1);
        let (a, b, c) = (
            Ctx::on_loop(&permits),
            Ctx::on_loop(&permits),
            Ctx::on_loop(&permits),
        );
        assert_eq!(a.may_wait(), Ok(()));
        assert_eq!(a.may_wait(), Ok(()));
        assert_eq!(b.may_wait(), Ok(()));
        assert_eq!(c.may_wait(), Err(Stop::Park));
        drop(a);
        assert_eq!(c.may_wait(), Ok(()));
        assert_eq!(Ctx::on_worker().may_wait(), Ok(()));
    }
}
