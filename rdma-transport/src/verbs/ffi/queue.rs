//! Completion queues, shared receive queues, queue pairs.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys as sys;
use rustix::fs::OFlags;
use sys::{ibv_qp_attr_mask as mask, ibv_send_flags as flag, ibv_wr_opcode as opcode};

use super::device::{Context, Pd};
use super::{access, check, text};

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

/// A completion.
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

/// A completion queue.
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

/// A shared receive queue.
pub(crate) struct Srq {
    raw: NonNull<sys::ibv_srq>,
    _pd: Arc<Pd>,
}

// SAFETY: as for `Channel`.
unsafe impl Send for Srq {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Srq {}

impl Srq {
    pub(crate) fn new(pd: &Arc<Pd>, entries: u32) -> io::Result<Arc<Self>> {
        let mut attr = sys::ibv_srq_init_attr {
            srq_context: std::ptr::null_mut(),
            attr: sys::ibv_srq_attr {
                max_wr: entries,
                max_sge: 1,
                srq_limit: 0,
            },
        };
        // SAFETY: a live protection domain and a complete description.
        let raw = NonNull::new(unsafe { sys::ibv_create_srq(pd.raw(), &raw mut attr) });
        Ok(Arc::new(Self {
            raw: raw.ok_or_else(io::Error::last_os_error)?,
            _pd: Arc::clone(pd),
        }))
    }

    /// Offers a buffer.
    pub(crate) fn post(&self, id: u64, addr: u64, len: u32, lkey: u32) -> io::Result<()> {
        let mut sge = sys::ibv_sge {
            addr,
            length: len,
            lkey,
        };
        let mut wr = sys::ibv_recv_wr {
            wr_id: id,
            next: std::ptr::null_mut(),
            sg_list: &raw mut sge,
            num_sge: 1,
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: a live queue; the lists are read before the call returns. Memory: see the module.
        check(unsafe { sys::ibv_post_srq_recv(self.raw.as_ptr(), &raw mut wr, &raw mut bad) })
    }
}

impl Drop for Srq {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold an `Arc` of it, so none is left.
        if let Err(e) = check(unsafe { sys::ibv_destroy_srq(self.raw.as_ptr()) }) {
            tracing::error!("free a shared receive queue: {e}");
        }
    }
}

/// What a queue pair was given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caps {
    pub(crate) depth: u32,
    pub(crate) inline: u32,
}

/// How a queue pair reaches its peer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Route {
    pub(crate) port: u8,
    /// Ethernet, or another subnet.
    pub(crate) global: bool,
    pub(crate) gid_index: u8,
    pub(crate) gid: [u8; 16],
    pub(crate) lid: u16,
    pub(crate) qpn: u32,
    pub(crate) psn: u32,
    pub(crate) own_psn: u32,
    pub(crate) mtu: u8,
    pub(crate) rd_atomic_source: u8,
    pub(crate) rd_atomic_target: u8,
    pub(crate) timeout: u8,
    pub(crate) retry: u8,
}

/// Local memory of a work request.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Local {
    Mem {
        addr: u64,
        len: u32,
        lkey: u32,
    },
    /// A part of the bytes given to [`Qp::post`], which are copied.
    Inline {
        off: usize,
        len: usize,
    },
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Verb {
    Read {
        addr: u64,
        rkey: u32,
    },
    Write {
        addr: u64,
        rkey: u32,
    },
    Cas {
        addr: u64,
        rkey: u32,
        expect: u64,
        new: u64,
    },
    Faa {
        addr: u64,
        rkey: u32,
        add: u64,
    },
    Send,
}

/// A work request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Post {
    pub(crate) id: u64,
    pub(crate) signal: bool,
    /// Not before earlier reads and atomics are complete.
    pub(crate) fence: bool,
    pub(crate) local: Local,
    pub(crate) verb: Verb,
}

/// A reliable-connected queue pair.
pub(crate) struct Qp {
    raw: NonNull<sys::ibv_qp>,
    pub(crate) caps: Caps,
    _pd: Arc<Pd>,
    _queues: (Arc<Cq>, Arc<Cq>, Arc<Srq>),
}

// SAFETY: as for `Channel`.
unsafe impl Send for Qp {}
// SAFETY: as for `Channel`.
unsafe impl Sync for Qp {}

