//! The endpoint: listener, registered regions, setting up connections.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use mio::Waker;
use parking_lot::{Mutex, RwLock};
use rustix::net::Shutdown;

use super::conn::TcpConn;
use super::progress;
use crate::base::{self, Base, ConnBase, Endpoint};
use crate::buffer::{Buffer, BufferPool};
use crate::common::{self, LIMITS};
use crate::handshake::{self, Peer, Provider};
use crate::mem::SharedMem;
use crate::stream::{self, FramedPipe, framed, prepare};
use crate::{
    Access, Connection, Fabric, FabricConfig, FabricKind, FabricStats, Handler, Limits, RegionKey,
    TransportError,
};

/// What is on its way to the progress thread.
pub(super) enum Install {
    /// We have connected.
    Ours(Arc<TcpConn>),
    /// A peer has proved itself; `welcome` goes out when its older connections have ended.
    Theirs {
        sock: Arc<OwnedFd>,
        addr: String,
        peer: Peer,
        welcome: Vec<u8>,
    },
}

pub(super) struct Core {
    pub(super) base: Base<Install>,
    local_addr: String,
    /// None: shut down.
    pub(super) listener: Mutex<Option<TcpListener>>,
    pub(super) waker: Waker,
    pub(super) regions: RwLock<HashMap<u64, (Arc<SharedMem>, Access)>>,
    pub(super) conns: Mutex<Vec<Arc<TcpConn>>>,
}

pub(crate) struct TcpFabric {
    core: Arc<Core>,
}

/// Opens an endpoint that listens on `host:port`.
pub(crate) fn open(
    config: FabricConfig,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    let (listener, addr) = stream::listen(&config.listen)?;
    let local_addr = addr.to_string();
    let poll = mio::Poll::new().map_err(|e| TransportError::os("create an epoll instance", &e))?;
    let waker = Waker::new(poll.registry(), progress::WAKER)
        .map_err(|e| TransportError::os("create an eventfd", &e))?;
    let core = Arc::new(Core {
        base: Base::new(config, handler, BufferPool::new(None))?,
        local_addr,
        listener: Mutex::new(Some(listener)),
        waker,
        regions: RwLock::new(HashMap::new()),
        conns: Mutex::new(Vec::new()),
    });
    progress::start(&core, poll)?;
    Ok(Arc::new(TcpFabric { core }))
}

impl Endpoint for Core {
    type Install = Install;

    fn base(&self) -> &Base<Install> {
        &self.base
    }

    fn ring(&self) {
        if let Err(e) = self.waker.wake() {
            tracing::error!("wake the progress thread: {e}");
        }
    }
}

impl Core {
    /// Takes an incoming socket: the handshake runs on a thread of its own.
    pub(super) fn accept(self: &Arc<Self>, stream: TcpStream) {
        let addr = stream
            .peer_addr()
            .map_or_else(|_| "a peer".to_owned(), |a| a.to_string());
        if let Err(error) = prepare(&stream, self.base.config.timeout) {
            tracing::warn!("connection of {addr} not accepted: {error}");
            return;
        }
        let sock = Arc::new(OwnedFd::from(stream));
        self.shake_hands(Arc::clone(&sock), move |core, deadline, timeout| {
            let mut pipe = FramedPipe {
                sock,
                addr,
                deadline,
                timeout,
            };
            let admit = |identity: &[u8]| core.base.handler.admit(identity);
            let verified = handshake::server(&mut pipe, &core.base.local(Provider::Tcp), &admit)?;
            core.install(Install::Theirs {
                sock: pipe.sock,
                addr: pipe.addr,
                peer: verified.peer,
                welcome: framed(&verified.welcome),
            })
        });
    }

    fn connect(self: &Arc<Self>, addr: &str) -> Result<Arc<TcpConn>, TransportError> {
        let timeout = self.base.config.timeout;
        let deadline = Instant::now() + timeout;
        let stream = stream::dial(addr, None, deadline, timeout)?;
        let sock = Arc::new(OwnedFd::from(stream));
        let mut pipe = FramedPipe {
            sock: Arc::clone(&sock),
            addr: addr.to_owned(),
            deadline,
            timeout,
        };
        let serial = self.base.next_id();
        let links_to = |instance: u64| {
            let conns = self.conns.lock();
            base::serials_to(conns.iter().map(|c| &c.base), instance)
        };
        let peer = handshake::client(&mut pipe, &self.base.local(Provider::Tcp), serial.0, &links_to)?;
        let conn = TcpConn::new(ConnBase::new(serial, peer, false, addr.to_owned()), self, sock);
        self.conns.lock().push(Arc::clone(&conn));
        if let Err(why) = self.install(Install::Ours(Arc::clone(&conn))) {
            self.conns.lock().retain(|c| !Arc::ptr_eq(c, &conn));
            return Err(why);
        }
        Ok(conn)
    }
}

impl Fabric for TcpFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Tcp
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
        let mut regions = self.core.regions.write();
        loop {
            let key = common::region_key(0)?;
            if let std::collections::hash_map::Entry::Vacant(entry) = regions.entry(key.0) {
                entry.insert((Arc::clone(mem), access));
                return Ok(key);
            }
        }
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        // Operations hold this lock for reading while they are executed.
        match self.core.regions.write().remove(&key.0) {
            Some(_) => Ok(()),
            None => Err(TransportError::Invalid(format!(
                "region {:#x} is not registered",
                key.0
            ))),
        }
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
        self.core.end_threads(&self.core.local_addr);
        if let Some(listener) = self.core.listener.lock().take() {
            // Closing alone would not do while a child that has not yet executed its program holds a copy.
            let _freed = rustix::net::shutdown(&listener, Shutdown::Both);
        }
    }
}

impl Drop for TcpFabric {
    fn drop(&mut self) {
        self.shutdown();
    }
}
