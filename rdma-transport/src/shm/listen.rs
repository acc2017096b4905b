//! The listening socket and the lock that goes with it.

use std::os::fd::OwnedFd;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::control;
use crate::error::TransportError;

/// Binds the socket, replacing one that a dead process has left behind.
pub(super) fn listen(path: &str) -> Result<(OwnedFd, OwnedFd), TransportError> {
    let in_use = || TransportError::AddressInUse {
        addr: path.to_owned(),
    };
    let os = |what: &str, e: Errno| TransportError::os(format!("{what} {path}"), &e.into());
    let address = control::address(path)?;
    // The lock file decides between processes that start at the same time; the kernel drops the lock when
    // its holder dies, however that happens.
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
    let lock = rustix::fs::open(format!("{path}.lock"), flags, Mode::RUSR | Mode::WUSR)
        .map_err(|e| os("create the lock file of", e))?;
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(in_use()),
        Err(e) => return Err(os("lock", e)),
    }
    let sock = control::socket()?;
    match rustix::net::bind(&sock, &address) {
        Ok(()) => {}
        Err(Errno::ADDRINUSE) => {
            match rustix::net::connect(control::socket()?, &address) {
                Err(Errno::CONNREFUSED) => {}
                _ => return Err(in_use()),
            }
            rustix::fs::unlink(path).map_err(|e| os("remove the stale socket", e))?;
            rustix::net::bind(&sock, &address).map_err(|e| os("listen on", e))?;
        }
        Err(e) => return Err(os("listen on", e)),
    }
    rustix::net::listen(&sock, 128).map_err(|e| os("listen on", e))?;
    Ok((sock, lock))
}
