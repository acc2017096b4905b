//! Each of them real or simulated, as its thread is.

mod affinity;
pub mod channel;
mod entropy;
mod lock;
mod report;
mod sched;
pub mod sim;
mod task;
pub mod thread;
pub mod time;

pub use entropy::random;

/// Locks and condition variables.
pub mod sync {
    pub use super::lock::condvar::{Condvar, WaitTimeoutResult};
    pub use super::lock::mutex::{Mutex, MutexGuard};
    pub use super::lock::rwlock::{RwLock, RwLockReadGuard, RwLockWriteGuard};
}

/// Waiting without the scheduler.
pub mod hint {
    /// Lets others run, in simulation.
    #[inline]
    pub fn spin_loop() {
        if !super::sched::give_way() {
            std::hint::spin_loop();
        }
    }
}
