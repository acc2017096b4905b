//! Shared receive queues and queue pairs.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rdma_sys as sys;
use sys::{ibv_qp_attr_mask as mask, ibv_send_flags as flag, ibv_wr_opcode as opcode};

use super::completions::Cq;
use super::device::Pd;
use super::status::{access, check};

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
    pub(crate) rd_atomic: RdAtomic,
    pub(crate) timeout: u8,
    pub(crate) retry: u8,
}

/// Reads and atomics that may be under way at a time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RdAtomic {
    /// From here.
    pub(crate) source: u8,
    /// From the peer.
    pub(crate) target: u8,
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
                send_cq: send.raw(),
                recv_cq: recv.raw(),
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
        attr.max_dest_rd_atomic = route.rd_atomic.target;
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
        attr.max_rd_atomic = route.rd_atomic.source;
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
