//! The process at the other end of a connection, which executes its operations on our memory itself.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::common;
use crate::error::TransportError;

/// Longest time that a process takes to end when it is killed: the kernel may be writing its memory out.
const ENDING: Duration = Duration::from_secs(30);

/// A process, for which its number stands no longer than it lives.
#[derive(Debug)]
pub(super) struct Executor {
    pid: Pid,
    handle: OwnedFd,
}

impl Executor {
    /// The process that has connected a socket. Its number can be another one's only if it has ended before it says anything more, so
    /// whoever goes on with the handshake has the right one. None: it has none here, because it is in another name space.
    pub(super) fn of(sock: BorrowedFd<'_>) -> Option<Self> {
        let pid = rustix::net::sockopt::socket_peercred(sock).ok()?.pid;
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty()).ok()?;
        Some(Self { pid, handle })
    }

    /// Is it this process?
    pub(super) fn is_this(&self) -> bool {
        self.pid == rustix::process::getpid()
    }

    /// Ends it, and waits until it has ended.
    pub(super) fn end(&self) -> Result<(), TransportError> {
        let what = || format!("end process {}", self.pid.as_raw_nonzero());
        match rustix::process::pidfd_send_signal(&self.handle, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(e) => return Err(TransportError::os(what(), &e.into())),
        }
        // Readable once it has ended.
        match common::wait(
            std::os::fd::AsFd::as_fd(&self.handle),
            PollFlags::IN,
            Instant::now() + ENDING,
        ) {
            Ok(true) => Ok(()),
            Ok(false) => Err(TransportError::Os {
                what: what(),
                reason: format!("it is still there after {} s", ENDING.as_secs()),
            }),
            Err(e) => Err(TransportError::os(what(), &e.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn this_process_is_known_as_such() {
        let (a, _b) = UnixStream::pair().unwrap();
        assert!(Executor::of(a.as_fd()).is_some_and(|e| e.is_this()));
    }

    #[test]
    fn a_process_is_ended_even_if_it_is_stopped() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let pid = Pid::from_child(&child);
        rustix::process::kill_process(pid, Signal::STOP).unwrap();
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
        let executor = Executor { pid, handle };
        executor.end().unwrap();
        assert!(!child.wait().unwrap().success());
        // It is no error that it has gone.
        executor.end().unwrap();
    }
}
