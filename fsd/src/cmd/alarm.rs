//! Waiting for whatever comes first: a signal, what another thread has to say, the end of a process. Whoever waits sleeps until then.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// Signals, and other threads that ring.
pub struct Alarm {
    signals: SignalDelivery<UnixStream, SignalOnly>,
    bell: Bell,
}

/// Wakes who waits for an [`Alarm`]; what there is to see is said elsewhere.
#[derive(Debug, Clone)]
pub struct Bell(Arc<UnixStream>);

impl Bell {
    /// Wakes it, or has it wait no more when it is about to.
    pub fn ring(&self) {
        let mut bell: &UnixStream = &self.0;
        // Full of what was rung before, it wakes as well.
        let _ = bell.write(&[0]);
    }
}

impl Alarm {
    /// For these signals, which do not end the process any more.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(signals: &[i32]) -> anyhow::Result<Self> {
        let new = || {
            let (read, write) = UnixStream::pair()?;
            write.set_nonblocking(true)?;
            let bell = Bell(Arc::new(write.try_clone()?));
            let signals = SignalDelivery::with_pipe(read, write, SignalOnly, signals)?;
            std::io::Result::Ok(Self { signals, bell })
        };
        new().context("signal handlers")
    }

    /// What wakes it.
    #[must_use]
    pub fn bell(&self) -> Bell {
        self.bell.clone()
    }

    /// The signals that have come since the last time. What was rung before is over: what it was for is looked at after this.
    pub fn signals(&mut self) -> impl Iterator<Item = i32> + use<> {
        self.signals.pending()
    }

    /// Waits for a signal or the bell, or until something can be read from `others`, at most for so long.
    ///
    /// # Errors
    /// The system refuses.
    pub fn wait(&self, others: &[BorrowedFd<'_>], limit: Option<Duration>) -> anyhow::Result<()> {
        let mut fds = vec![self.signals.get_read().as_fd()];
        fds.extend(others);
        wait_for(&fds, limit)
    }
}

/// Waits until something can be read somewhere, at most for so long.
///
/// # Errors
/// The system refuses.
pub fn wait_for(fds: &[BorrowedFd<'_>], limit: Option<Duration>) -> anyhow::Result<()> {
    let mut polled: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let limit = limit.map(Timespec::try_from).transpose().context("a pause")?;
    match poll(&mut polled, limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error).context("poll"),
    }
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::SIGURG;

    use super::*;

    #[test]
    fn whatever_comes_ends_the_waiting_whether_before_it_or_in_it() {
        let mut alarm = Alarm::new(&[SIGURG]).unwrap();
        alarm.bell().ring();
        alarm.wait(&[], None).unwrap();
        assert_eq!(alarm.signals().count(), 0);
        let bell = alarm.bell();
        let ringing = std::thread::spawn(move || bell.ring());
        alarm.wait(&[], None).unwrap();
        ringing.join().unwrap();
        alarm.signals().for_each(drop);
        signal_hook::low_level::raise(SIGURG).unwrap();
        alarm.wait(&[], None).unwrap();
        assert_eq!(alarm.signals().collect::<Vec<_>>(), [SIGURG]);
        let (near, far) = UnixStream::pair().unwrap();
        drop(near);
        alarm.wait(&[far.as_fd()], None).unwrap();
    }

    #[test]
    fn a_bell_that_nobody_hears_keeps_nobody_waiting() {
        let alarm = Alarm::new(&[]).unwrap();
        for _ in 0..100_000 {
            alarm.bell().ring();
        }
        alarm.wait(&[], None).unwrap();
    }
}
