//! A session for a kernel that has shaken hands with another process.
//!
//! The library shakes hands over the descriptor that it then keeps. So it is given a socket with the kernel's first INIT in it, and the device
//! is put over the number of that socket afterwards.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::net::{SendFlags, send};

use super::descriptors::put_over;
use super::handshake::Handshake;
use super::loops::Loops;
use super::made_up::pair;
use fsd_proto::rpc::Errno;

/// A session that reads from a device, whose kernel has shaken hands like this. It reads nothing before it is spawned.
///
/// # Errors
/// The system refuses; this program would have asked something else of the kernel.
pub fn take_over<F: fuser::Filesystem>(
    files: F,
    loops: &Loops,
    device: impl AsFd,
    before: Handshake,
    config: fuser::Config,
) -> io::Result<fuser::Session<F>> {
    let (near, far) = pair()?;
    let number = far.as_raw_fd();
    send(&near, &before.message(), SendFlags::NOSIGNAL)?;
    let session = fuser::Session::from_fd(files, far, config.acl, config)?;
    if loops.handshake.get() != Some(&before) {
        return Err(io::Error::other(format!(
            "it was mounted with other settings ({before:x?}, now {:x?}): unmount it, and mount it anew",
            loops.handshake.get()
        )));
    }
    put_over(device, number)?;
    Ok(session)
}

/// Answers a request by its number, with a result or none, on the one of these descriptors that it was read from: the kernel
/// knows it on no other.
pub fn answer(devices: &[OwnedFd], unique: u64, result: Result<(), Errno>) {
    const HEADER: u32 = 16;
    let error = result.err().map_or(0, |errno| -errno.0);
    let mut message = Vec::with_capacity(HEADER as usize);
    message.extend(HEADER.to_ne_bytes());
    message.extend(error.to_ne_bytes());
    message.extend(unique.to_ne_bytes());
    if !devices
        .iter()
        .any(|device| rustix::io::write(device, &message).is_ok())
    {
        tracing::warn!("a request of a predecessor is not known any more");
    }
}
