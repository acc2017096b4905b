//! The process at the other end of a connection, which executes its operations on our memory itself.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::common;
use crate::error::TransportError;

/// Longest time that a process takes to end when it is killed: the kernel may be writing its memory out.
const ENDING: Duration = Duration::from_secs(30);

/// By what a later process finds a process again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Trace {
    /// 0: it is not known.
    pub(super) pid: u64,
    /// When it was started, in ticks since the host was.
    pub(super) started: u64,
    /// The name space in which the number is its own.
    pub(super) names: u64,
}

/// When the process of a number was started.
fn started(pid: Pid) -> std::io::Result<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    // The name of the program, in parentheses, may have anything in it.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    fields
        .and_then(|mut fields| fields.nth(19)?.parse().ok())
        .ok_or_else(|| std::io::Error::other("/proc says nothing that is understood"))
}

/// The name space of this process's numbers.
fn names() -> std::io::Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/pid")?.ino())
}

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

    /// By what a later process finds it again; none if it has ended.
    pub(super) fn trace(&self) -> Option<Trace> {
        let trace = Trace {
            pid: u64::try_from(self.pid.as_raw_nonzero().get()).ok()?,
            started: started(self.pid).ok()?,
            names: names().ok()?,
        };
        // The number was its own all the while if it has not ended yet.
        (!self.has_ended(Instant::now()).ok()?).then_some(trace)
    }

    /// The process that left this trace; none if it has ended.
    ///
    /// # Errors
    /// It is not known which one that is.
    pub(super) fn again(trace: Trace) -> Result<Option<Self>, TransportError> {
        let what = || format!("find process {} again", trace.pid);
        let os = |e: std::io::Error| TransportError::os(what(), &e);
        let unknown = |reason: &str| TransportError::Os {
            what: what(),
            reason: reason.to_owned(),
        };
        let pid = i32::try_from(trace.pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| unknown("it was not seen in the name space of that process"))?;
        if names().map_err(os)? != trace.names {
            return Err(unknown("its number is of another name space"));
        }
        let handle = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(handle) => handle,
            Err(Errno::SRCH) => return Ok(None),
            Err(e) => return Err(os(e.into())),
        };
        match started(pid) {
            Ok(started) => Ok((started == trace.started).then_some(Self { pid, handle })),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(os(e)),
        }
    }

    fn has_ended(&self, deadline: Instant) -> Result<bool, Errno> {
        // Readable once it has ended.
        common::wait(self.handle.as_fd(), PollFlags::IN, deadline)
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
        match self.has_ended(Instant::now() + ENDING) {
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
        let trace = executor.trace().unwrap();
        let of_another = Trace {
            started: trace.started + 1,
            ..trace
        };
        assert!(Executor::again(of_another).unwrap().is_none());
        let elsewhere = Trace {
            names: trace.names + 1,
            ..trace
        };
        assert!(Executor::again(elsewhere).is_err() && Executor::again(Trace::default()).is_err());
        let executor = Executor::again(trace).unwrap().unwrap();
        executor.end().unwrap();
        assert!(!child.wait().unwrap().success());
        // Whoever has its number now is another one.
        assert!(Executor::again(trace).unwrap().is_none());
        // It is no error that it has gone.
        executor.end().unwrap();
    }
}
