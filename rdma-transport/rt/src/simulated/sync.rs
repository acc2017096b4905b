//! Locks and condition variables.

pub use super::lock::condvar::{Condvar, WaitTimeoutResult};
pub use super::lock::mutex::{Mutex, MutexGuard};
pub use super::lock::rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
