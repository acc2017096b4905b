//! Errors of writes that were acknowledged before they failed. Pure.

use std::sync::atomic::{AtomicU64, Ordering};

use rt::sync::Mutex;

use fsd_proto::rpc::Errno;

/// The error sequence of a file, as errseq_t of Linux: an error of a write that was acknowledged before it failed is reported once
/// by each open file.
#[derive(Debug, Default)]
pub struct ErrorSequence(Mutex<(u64, Option<Errno>)>);

impl ErrorSequence {
    /// Notes an error.
    pub fn set(&self, error: Errno) {
        let mut sequence = self.0.lock();
        sequence.0 += 1;
        sequence.1 = Some(error);
    }

    /// Number of errors so far; what a newly opened file has seen.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.0.lock().0
    }

    /// What there is to be told: how many errors there were, and the last one.
    #[must_use]
    pub fn all(&self) -> (u64, Option<Errno>) {
        *self.0.lock()
    }

    /// Goes on from what another sequence of the same file has said.
    pub fn go_on_from(&self, (count, last): (u64, Option<Errno>)) {
        *self.0.lock() = (count, last);
    }

    /// An error this file has not been told yet.
    ///
    /// # Errors
    /// The last error, if this handle has not reported it.
    pub fn check(&self, seen: &AtomicU64) -> Result<(), Errno> {
        let sequence = self.0.lock();
        match sequence.1 {
            Some(error) if seen.swap(sequence.0, Ordering::AcqRel) < sequence.0 => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`Self::check`]; it stays untold.
    ///
    /// # Errors
    /// The last error, if this handle has not reported it.
    pub fn peek(&self, seen: &AtomicU64) -> Result<(), Errno> {
        let sequence = self.0.lock();
        match sequence.1 {
            Some(error) if seen.load(Ordering::Acquire) < sequence.0 => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_open_file_hears_of_an_error_once() {
        let errors = ErrorSequence::default();
        let (a, b) = (AtomicU64::new(errors.seen()), AtomicU64::new(errors.seen()));
        errors.set(Errno(libc::ENOSPC));
        let late = AtomicU64::new(errors.seen());
        assert_eq!(errors.check(&a), Err(Errno(libc::ENOSPC)));
        assert_eq!(errors.check(&a), Ok(()));
        assert_eq!(errors.check(&b), Err(Errno(libc::ENOSPC)));
        assert_eq!(errors.check(&late), Ok(()));
    }
}
