//! libibverbs behind safe types; the only place of this provider with `unsafe` in it.
//!
//! Every object keeps alive what it was made from, and is destroyed when it is dropped. What is posted names
//! memory by address and key: the adapter refuses whatever lies outside of a registered region, and a region
//! keeps its memory mapped until after it is deregistered. So no work request can reach memory that is gone.

mod device;
mod queue;

pub(super) use device::{Context, DeviceLimits, Event, Gid, Mr, Pd, PortInfo, names};
pub(super) use queue::{Caps, Channel, Cq, Local, Post, Qp, Route, Srq, Verb, Wc};

use std::io;

/// What remote sides and the adapter may do with a region.
pub(super) mod access {
    use rdma_sys::ibv_access_flags as flags;

    pub(crate) const LOCAL_WRITE: u32 = flags::IBV_ACCESS_LOCAL_WRITE.0;
    pub(crate) const REMOTE_WRITE: u32 = flags::IBV_ACCESS_REMOTE_WRITE.0;
    pub(crate) const REMOTE_READ: u32 = flags::IBV_ACCESS_REMOTE_READ.0;
    pub(crate) const REMOTE_ATOMIC: u32 = flags::IBV_ACCESS_REMOTE_ATOMIC.0;
    pub(crate) const ON_DEMAND: u32 = flags::IBV_ACCESS_ON_DEMAND.0;
}

/// A status that the verbs return as an error number.
fn check(status: i32) -> io::Result<()> {
    match status {
        0 => Ok(()),
        // Some providers return -1 and set errno, some the number with either sign.
        -1 => Err(io::Error::last_os_error()),
        n => Err(io::Error::from_raw_os_error(n.abs())),
    }
}

/// A text of libibverbs.
fn text(from: *const std::ffi::c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: libibverbs returns texts that end with a zero and live as long as what they were asked of.
    unsafe { std::ffi::CStr::from_ptr(from) }
        .to_string_lossy()
        .into_owned()
}
