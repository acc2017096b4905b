//! What a role and who has started it tell each other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::Context;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use fsd_client::Mounted;

/// Set by `fsd dev`, and by a keeper, for its children: they end when it dies.
pub const PARENT_ENV: &str = "FSD_PARENT";
/// Set for the next life of a mount: what the one before has left mounted.
pub const FORMER_ENV: &str = "FSD_FORMER";
/// Set for a process that is to replace a mount's daemon: its standard input is a socket to that.
pub const SUCCESSOR_ENV: &str = "FSD_SUCCESSOR";

/// A process whose end is this one's: it was started by a predecessor, not by that, so no signal tells.
#[derive(Debug, Default)]
pub struct Followed(Option<OwnedFd>);

impl Followed {
    /// What can be read from when it has ended.
    #[must_use]
    pub fn process(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(AsFd::as_fd)
    }

    /// Has it ended?
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let at_once = Timespec::default();
        self.0.as_ref().is_some_and(|process| {
            let mut polled = [PollFd::new(process, PollFlags::IN)];
            poll(&mut polled, Some(&at_once)).is_ok_and(|count| count > 0)
        })
    }
}

/// Arranges for a signal when the parent dies, if we are a child of `fsd dev` or of a keeper. What is to be looked at by who is not their child,
/// but a successor of one.
///
/// # Errors
/// The system refuses, or the parent has died already.
pub fn follow_parent(signal: rustix::process::Signal) -> anyhow::Result<Followed> {
    let parent = std::env::var(PARENT_ENV).ok().and_then(|p| p.parse::<i32>().ok());
    let Some(parent) = parent.and_then(Pid::from_raw) else {
        return Ok(Followed::default());
    };
    if predecessor().is_none() {
        rustix::process::set_parent_process_death_signal(Some(signal)).context("prctl")?;
    }
    if rustix::process::getppid() == Some(parent) {
        return Ok(Followed::default());
    }
    let process = pidfd_open(parent, PidfdFlags::empty()).context("the parent has died already")?;
    Ok(Followed(Some(process)))
}

/// Tells systemd, or `fsd dev`, that we are ready.
pub fn ready(what: &str) {
    if let Err(error) = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]) {
        tracing::debug!("readiness not told: {error}");
    }
    tracing::info!("{what}");
}

/// What a former life of this process has left mounted, if this is not the first.
#[must_use]
pub fn former() -> Option<Mounted> {
    Mounted::from_text(&std::env::var(FORMER_ENV).ok()?)
}

/// The socket to the daemon that this process is to replace, if so.
#[must_use]
pub fn predecessor() -> Option<UnixStream> {
    std::env::var_os(SUCCESSOR_ENV)?;
    let stream = std::io::stdin().as_fd().try_clone_to_owned().ok()?;
    Some(stream.into())
}
