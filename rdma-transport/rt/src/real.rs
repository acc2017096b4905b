//! The real things, by their names here.

pub use rand::random;

/// Locks and condition variables.
pub mod sync {
    pub use parking_lot::{
        Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, WaitTimeoutResult,
    };
}

/// Channels.
pub mod channel {
    use std::time::Duration;

    pub use crossbeam::channel::{
        Receiver, RecvError, RecvTimeoutError, SendError, Sender, TryRecvError, TrySendError, bounded,
        unbounded,
    };

    /// What came first.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Either<A, B> {
        /// From the first channel.
        First(Result<A, RecvError>),
        /// From the second.
        Second(Result<B, RecvError>),
        /// Nothing in time.
        Neither,
    }

    /// Receives from the one of two channels that has something, or has lost its senders.
    pub fn recv_either<A, B>(first: &Receiver<A>, second: &Receiver<B>, timeout: Duration) -> Either<A, B> {
        crossbeam::channel::select! {
            recv(first) -> got => Either::First(got),
            recv(second) -> got => Either::Second(got),
            default(timeout) => Either::Neither,
        }
    }
}

/// Threads.
pub mod thread {
    pub use std::thread::{Builder, JoinHandle, sleep, spawn, yield_now};
}

/// Time.
pub mod time {
    use std::time::Duration;

    pub use std::time::Instant;

    /// Time since the host was started, while it was suspended, too.
    #[must_use]
    pub fn since_boot() -> Duration {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        // The kernel gives neither negative seconds nor more nanoseconds than a second has.
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32)
    }

    /// Time that passes for all alike, whatever their clocks show in simulation; since any moment.
    #[must_use]
    pub fn for_all() -> Duration {
        since_boot()
    }

    /// What the clock on the wall says.
    #[must_use]
    pub fn system_now() -> std::time::SystemTime {
        std::time::SystemTime::now()
    }
}

/// Waiting without the scheduler.
pub mod hint {
    pub use std::hint::spin_loop;
}
