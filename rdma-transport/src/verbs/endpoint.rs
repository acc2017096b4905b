//! The endpoint: device, listener, registered regions.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;

use mio::Waker;
use parking_lot::{Mutex, RwLock};
use rustix::net::Shutdown;

use super::cells::Cells;
use super::conn::VerbsConn;
use super::device::{self, Device};
use super::ffi::{Channel, Mr, Pd, Wc};
use super::progress;
use super::receive::Receive;
use super::region;
use super::unit::Due;
use super::wire::{Control, Place};
use crate::base::{Base, Endpoint};
use crate::buffer::{Buffer, BufferPool, Registration};
use crate::common::{self, LIMITS};
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::stream;
use crate::{
    Access, Connection, Fabric, FabricConfig, FabricKind, FabricStats, Handler, Limits, RegionKey,
    TransportError, VerbsOptions,
};

/// A peer has proved itself: its older connections are to be ended before it gets a new one.
pub(super) struct Replace {
    pub(super) peer: Peer,
    pub(super) done: SyncSender<()>,
}

pub(super) struct Core {
    pub(super) base: Base<Arc<VerbsConn>>,
    pub(super) options: VerbsOptions,
    pub(super) local: SocketAddr,
    local_addr: String,
    /// None: shut down.
    pub(super) listener: Mutex<Option<TcpListener>>,
    pub(super) waker: Waker,
    pub(super) conns: Mutex<Vec<Arc<VerbsConn>>>,
    pub(super) replacing: Mutex<Vec<Replace>>,
    /// Connections by the number of their queue pair.
    pub(super) by_qpn: RwLock<HashMap<u32, Arc<VerbsConn>>>,
    /// Completions for the progress thread to call.
    pub(super) due: Mutex<VecDeque<Due>>,
    regions: RwLock<HashMap<u64, (Mr, Access)>>,
    pub(super) cells: Arc<Cells>,
    pub(super) receive: Receive,
    /// Held while completions of the receive queue are given to their connections: keeps their order.
    receiving: Mutex<Vec<Wc>>,
    pub(super) channel: Arc<Channel>,
    pub(super) port_down: AtomicBool,
    pub(super) device_gone: AtomicBool,
    pub(super) device: Arc<Device>,
}

pub(crate) struct VerbsFabric {
    core: Arc<Core>,
}

/// Opens an endpoint that listens on `host:port`.
pub(crate) fn open(
    config: FabricConfig,
    options: &VerbsOptions,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    let (listener, local) = stream::listen(&config.listen)?;
    let device = Arc::new(device::open(local, options)?);
    let channel = Channel::new(&device.pd.context)
        .map_err(|e| TransportError::os("create a completion channel", &e))?;
    let poll = mio::Poll::new().map_err(|e| TransportError::os("create an epoll instance", &e))?;
    let waker = Waker::new(poll.registry(), progress::WAKER)
        .map_err(|e| TransportError::os("create an eventfd", &e))?;
    tracing::info!(
        "listening on {local}, RDMA device {} port {} address index {} ({})",
        device.pd.context.name,
        device.port,
        device.gid_index,
        std::net::Ipv6Addr::from(device.gid)
    );
    let core = Arc::new(Core {
        base: Base::new(config, handler, buffers(&device.pd))?,
        options: options.clone(),
        local,
        local_addr: local.to_string(),
        listener: Mutex::new(Some(listener)),
        waker,
        conns: Mutex::default(),
        replacing: Mutex::default(),
        by_qpn: RwLock::default(),
        due: Mutex::default(),
        regions: RwLock::default(),
        cells: Cells::new(&device.pd),
        receive: Receive::new(&device, &channel)?,
        receiving: Mutex::default(),
        channel,
        port_down: AtomicBool::new(false),
        device_gone: AtomicBool::new(false),
        device,
    });
    progress::start(&core, poll)?;
    Ok(Arc::new(VerbsFabric { core }))
}

/// Tells a protection domain from all others as long as anything is registered in it.
fn domain_of(pd: &Arc<Pd>) -> usize {
    Arc::as_ptr(pd).addr()
}

/// Buffers that the adapter uses in place.
fn buffers(pd: &Arc<Pd>) -> Arc<BufferPool> {
    let pd = Arc::clone(pd);
    BufferPool::new(Some(Box::new(move |mem| {
        let mr = region::local(&pd, mem)?;
        Ok(Registration {
            domain: domain_of(&pd),
            lkey: mr.lkey(),
            _keep: Box::new(mr),
        })
    })))
}

impl Endpoint for Core {
    type Install = Arc<VerbsConn>;

    fn base(&self) -> &Base<Self::Install> {
        &self.base
    }