impl Qp {
    pub(crate) fn new(
        pd: &Arc<Pd>,
        send: &Arc<Cq>,
        recv: &Arc<Cq>,
        srq: &Arc<Srq>,
        wanted: Caps,
    ) -> io::Result<Self> {
        let mut inline = wanted.inline;
        let (raw, caps) = loop {
            let mut attr = sys::ibv_qp_init_attr {
                qp_context: std::ptr::null_mut(),
                send_cq: send.raw.as_ptr(),
                recv_cq: recv.raw.as_ptr(),
                srq: srq.raw.as_ptr(),
                cap: sys::ibv_qp_cap {
                    max_send_wr: wanted.depth,
                    max_recv_wr: 0,
                    max_send_sge: 1,
                    max_recv_sge: 0,
                    max_inline_data: inline,
                },
                qp_type: sys::ibv_qp_type::IBV_QPT_RC,
                sq_sig_all: 0,
            };
            // SAFETY: live objects of one context and a complete description.
            match NonNull::new(unsafe { sys::ibv_create_qp(pd.raw(), &raw mut attr) }) {
                Some(raw) => break (raw, attr.cap),
                // How much can be inline nobody can be asked: the answer is whether it works.
                None if inline > 0 => inline /= 2,
                None => return Err(io::Error::last_os_error()),
            }
        };
        Ok(Self {
            raw,
            caps: Caps {
                depth: caps.max_send_wr.min(wanted.depth),
                inline: caps.max_inline_data.min(wanted.inline),
            },
            _pd: Arc::clone(pd),
            _queues: (Arc::clone(send), Arc::clone(recv), Arc::clone(srq)),
        })
    }

    pub(crate) fn number(&self) -> u32 {
        // SAFETY: a queue pair until it is dropped.
        unsafe { self.raw.as_ref().qp_num }
    }

    fn modify(&self, attr: &mut sys::ibv_qp_attr, what: mask) -> io::Result<()> {
        // SAFETY: a live queue pair; the fields named by `what` are set.
        check(unsafe { sys::ibv_modify_qp(self.raw.as_ptr(), attr, what.0.cast_signed()) })
    }

    fn attr(state: sys::ibv_qp_state::Type) -> sys::ibv_qp_attr {
        // SAFETY: plain data, for which zeros are a value.
        let mut attr: sys::ibv_qp_attr = unsafe { std::mem::zeroed() };
        attr.qp_state = state;
        attr
    }

    /// RESET to INIT.
    pub(crate) fn init(&self, port: u8) -> io::Result<()> {
        let mut attr = Self::attr(sys::ibv_qp_state::IBV_QPS_INIT);
        attr.port_num = port;
        attr.qp_access_flags =
            access::LOCAL_WRITE | access::REMOTE_READ | access::REMOTE_WRITE | access::REMOTE_ATOMIC;
        self.modify(
            &mut attr,
            mask::IBV_QP_STATE | mask::IBV_QP_PKEY_INDEX | mask::IBV_QP_PORT | mask::IBV_QP_ACCESS_FLAGS,
        )
    }

    /// INIT to RTR to RTS.
    pub(crate) fn connect(&self, route: &Route) -> io::Result<()> {
        let mut attr = Self::attr(sys::ibv_qp_state::IBV_QPS_RTR);
        attr.path_mtu = u32::from(route.mtu);
        attr.dest_qp_num = route.qpn;
        attr.rq_psn = route.psn;
        attr.max_dest_rd_atomic = route.rd_atomic_target;
        // 0.64 ms: credits make it rare.
        attr.min_rnr_timer = 12;
        attr.ah_attr.port_num = route.port;
        attr.ah_attr.dlid = route.lid;
        attr.ah_attr.is_global = u8::from(route.global);
        attr.ah_attr.grh.dgid = sys::ibv_gid { raw: route.gid };
        attr.ah_attr.grh.sgid_index = route.gid_index;
        attr.ah_attr.grh.hop_limit = 64;
        self.modify(
            &mut attr,
            mask::IBV_QP_STATE
                | mask::IBV_QP_AV
                | mask::IBV_QP_PATH_MTU
                | mask::IBV_QP_DEST_QPN
                | mask::IBV_QP_RQ_PSN
                | mask::IBV_QP_MAX_DEST_RD_ATOMIC
                | mask::IBV_QP_MIN_RNR_TIMER,
        )?;
        let mut attr = Self::attr(sys::ibv_qp_state::IBV_QPS_RTS);
        attr.timeout = route.timeout;
        attr.retry_cnt = route.retry;
        // For ever: a receiver that is out of buffers is busy, not gone.
        attr.rnr_retry = 7;
        attr.sq_psn = route.own_psn;
        attr.max_rd_atomic = route.rd_atomic_source;
        self.modify(
            &mut attr,
            mask::IBV_QP_STATE
                | mask::IBV_QP_TIMEOUT
                | mask::IBV_QP_RETRY_CNT
                | mask::IBV_QP_RNR_RETRY
                | mask::IBV_QP_SQ_PSN
                | mask::IBV_QP_MAX_QP_RD_ATOMIC,
        )
    }

