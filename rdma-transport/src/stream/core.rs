//! An endpoint with its connections: how they begin, and how all of it ends.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use super::door::Listening;
use super::host::Host;
use super::socket::{self, FramedPipe};
use crate::base::{self, Base, ConnBase};
use crate::error::TransportError;
use crate::fabric::{ConnId, Connection};
use crate::handshake::{self, Peer, Pipe, Provider};
use crate::stats::FabricStats;
use crate::threads::{Endpoint, Threads};

/// A provider's connection as its progress thread drives it.
pub(crate) trait Linked: Connection + Sized + 'static {
    fn base(&self) -> &ConnBase;
    fn sock(&self) -> &OwnedFd;
    /// Puts it into error; the first reason counts.
    fn fail(&self, why: TransportError);
    /// The socket takes bytes again.
    fn writable(&self);
    /// Ends it for good.
    fn finish(&self);
}

pub(crate) struct Core<C> {
    pub(crate) host: Arc<Host>,
    pub(super) door: Listening,
    threads: Threads<Arc<C>>,
    pub(crate) conns: Mutex<Vec<Arc<C>>>,
    provider: Provider,
}

impl<C: Linked> Endpoint for Core<C> {
    type Install = Arc<C>;

    fn base(&self) -> &Base {
        &self.host.base
    }

    fn threads(&self) -> &Threads<Arc<C>> {
        &self.threads
    }

    fn wake(&self) {
        self.host.wake();
    }
}

/// A connection that has been set up so far that both sides know who the other is.
pub(crate) struct Greeted {
    pub(crate) pipe: FramedPipe,
    pub(crate) peer: Peer,
    pub(crate) id: ConnId,
}

impl Greeted {
    /// What a connection keeps of it; `incoming`: the peer connected to us.
    pub(crate) fn base(self, incoming: bool) -> (ConnBase, Arc<OwnedFd>) {
        let base = ConnBase::new(self.id, self.peer, incoming, self.pipe.addr);
        (base, self.pipe.sock)
    }
}

impl<C: Linked> Core<C> {
    pub(crate) fn new(host: Arc<Host>, door: Listening, provider: Provider) -> Self {
        Self {
            door,
            host,
            threads: Threads::default(),
            conns: Mutex::default(),
            provider,
        }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.door.addr()
    }

    /// Takes an incoming socket: `welcome` runs on a thread of its own.
    pub(super) fn accept(
        self: &Arc<Self>,
        stream: TcpStream,
        welcome: impl FnOnce(FramedPipe) -> Result<(), TransportError> + Send + 'static,
    ) {
        let addr = stream
            .peer_addr()
            .map_or_else(|_| "a peer".to_owned(), |a| a.to_string());
        if let Err(error) = socket::prepare(&stream, self.host.base.config.timeout) {
            tracing::warn!("connection of {addr} not accepted: {error}");
            return;
        }
        let sock = Arc::new(OwnedFd::from(stream));
        self.shake_hands(Arc::clone(&sock), move |_, deadline, timeout| {
            welcome(FramedPipe {
                sock,
                addr,
                deadline,
                timeout,
            })
        });
    }

    /// The listening side of the handshake. When it returns the peer is welcome, and its older connections have ended.
    pub(crate) fn welcome(&self, mut pipe: FramedPipe) -> Result<Greeted, TransportError> {
        let base = &self.host.base;
        let admit = |identity: &[u8]| base.handler.admit(identity);
        let verified = handshake::server(&mut pipe, &base.local(self.provider), &admit)?;
        self.replace(&verified.peer, &pipe.addr, pipe.deadline)?;
        pipe.send(&verified.welcome)?;
        Ok(Greeted {
            pipe,
            peer: verified.peer,
            id: base.next_id(),
        })
    }

    /// Connects, from the address `from` where that is possible, and runs the connecting side of the handshake.
    pub(crate) fn greet(&self, addr: &str, from: Option<IpAddr>) -> Result<Greeted, TransportError> {
        let base = &self.host.base;
        let timeout = base.config.timeout;
        let deadline = Instant::now() + timeout;
        let stream = socket::dial(addr, from, deadline, timeout)?;
        let mut pipe = FramedPipe {
            sock: Arc::new(OwnedFd::from(stream)),
            addr: addr.to_owned(),
            deadline,
            timeout,
        };
        let id = base.next_id();
        let links_to = |instance: u64| {
            let conns = self.conns.lock();
            base::serials_to(conns.iter().map(|c| c.base()), instance)
        };
        let peer = handshake::client(&mut pipe, &base.local(self.provider), id.0, &links_to)?;
        Ok(Greeted { pipe, peer, id })
    }

    /// Makes a connection known, to the progress thread, too.
    pub(crate) fn add(&self, conn: &Arc<C>) -> Result<(), TransportError> {
        self.conns.lock().push(Arc::clone(conn));
        self.install(Arc::clone(conn)).inspect_err(|_| self.forget(conn))
    }

    pub(crate) fn forget(&self, conn: &Arc<C>) {
        self.conns.lock().retain(|c| !Arc::ptr_eq(c, conn));
    }

    pub(crate) fn stats(&self) -> FabricStats {
        let conns = self.conns.lock().clone();
        self.host.base.stats(conns.iter().map(|c| c.base()))
    }

    /// Ends everything. False if that has begun before.
    pub(crate) fn shutdown(&self) -> bool {
        if !self.host.base.begin_stop() {
            return false;
        }
        self.end_threads(&self.addr().to_string());
        self.door.close();
        true
    }
}
