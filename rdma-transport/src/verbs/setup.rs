//! Setting up a connection: handshake, exchange of queue-pair data, the states of the queue pair.

use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::conn::VerbsConn;
use super::endpoint::{Core, Replace};
use super::ffi::{Caps, Cq, Qp, Route};
use super::receive::CREDITS;
use super::wire::{FRAGMENT, Info};
use crate::base::{self, ConnBase, Endpoint};
use crate::common;
use crate::handshake::{self, Peer, Pipe, Provider};
use crate::stream::{self, FramedPipe};
use crate::{ConnId, TransportError};

/// Work requests a connection may have under way.
const DEPTH: u32 = 256;
/// Bytes of a work request itself that carry data.
const INLINE: u32 = 220;
/// Both sides say it when their queue pair takes what comes.
const READY: &[u8] = b"ready";
/// Begins what is said instead of queue-pair data by one who has none.
const SORRY: &[u8] = b"sorry: ";

/// Receive buffers set aside; given back if the connection comes to nothing.
struct Reserved(Option<Arc<Core>>);

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(core) = &self.0 {
            core.receive.release(false);
        }
    }
}

/// A queue pair that does not know its peer yet.
struct Half {
    core: Arc<Core>,
    reserved: Reserved,
    qp: Qp,
    cq: Arc<Cq>,
    psn: u32,
}

impl Half {
    fn new(core: &Arc<Core>, id: ConnId) -> Result<Self, TransportError> {
        if let Some(trouble) = core.trouble() {
            return Err(TransportError::Os {
                what: "set up a queue pair".to_owned(),
                reason: trouble,
            });
        }
        let device = &core.device;
        let os = |what: &str, e: std::io::Error| {
            TransportError::os(format!("{what} of {}", device.pd.context.name), &e)
        };
        core.receive.reserve()?;
        let reserved = Reserved(Some(Arc::clone(core)));
        let depth = DEPTH.min(device.limits.max_qp_wr).min(device.limits.max_cqe);
        let cq = Cq::new(&core.channel, depth, id.0).map_err(|e| os("create a completion queue", e))?;
        let wanted = Caps {
            depth,
            inline: INLINE,
        };
        let qp = Qp::new(&device.pd, &cq, &core.receive.cq, &core.receive.srq, wanted)
            .map_err(|e| os("create a queue pair", e))?;
        qp.init(device.port).map_err(|e| os("set up a queue pair", e))?;
        let psn = u32::from_le_bytes(common::random()?) & 0xff_ffff;
        Ok(Self {
            core: Arc::clone(core),
            reserved,
            qp,
            cq,
            psn,
        })
    }

    fn info(&self) -> Info {
        let device = &self.core.device;
        Info {
            gid: device.gid,
            qpn: self.qp.number(),
            psn: self.psn,
            credits: CREDITS,
            fragment: FRAGMENT as u32,
            lid: device.info.lid,
            mtu: device.info.mtu,
            ethernet: device.info.ethernet,
            rd_atomic: device.limits.rd_atomic_target.max(1),
            rd_atomic_source: device.limits.rd_atomic_source,
        }
    }

    /// Joins it to its peer: from here on it takes what comes.
    fn join(mut self, base: ConnBase, sock: Arc<OwnedFd>, theirs: &Info) -> Result<Joined, TransportError> {
        let device = &self.core.device;
        let limits = &device.limits;
        if theirs.ethernet != device.info.ethernet {
            return Err(base.protocol("an InfiniBand port cannot be reached from a RoCE port"));
        }
        let route = Route {
            port: device.port,
            global: theirs.ethernet || theirs.gid[..8] != device.gid[..8],
            gid_index: device.gid_index,
            gid: theirs.gid,
            lid: theirs.lid,
            qpn: theirs.qpn,
            psn: theirs.psn,
            own_psn: self.psn,
            mtu: theirs.mtu.min(device.info.mtu),
            rd_atomic_source: limits.rd_atomic_source.min(theirs.rd_atomic),
            rd_atomic_target: limits.rd_atomic_target.min(theirs.rd_atomic_source).max(1),
            timeout: self.core.options.timeout,
            retry: self.core.options.retry,
        };
        self.reserved.0 = None;
        let conn = VerbsConn::new(base, &self.core, sock, self.qp, self.cq, theirs.credits);
        // Found by its number before the first message can come.
        self.core.by_qpn.write().insert(conn.qpn, Arc::clone(&conn));
        let joined = Joined(Some(Arc::clone(&conn)));
        conn.join(&route).map_err(|e| {
            TransportError::os(format!("connect a queue pair of {}", device.pd.context.name), &e)
        })?;
        Ok(joined)
    }
}

/// A connection that works, but is not yet known to the progress thread.
struct Joined(Option<Arc<VerbsConn>>);

impl Joined {
    fn install(mut self, core: &Arc<Core>) -> Result<Arc<VerbsConn>, TransportError> {
        let Some(conn) = self.0.as_ref().map(Arc::clone) else {
            return Err(TransportError::Shutdown);
        };
        core.conns.lock().push(Arc::clone(&conn));
        core.install(Arc::clone(&conn))?;
        self.0 = None;
        Ok(conn)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(conn) = self.0.take() {
            conn.fail(TransportError::Shutdown);
            conn.cut();
            conn.core.forget(&conn, false);
        }
    }
}