    fn ring(&self) {
        if let Err(e) = self.waker.wake() {
            tracing::error!("wake the progress thread: {e}");
        }
    }
}

impl Core {
    /// The protection domain, as buffers know it.
    pub(super) fn domain(&self) -> usize {
        domain_of(&self.device.pd)
    }

    /// What the device has said is wrong with it.
    pub(super) fn trouble(&self) -> Option<String> {
        let name = &self.device.pd.context.name;
        if self.device_gone.load(Ordering::SeqCst) {
            return Some(format!("the RDMA device {name} has failed or was removed"));
        }
        let down = self.port_down.load(Ordering::SeqCst);
        down.then(|| format!("port {} of the RDMA device {name} is down", self.device.port))
    }

    /// What a region key stands for.
    pub(super) fn find(&self, key: u64) -> Control {
        match self.regions.read().get(&key) {
            Some((mr, access)) => Control::There(
                key,
                Place {
                    base: mr.mem.address(),
                    len: mr.mem.len() as u64,
                    rkey: mr.rkey(),
                    access: *access,
                },
            ),
            None => Control::Nowhere(key),
        }
    }

    /// Gives what has been received to its connections; true if there was something.
    pub(super) fn receive_all(&self) -> bool {
        let mut worked = false;
        let mut completions = self.receiving.lock();
        let mut more = true;
        while more {
            completions.clear();
            more = match self.receive.cq.poll(&mut completions) {
                Ok(more) => more,
                Err(e) => {
                    tracing::error!("poll the receive queue: {e}");
                    false
                }
            };
            for wc in completions.iter() {
                worked = true;
                let conn = self.by_qpn.read().get(&wc.qpn).cloned();
                match (self.receive.take(wc), conn) {
                    (Ok(Some(fragment)), Some(conn)) => conn.arrived(fragment),
                    (Ok(_), _) => {}
                    (Err(e), Some(conn)) => conn.fail(e),
                    (Err(e), None) => tracing::error!("{e}"),
                }
            }
        }
        worked
    }

    /// Takes a connection out of what is found by number.
    pub(super) fn forget(&self, conn: &Arc<VerbsConn>, broke: bool) {
        let mut by_qpn = self.by_qpn.write();
        if by_qpn.get(&conn.qpn).is_some_and(|c| Arc::ptr_eq(c, conn)) {
            by_qpn.remove(&conn.qpn);
        }
        drop(by_qpn);
        self.conns.lock().retain(|c| !Arc::ptr_eq(c, conn));
        self.receive.release(broke);
    }
}

impl Fabric for VerbsFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Verbs
    }

    fn local_addr(&self) -> String {
        self.core.local_addr.clone()
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn set_identity(&self, identity: Vec<u8>) {
        self.core.base.set_identity(identity);
    }

    fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError> {
        self.core.base.check_open()?;
        let mr = region::remote(&self.core.device, mem, access)?;
        let mut regions = self.core.regions.write();
        loop {
            let key = common::region_key(0)?;
            if let std::collections::hash_map::Entry::Vacant(entry) = regions.entry(key.0) {
                entry.insert((mr, access));
                return Ok(key);
            }
        }
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        let removed = self.core.regions.write().remove(&key.0);
        let Some((mr, _)) = removed else {
            return Err(TransportError::Invalid(format!(
                "region {:#x} is not registered",
                key.0
            )));
        };
        // The adapter lets go of the memory here, after what it is just doing with it.
        drop(mr);
        // The adapter's own key may be given to another region: peers must not go on using it.
        for conn in self.core.conns.lock().iter() {
            if let Err(e) = conn.stream.send(&Control::Nowhere(key.0)) {
                conn.fail(conn.lost(&e));
            }
        }
        Ok(())
    }

    fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.core.base.buffers.take(len)
    }

    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError> {
        self.core.base.check_open()?;
        let conn = self.core.connect(addr)?;
        Ok(conn)
    }

    fn stats(&self) -> FabricStats {
        let conns = self.core.conns.lock().clone();
        self.core.base.stats(conns.iter().map(|c| &c.base))
    }

    fn shutdown(&self) {
        if !self.core.base.begin_stop() {
            return;
        }
        // Handshakes that wait for the progress thread are let go.
        self.core.end_threads(&self.core.local_addr);
        if let Some(listener) = self.core.listener.lock().take() {
            // Closing alone would not do while a child that has not yet executed its program holds a copy.
            let _freed = rustix::net::shutdown(&listener, Shutdown::Both);
        }
        self.core.regions.write().clear();
    }
}

impl Drop for VerbsFabric {
    fn drop(&mut self) {
        self.shutdown();
    }
}
