//! Receive buffers, shared by all connections of an endpoint.
//!
//! Each connection may have so many fragments under way as it was given credits for, and there are buffers for
//! all of them: the queue never runs dry.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::device::Device;
use super::ffi::{Channel, Cq, Mr, Srq, Wc};
use super::region;
use super::wire::FRAGMENT;
use crate::error::TransportError;
use crate::mem::SharedMem;

/// Fragments that a peer may send before it gets credits back.
pub(super) const CREDITS: u32 = 28;
/// Buffers of a connection: beyond the credits there are at most two fragments that only bring credits, as each
/// brings at least half of them, and those that are lost with the death of a peer in the middle of a fragment.
const BUFFERS: u32 = CREDITS + 4;
/// Most receive buffers of an endpoint.
const MOST: u32 = 8192;
/// What the channel reports for the receive queue; connections are numbered from 1.
pub(super) const NUMBER: u64 = 0;

#[derive(Default)]
struct Buffers {
    slabs: Vec<Mr>,
    /// Buffers in the queue or with a completion that was not taken yet.
    posted: u32,
    /// Buffers that the connections of now may use.
    reserved: u32,
}

/// Whom what is received is for.
pub(super) trait Receiver: Send + Sync {
    /// A fragment has arrived.
    fn arrived(&self, fragment: Vec<u8>);
    /// It could not be received.
    fn broken(&self, why: TransportError);
}

/// The shared receive queue of an endpoint, with its memory and its completions.
pub(super) struct Receive {
    pub(super) srq: Arc<Srq>,
    pub(super) cq: Arc<Cq>,
    device: Arc<Device>,
    capacity: u32,
    buffers: Mutex<Buffers>,
    /// By the numbers of their queue pairs.
    receivers: RwLock<HashMap<u32, Arc<dyn Receiver>>>,
    /// Held while completions are given to their receivers: keeps their order.
    receiving: Mutex<Vec<Wc>>,
}

impl Receive {
    pub(super) fn new(device: &Arc<Device>, channel: &Arc<Channel>) -> Result<Self, TransportError> {
        let capacity = MOST.min(device.limits.max_srq_wr).min(device.limits.max_cqe);
        let os = |what: &str, e: std::io::Error| TransportError::os(what.to_owned(), &e);
        Ok(Self {
            srq: Srq::new(&device.pd, capacity).map_err(|e| os("create a shared receive queue", e))?,
            cq: Cq::new(channel, capacity, NUMBER).map_err(|e| os("create a completion queue", e))?,
            device: Arc::clone(device),
            capacity,
            buffers: Mutex::default(),
            receivers: RwLock::default(),
            receiving: Mutex::default(),
        })
    }

    /// Provides for one more connection.
    pub(super) fn reserve(&self) -> Result<(), TransportError> {
        let mut buffers = self.buffers.lock();
        if buffers.reserved + BUFFERS > self.capacity {
            return Err(TransportError::Os {
                what: "provide receive buffers for one more connection".to_owned(),
                reason: format!("{} buffers are possible, all of them are taken", self.capacity),
            });
        }
        if buffers.reserved + BUFFERS > buffers.posted {
            let count = buffers.reserved + BUFFERS - buffers.posted;
            self.add(&mut buffers, count)?;
        }
        buffers.reserved += BUFFERS;
        Ok(())
    }

    /// What comes for this queue pair is for `receiver` from now on.
    pub(super) fn add_receiver(&self, number: u32, receiver: Arc<dyn Receiver>) {
        self.receivers.write().insert(number, receiver);
    }

    /// As long as it is this one: numbers are used again.
    pub(super) fn remove_receiver(&self, number: u32, receiver: &Arc<dyn Receiver>) {
        let mut receivers = self.receivers.write();
        let same = |r: &Arc<dyn Receiver>| std::ptr::addr_eq(Arc::as_ptr(r), Arc::as_ptr(receiver));
        if receivers.get(&number).is_some_and(same) {
            receivers.remove(&number);
        }
    }

    /// Gives what has been received to its connections; true if there was something.
    pub(super) fn receive_all(&self) -> bool {
        let mut worked = false;
        let mut completions = self.receiving.lock();
        let mut more = true;
        while more {
            completions.clear();
            more = match self.cq.poll(&mut completions) {
                Ok(more) => more,
                Err(e) => {
                    tracing::error!("poll the receive queue: {e}");
                    false
                }
            };
            for wc in completions.iter() {
                worked = true;
                let receiver = self.receivers.read().get(&wc.qpn).cloned();
                match (self.take(wc), receiver) {
                    (Ok(Some(fragment)), Some(receiver)) => receiver.arrived(fragment),
                    (Ok(_), _) => {}
                    (Err(e), Some(receiver)) => receiver.broken(e),
                    (Err(e), None) => tracing::error!("{e}"),
                }
            }
        }
        worked
    }

    /// A connection has ended. If it broke, the adapter may have kept the buffer it was just filling.
    pub(super) fn release(&self, broke: bool) {
        let mut buffers = self.buffers.lock();
        buffers.reserved = buffers.reserved.saturating_sub(BUFFERS);
        if broke {
            buffers.posted = buffers.posted.saturating_sub(1);
        }
    }

    fn add(&self, buffers: &mut Buffers, count: u32) -> Result<(), TransportError> {
        let mem = Arc::new(SharedMem::anonymous(count as usize * FRAGMENT)?);
        let mr = region::local(&self.device.pd, &mem)?;
        let slab = buffers.slabs.len() as u64;
        buffers.slabs.push(mr);
        for n in 0..count {
            if let Err(e) = self.post(buffers, slab << 32 | u64::from(n)) {
                if e.raw_os_error() == Some(libc::ENOMEM) {
                    // It is full: nothing was lost that was thought to be.
                    buffers.posted = self.capacity;
                    return Ok(());
                }
                return Err(TransportError::os("offer receive buffers", &e));
            }
            buffers.posted += 1;
        }
        Ok(())
    }

    fn post(&self, buffers: &Buffers, id: u64) -> std::io::Result<()> {
        let Some((mr, off)) = find(buffers, id) else {
            return Err(std::io::Error::other("no such receive buffer"));
        };
        let at = mr.mem.address() + off as u64;
        self.srq.post(id, at, FRAGMENT as u32, mr.lkey())
    }

    /// The bytes received; the buffer is offered again.
    fn take(&self, wc: &Wc) -> Result<Option<Vec<u8>>, TransportError> {
        let buffers = self.buffers.lock();
        let mut bytes = None;
        if wc.ok() {
            let (mr, off) = find(&buffers, wc.id)
                .ok_or_else(|| TransportError::Invalid("a completion of an unknown buffer".to_owned()))?;
            let mut into = vec![0; (wc.len as usize).min(FRAGMENT)];
            mr.mem.read_at(off, &mut into)?;
            bytes = Some(into);
        }
        self.post(&buffers, wc.id)
            .map_err(|e| TransportError::os("offer a receive buffer again", &e))?;
        Ok(bytes)
    }
}

fn find(buffers: &Buffers, id: u64) -> Option<(&Mr, usize)> {
    let mr = buffers.slabs.get((id >> 32) as usize)?;
    Some((mr, (id & 0xffff_ffff) as usize * FRAGMENT))
}