/// The peer's queue-pair data, or its reason not to have any.
fn hear(pipe: &mut FramedPipe) -> Result<Info, TransportError> {
    let bytes = pipe.recv()?;
    if let Some(reason) = bytes.strip_prefix(SORRY) {
        return Err(TransportError::Refused {
            addr: pipe.addr(),
            reason: String::from_utf8_lossy(reason).into_owned(),
        });
    }
    Info::decode(&bytes).ok_or_else(|| TransportError::Protocol {
        addr: pipe.addr(),
        detail: "malformed queue-pair data".to_owned(),
    })
}

impl Core {
    /// Half of a connection; the peer is told if there can be none.
    fn half(self: &Arc<Self>, id: ConnId, pipe: &mut FramedPipe) -> Result<Half, TransportError> {
        Half::new(self, id).inspect_err(|e| {
            let mut sorry = SORRY.to_vec();
            sorry.extend(e.to_string().bytes().take(1024));
            // It is told as well as can be.
            let _gone = pipe.send(&sorry);
        })
    }

    pub(super) fn connect(self: &Arc<Self>, addr: &str) -> Result<Arc<VerbsConn>, TransportError> {
        let timeout = self.base.config.timeout;
        let deadline = Instant::now() + timeout;
        let from = Some(self.local.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback());
        let stream = stream::dial(addr, from, deadline, timeout)?;
        let sock = Arc::new(OwnedFd::from(stream));
        keep_alive(&sock, timeout);
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
        let local = self.base.local(Provider::Verbs);
        let peer = handshake::client(&mut pipe, &local, serial.0, &links_to)?;
        let half = self.half(serial, &mut pipe)?;
        pipe.send(&half.info().encode())?;
        let theirs = hear(&mut pipe)?;
        let base = ConnBase::new(serial, peer, false, addr.to_owned());
        let joined = half.join(base, sock, &theirs)?;
        pipe.send(READY)?;
        joined.install(self)
    }

    /// The listening side, on a thread of its own.
    fn welcome(self: &Arc<Self>, pipe: &mut FramedPipe) -> Result<(), TransportError> {
        let admit = |identity: &[u8]| self.base.handler.admit(identity);
        let verified = handshake::server(pipe, &self.base.local(Provider::Verbs), &admit)?;
        self.replace(&verified.peer, pipe)?;
        pipe.send(&verified.welcome)?;
        let id = self.base.next_id();
        let half = self.half(id, pipe)?;
        let theirs = hear(pipe)?;
        let ours = half.info().encode();
        let base = ConnBase::new(id, verified.peer, true, pipe.addr());
        let joined = half.join(base, Arc::clone(&pipe.sock), &theirs)?;
        pipe.send(&ours)?;
        if pipe.recv()? != READY {
            return Err(TransportError::Protocol {
                addr: pipe.addr(),
                detail: "not ready".to_owned(),
            });
        }
        joined.install(self).map(drop)
    }

    /// Lets the progress thread end what the peer had before.
    fn replace(self: &Arc<Self>, peer: &Peer, pipe: &FramedPipe) -> Result<(), TransportError> {
        let (done, ended) = mpsc::sync_channel(1);
        self.replacing.lock().push(Replace {
            peer: peer.clone(),
            done,
        });
        self.wake();
        let left = pipe.deadline.saturating_duration_since(Instant::now());
        ended
            .recv_timeout(left.max(Duration::from_millis(1)))
            .map_err(|e| match e {
                mpsc::RecvTimeoutError::Timeout => common::timed_out(&pipe.addr, pipe.timeout),
                mpsc::RecvTimeoutError::Disconnected => TransportError::Shutdown,
            })
    }
}

/// Without traffic on it, the stream tells that the peer's host or the network has gone.
fn keep_alive(sock: &OwnedFd, timeout: Duration) {
    use rustix::net::sockopt::{set_tcp_keepidle, set_tcp_keepintvl};
    let idle = (timeout / 2).max(Duration::from_secs(1));
    let set = set_tcp_keepidle(sock, idle)
        .and_then(|()| set_tcp_keepintvl(sock, (idle / 4).max(Duration::from_secs(1))));
    if let Err(e) = set {
        tracing::debug!("keep-alive of a connection: {e}");
    }
}

/// What comes over the network from one who wants to connect.
pub(super) fn accept(core: &Arc<Core>, stream: TcpStream) {
    let addr = stream
        .peer_addr()
        .map_or_else(|_| "a peer".to_owned(), |a| a.to_string());
    if let Err(error) = stream::prepare(&stream, core.base.config.timeout) {
        tracing::warn!("connection of {addr} not accepted: {error}");
        return;
    }
    let sock = Arc::new(OwnedFd::from(stream));
    keep_alive(&sock, core.base.config.timeout);
    core.shake_hands(Arc::clone(&sock), move |core, deadline, timeout| {
        let mut pipe = FramedPipe {
            sock,
            addr,
            deadline,
            timeout,
        };
        core.welcome(&mut pipe)
    });
}
