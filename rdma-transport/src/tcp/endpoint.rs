//! The endpoint: listener, registered regions, setting up connections.

use std::collections::HashMap;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mio::Waker;
use parking_lot::{Mutex, RwLock};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::conn::TcpConn;
use super::progress;
use crate::base::{self, Base, ConnBase, Endpoint};
use crate::common::{self, LIMITS};
use crate::handshake::{self, MAX_MESSAGE, Peer, Pipe, Provider};
use crate::mem::SharedMem;
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
    let listener = TcpListener::bind(&config.listen).map_err(|e| {
        let reason = match e.kind() {
            std::io::ErrorKind::AddrInUse => "address in use by a running process".to_owned(),
            _ => e.to_string(),
        };
        TransportError::Os {
            what: format!("listen on {}", config.listen),
            reason,
        }
    })?;
    let os = |e: std::io::Error| TransportError::os(format!("listen on {}", config.listen), &e);
    listener.set_nonblocking(true).map_err(os)?;
    let local_addr = listener.local_addr().map_err(os)?.to_string();
    let poll = mio::Poll::new().map_err(|e| TransportError::os("create an epoll instance", &e))?;
    let waker = Waker::new(poll.registry(), progress::WAKER)
        .map_err(|e| TransportError::os("create an eventfd", &e))?;
    let core = Arc::new(Core {
        base: Base::new(config, handler)?,
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
        let unreachable = |reason: String| TransportError::Unreachable {
            addr: addr.to_owned(),
            reason,
        };
        let mut last = "the name has no address".to_owned();
        let mut stream = None;
        for candidate in addr.to_socket_addrs().map_err(|e| unreachable(e.to_string()))? {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&candidate, left) {
                Ok(connected) => {
                    stream = Some(connected);
                    break;
                }
                Err(e) => last = e.to_string(),
            }
        }
        let stream = stream.ok_or_else(|| unreachable(last))?;
        prepare(&stream, timeout).map_err(|e| TransportError::os("set up a socket", &e))?;
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

/// Small frames at once; a peer that vanished is noticed.
pub(super) fn prepare(stream: &TcpStream, timeout: Duration) -> std::io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    Ok(())
}

fn framed(message: &[u8]) -> Vec<u8> {
    let mut out = (message.len() as u32).to_le_bytes().to_vec();
    out.extend_from_slice(message);
    out
}

/// Handshake messages on a stream: a length (u32), then the message.
pub(super) struct FramedPipe {
    pub(super) sock: Arc<OwnedFd>,
    pub(super) addr: String,
    pub(super) deadline: Instant,
    pub(super) timeout: Duration,
}

impl FramedPipe {
    fn failed(&self, e: Errno) -> TransportError {
        if e == Errno::TIMEDOUT {
            return common::timed_out(&self.addr, self.timeout);
        }
        self.malformed(&format!("handshake broken off: {e}"))
    }

    fn malformed(&self, detail: &str) -> TransportError {
        TransportError::Protocol {
            addr: self.addr.clone(),
            detail: detail.to_owned(),
        }
    }

    fn wait(&self, what: PollFlags) -> Result<(), TransportError> {
        match common::wait(self.sock.as_fd(), what, self.deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.failed(Errno::TIMEDOUT)),
            Err(e) => Err(self.failed(e)),
        }
    }

    fn recv_exact(&self, into: &mut [u8]) -> Result<(), TransportError> {
        let mut got = 0;
        while got < into.len() {
            match rustix::net::recv(&*self.sock, &mut into[got..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(self.malformed("handshake broken off by the other side")),
                Ok((n, _)) => got += n,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }
}

impl Pipe for FramedPipe {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError> {
        let bytes = framed(message);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match rustix::net::send(&*self.sock, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
        let mut len = [0u8; 4];
        self.recv_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_MESSAGE {
            return Err(self.malformed("impossible length of a handshake message"));
        }
        let mut message = vec![0; len];
        self.recv_exact(&mut message)?;
        Ok(message)
    }

    fn addr(&self) -> String {
        self.addr.clone()
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