    /// Posts all of them with one doorbell. `bytes` is what is inline.
    pub(crate) fn post(&self, posts: &[Post], bytes: &[u8]) -> io::Result<()> {
        let mut sges: Vec<sys::ibv_sge> = posts.iter().map(|p| sge(p, bytes)).collect();
        let mut wrs: Vec<sys::ibv_send_wr> = posts
            .iter()
            .zip(&mut sges)
            .map(|(post, sge)| work_request(post, sge))
            .collect();
        for i in 1..wrs.len() {
            let next = &raw mut wrs[i];
            wrs[i - 1].next = next;
        }
        let Some(first) = wrs.first_mut() else {
            return Ok(());
        };
        let mut bad = std::ptr::null_mut();
        // SAFETY: a live queue pair; the lists are read, and what is inline is copied, before the call returns.
        // Other memory: see the module.
        check(unsafe { sys::ibv_post_send(self.raw.as_ptr(), first, &raw mut bad) })
    }
}

fn sge(post: &Post, bytes: &[u8]) -> sys::ibv_sge {
    match post.local {
        Local::Mem { addr, len, lkey } => sys::ibv_sge {
            addr,
            length: len,
            lkey,
        },
        Local::Inline { off, len } => {
            let part = bytes.get(off..).unwrap_or_default();
            let len = len.min(part.len());
            sys::ibv_sge {
                addr: part.as_ptr() as u64,
                length: u32::try_from(len).unwrap_or(0),
                lkey: 0,
            }
        }
    }
}

fn work_request(post: &Post, sge: &mut sys::ibv_sge) -> sys::ibv_send_wr {
    // SAFETY: plain data, for which zeros are a value.
    let mut wr: sys::ibv_send_wr = unsafe { std::mem::zeroed() };
    wr.wr_id = post.id;
    wr.sg_list = sge;
    wr.num_sge = 1;
    if matches!(post.local, Local::Inline { .. }) {
        wr.send_flags |= flag::IBV_SEND_INLINE.0;
    }
    if post.signal {
        wr.send_flags |= flag::IBV_SEND_SIGNALED.0;
    }
    if post.fence {
        wr.send_flags |= flag::IBV_SEND_FENCE.0;
    }
    let rdma = |remote_addr, rkey| sys::wr_t {
        rdma: sys::rdma_t { remote_addr, rkey },
    };
    let atomic = |remote_addr, rkey, compare_add, swap| sys::wr_t {
        atomic: sys::atomic_t {
            remote_addr,
            compare_add,
            swap,
            rkey,
        },
    };
    match post.verb {
        Verb::Read { addr, rkey } => {
            wr.opcode = opcode::IBV_WR_RDMA_READ;
            wr.wr = rdma(addr, rkey);
        }
        Verb::Write { addr, rkey } => {
            wr.opcode = opcode::IBV_WR_RDMA_WRITE;
            wr.wr = rdma(addr, rkey);
        }
        Verb::Cas {
            addr,
            rkey,
            expect,
            new,
        } => {
            wr.opcode = opcode::IBV_WR_ATOMIC_CMP_AND_SWP;
            wr.wr = atomic(addr, rkey, expect, new);
        }
        Verb::Faa { addr, rkey, add } => {
            wr.opcode = opcode::IBV_WR_ATOMIC_FETCH_AND_ADD;
            wr.wr = atomic(addr, rkey, add, 0);
        }
        Verb::Send => wr.opcode = opcode::IBV_WR_SEND,
    }
    wr
}

impl Drop for Qp {
    fn drop(&mut self) {
        // SAFETY: ours, and not used after this. Waits for what is being executed of the peer.
        if let Err(e) = check(unsafe { sys::ibv_destroy_qp(self.raw.as_ptr()) }) {
            tracing::error!("free a queue pair: {e}");
        }
    }
}
