//! Completions: the queues they come in, and where those report.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys as sys;
use rustix::fs::OFlags;

use super::device::Context;
use super::status::{check, text};

/// Where completion queues that were armed report.
pub(crate) struct Channel {
    raw: NonNull<sys::ibv_comp_channel>,
    context: Arc<Context>,
}

// SAFETY: libibverbs locks or needs no locks: its functions may be called from any thread.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    pub(crate) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: an open context.
        let raw = NonNull::new(unsafe { sys::ibv_create_comp_channel(context.raw()) });
        let channel = Self {
            raw: raw.ok_or_else(io::Error::last_os_error)?,
            context: Arc::clone(context),
        };
        let flags = rustix::fs::fcntl_getfl(channel.fd())?;
        rustix::fs::fcntl_setfl(channel.fd(), flags | OFlags::NONBLOCK)?;
        Ok(Arc::new(channel))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the channel, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.raw.as_ref().fd) }
    }

    /// The number of a queue that has something, if one has reported.
    pub(crate) fn next(&self) -> Option<u64> {
        let mut cq = std::ptr::null_mut();
        let mut context = std::ptr::null_mut();
        // SAFETY: a channel whose descriptor does not block, and two places for the results.
        if unsafe { sys::ibv_get_cq_event(self.raw.as_ptr(), &raw mut cq, &raw mut context) } != 0 {
            return None;
        }
        // SAFETY: the queue is there: whoever destroys it waits until its events are acknowledged.
        unsafe { sys::ibv_ack_cq_events(cq, 1) };
        Some(context as u64)
    }
}

impl AsRawFd for Channel {
    fn as_raw_fd(&self) -> i32 {
        self.fd().as_raw_fd()
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // SAFETY: queues hold an `Arc` of it, so none is left.
        if let Err(e) = check(unsafe { sys::ibv_destroy_comp_channel(self.raw.as_ptr()) }) {
            tracing::error!("free a completion channel of {}: {e}", self.context.name);
        }
    }
}

/// How one work request ended (`ibv_wc`).
#[derive(Debug, Clone)]
pub(crate) struct Wc {
    pub(crate) id: u64,
    pub(crate) qpn: u32,
    pub(crate) len: u32,
    status: u32,
}

impl Wc {
    pub(crate) fn ok(&self) -> bool {
        self.status == sys::ibv_wc_status::IBV_WC_SUCCESS
    }
    /// The target does not permit it.
    pub(crate) fn access_refused(&self) -> bool {
        self.status == sys::ibv_wc_status::IBV_WC_REM_ACCESS_ERR
    }
    pub(crate) fn reason(&self) -> String {
        // SAFETY: any number is allowed.
        text(unsafe { sys::ibv_wc_status_str(self.status) })
    }
}

pub(crate) struct Cq {
    raw: NonNull<sys::ibv_cq>,
    channel: Arc<Channel>,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Cq {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Cq {}

/// Completions taken at once.
const POLL: usize = 16;

impl Cq {
    pub(super) fn raw(&self) -> *mut sys::ibv_cq {
        self.raw.as_ptr()
    }

    /// `number` is what the channel reports.
    pub(crate) fn new(channel: &Arc<Channel>, entries: u32, number: u64) -> io::Result<Arc<Self>> {
        let entries = i32::try_from(entries).unwrap_or(i32::MAX);
        // SAFETY: an open context and a channel of it; the number is never followed as a pointer.
        let raw = unsafe {
            sys::ibv_create_cq(
                channel.context.raw(),
                entries,
                number as *mut libc::c_void,
                channel.raw.as_ptr(),
                0,
            )
        };
        Ok(Arc::new(Self {
            raw: NonNull::new(raw).ok_or_else(io::Error::last_os_error)?,
            channel: Arc::clone(channel),
        }))
    }

    /// Takes some completions; true if there may be more.
    pub(crate) fn poll(&self, into: &mut Vec<Wc>) -> io::Result<bool> {
        // SAFETY: plain data, for which zeros are a value.
        let mut wcs: [sys::ibv_wc; POLL] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is alive, the array has as many places as told.
        let n = unsafe { sys::ibv_poll_cq(self.raw.as_ptr(), POLL as i32, wcs.as_mut_ptr()) };
        let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
        into.extend(wcs.iter().take(n).map(|wc| Wc {
            id: wc.wr_id,
            qpn: wc.qp_num,
            len: wc.byte_len,
            status: wc.status,
        }));
        Ok(n == POLL)
    }

    /// The channel is to report the next completion.
    pub(crate) fn arm(&self) -> io::Result<()> {
        // SAFETY: the queue is alive.
        check(unsafe { sys::ibv_req_notify_cq(self.raw.as_ptr(), 0) })
    }
}

impl Drop for Cq {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold an `Arc` of it, so none is left.
        if let Err(e) = check(unsafe { sys::ibv_destroy_cq(self.raw.as_ptr()) }) {
            tracing::error!("free a completion queue of {}: {e}", self.channel.context.name);
        }
    }
}
