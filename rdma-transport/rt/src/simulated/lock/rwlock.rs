//! A lock with readers.

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::panic::Location;

use super::{acquire, released};

/// As that of `parking_lot`.
#[derive(Default)]
pub struct RwLock<T: ?Sized> {
    real: parking_lot::RwLock<T>,
}

/// May read.
pub struct RwLockReadGuard<'a, T: ?Sized> {
    lock: &'a RwLock<T>,
    real: ManuallyDrop<parking_lot::RwLockReadGuard<'a, T>>,
}

/// May write.
pub struct RwLockWriteGuard<'a, T: ?Sized> {
    lock: &'a RwLock<T>,
    real: ManuallyDrop<parking_lot::RwLockWriteGuard<'a, T>>,
}

impl<T> RwLock<T> {
    /// Unlocked.
    pub const fn new(value: T) -> Self {
        Self {
            real: parking_lot::RwLock::new(value),
        }
    }

    /// What is in it.
    pub fn into_inner(self) -> T {
        self.real.into_inner()
    }
}

impl<T: ?Sized> RwLock<T> {
    fn address(&self) -> usize {
        std::ptr::from_ref(self).cast::<()>() as usize
    }

    /// Waits until nobody writes.
    #[track_caller]
    pub fn read(&self) -> RwLockReadGuard<'_, T> {
        let at = Location::caller();
        let real = acquire(self.address(), at, || self.real.try_read()).unwrap_or_else(|| self.real.read());
        RwLockReadGuard {
            lock: self,
            real: ManuallyDrop::new(real),
        }
    }

    /// Waits until nobody else reads or writes.
    #[track_caller]
    pub fn write(&self) -> RwLockWriteGuard<'_, T> {
        let at = Location::caller();
        let real = acquire(self.address(), at, || self.real.try_write()).unwrap_or_else(|| self.real.write());
        RwLockWriteGuard {
            lock: self,
            real: ManuallyDrop::new(real),
        }
    }

    /// What is in it, for its only owner.
    pub fn get_mut(&mut self) -> &mut T {
        self.real.get_mut()
    }
}

impl<T: ?Sized + std::fmt::Debug> std::fmt::Debug for RwLock<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.real.fmt(f)
    }
}

impl<T: ?Sized> Deref for RwLockReadGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.real
    }
}

impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.real
    }
}

impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.real
    }
}

impl<T: ?Sized> Drop for RwLockReadGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: here only, and it is not used any more.
        unsafe { ManuallyDrop::drop(&mut self.real) };
        released(self.lock.address());
    }
}

impl<T: ?Sized> Drop for RwLockWriteGuard<'_, T> {
    fn drop(&mut self) {
        // SAFETY: here only, and it is not used any more.
        unsafe { ManuallyDrop::drop(&mut self.real) };
        released(self.lock.address());
    }
}
