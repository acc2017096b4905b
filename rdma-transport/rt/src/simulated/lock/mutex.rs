//! A mutex.

use std::ops::{Deref, DerefMut};
use std::panic::Location;

use super::{acquire, released};

/// As that of `parking_lot`.
#[derive(Default)]
pub struct Mutex<T: ?Sized> {
    real: parking_lot::Mutex<T>,
}

/// Has it locked.
pub struct MutexGuard<'a, T: ?Sized> {
    pub(super) lock: &'a Mutex<T>,
    /// None while a condition is waited for, and when that was ended.
    pub(super) real: Option<parking_lot::MutexGuard<'a, T>>,
}

impl<T> Mutex<T> {
    /// Unlocked.
    pub const fn new(value: T) -> Self {
        Self {
            real: parking_lot::Mutex::new(value),
        }
    }

    /// What is in it.
    pub fn into_inner(self) -> T {
        self.real.into_inner()
    }
}

impl<T: ?Sized> Mutex<T> {
    pub(super) fn address(&self) -> usize {
        std::ptr::from_ref(self).cast::<()>() as usize
    }

    fn guard<'a>(&'a self, real: parking_lot::MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        MutexGuard {
            lock: self,
            real: Some(real),
        }
    }

    pub(super) fn lock_real(&self, at: &'static Location<'static>) -> parking_lot::MutexGuard<'_, T> {
        acquire(self.address(), at, || self.real.try_lock()).unwrap_or_else(|| self.real.lock())
    }

    /// Waits until it is free, and takes it.
    #[track_caller]
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.guard(self.lock_real(Location::caller()))
    }

    /// Takes it if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        super::super::sched::point();
        self.real.try_lock().map(|real| self.guard(real))
    }

    /// Has somebody taken it?
    pub fn is_locked(&self) -> bool {
        self.real.is_locked()
    }

    /// What is in it, for its only owner.
    pub fn get_mut(&mut self) -> &mut T {
        self.real.get_mut()
    }
}

impl<T: ?Sized + std::fmt::Debug> std::fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.real.fmt(f)
    }
}

impl<T: ?Sized> MutexGuard<'_, T> {
    /// Does something with the mutex unlocked, and takes it again.
    #[track_caller]
    pub fn unlocked<R>(guard: &mut Self, act: impl FnOnce() -> R) -> R {
        let at = Location::caller();
        guard.real = None;
        released(guard.lock.address());
        let done = act();
        guard.real = Some(guard.lock.lock_real(at));
        done
    }
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.real.as_deref().unwrap_or_else(|| nobody())
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        if self.real.is_none() && std::thread::panicking() {
            // The thread has been ended while it had let the mutex go: what is dropped may look at what it guards. Whoever has it is
            // to have its turn, and to unlock it.
            self.real = Some(self.lock.lock_real(Location::caller()));
        }
        self.real.as_deref_mut().unwrap_or_else(|| nobody())
    }
}

fn nobody() -> ! {
    panic!("a guard is used while its condition is waited for")
}

impl<T: ?Sized> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        if self.real.take().is_some() {
            released(self.lock.address());
        }
    }
}
