//! What libibverbs returns and is given, as Rust has it.

use std::io;

/// What remote sides and the adapter may do with a region.
pub(crate) mod access {
    use rdma_sys::ibv_access_flags as flags;

    pub(crate) const LOCAL_WRITE: u32 = flags::IBV_ACCESS_LOCAL_WRITE.0;
    pub(crate) const REMOTE_WRITE: u32 = flags::IBV_ACCESS_REMOTE_WRITE.0;
    pub(crate) const REMOTE_READ: u32 = flags::IBV_ACCESS_REMOTE_READ.0;
    pub(crate) const REMOTE_ATOMIC: u32 = flags::IBV_ACCESS_REMOTE_ATOMIC.0;
    pub(crate) const ON_DEMAND: u32 = flags::IBV_ACCESS_ON_DEMAND.0;
}

/// A status that the verbs return as an error number.
pub(super) fn check(status: i32) -> io::Result<()> {
    match status {
        0 => Ok(()),
        // Some providers return -1 and set errno, some the number with either sign.
        -1 => Err(io::Error::last_os_error()),
        n => Err(io::Error::from_raw_os_error(n.abs())),
    }
}

/// A text of libibverbs.
pub(super) fn text(from: *const std::ffi::c_char) -> String {
    if from.is_null() {
        return String::new();
    }
    // SAFETY: libibverbs returns texts that end with a zero and live as long as what they were asked of.
    unsafe { std::ffi::CStr::from_ptr(from) }
        .to_string_lossy()
        .into_owned()
}
