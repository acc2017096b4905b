//! Setting up a connection: after the handshake the exchange of queue-pair data, the states of the queue pair.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use super::adapter::Adapter;
use super::conn::VerbsConn;
use super::ffi::{Caps, Cq, Qp, RdAtomic, Route};
use super::pair::Pair;
use super::receive::CREDITS;
use super::wire::{FRAGMENT, Info};
use crate::common;
use crate::error::TransportError;
use crate::fabric::ConnId;
use crate::handshake::Pipe;
use crate::stream::{Core, FramedPipe, Greeted, Host};

/// Work requests a connection may have under way.
const DEPTH: u32 = 256;
/// Bytes of a work request itself that carry data.
const INLINE: u32 = 220;
/// Both sides say it when their queue pair takes what comes.
const READY: &[u8] = b"ready";
/// Begins what is said instead of queue-pair data by one who has none.
const SORRY: &[u8] = b"sorry: ";

/// Receive buffers set aside; given back if the connection comes to nothing.
struct Reserved(Option<Arc<Adapter>>);

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(adapter) = &self.0 {
            adapter.receive.release(false);
        }
    }
}

/// A queue pair that does not know its peer yet.
struct Half {
    adapter: Arc<Adapter>,
    reserved: Reserved,
    qp: Qp,
    cq: Arc<Cq>,
    psn: u32,
}

impl Half {
    fn new(adapter: &Arc<Adapter>, id: ConnId) -> Result<Self, TransportError> {
        if let Some(trouble) = adapter.trouble() {
            return Err(TransportError::Os {
                what: "set up a queue pair".to_owned(),
                reason: trouble,
            });
        }
        let device = &adapter.device;
        let os = |what: &str, e: std::io::Error| {
            TransportError::os(format!("{what} of {}", device.pd.context.name), &e)
        };
        adapter.receive.reserve()?;
        let reserved = Reserved(Some(Arc::clone(adapter)));
        let depth = DEPTH.min(device.limits.max_qp_wr).min(device.limits.max_cqe);
        let cq = Cq::new(&adapter.channel, depth, id.0).map_err(|e| os("create a completion queue", e))?;
        let wanted = Caps {
            depth,
            inline: INLINE,
        };
        let qp = Qp::new(&device.pd, &cq, &adapter.receive.cq, &adapter.receive.srq, wanted)
            .map_err(|e| os("create a queue pair", e))?;
        qp.init(device.port).map_err(|e| os("set up a queue pair", e))?;
        let psn = u32::from_le_bytes(common::random()?) & 0xff_ffff;
        Ok(Self {
            adapter: Arc::clone(adapter),
            reserved,
            qp,
            cq,
            psn,
        })
    }

    fn info(&self) -> Info {
        let device = &self.adapter.device;
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
    fn join(
        mut self,
        host: &Arc<Host>,
        greeted: Greeted,
        incoming: bool,
        theirs: &Info,
    ) -> Result<Joined, TransportError> {
        let (base, sock) = greeted.base(incoming);
        let device = &self.adapter.device;
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
            rd_atomic: RdAtomic {
                source: limits.rd_atomic_source.min(theirs.rd_atomic),
                target: limits.rd_atomic_target.min(theirs.rd_atomic_source).max(1),
            },
            timeout: self.adapter.options.timeout,
            retry: self.adapter.options.retry,
        };
        self.reserved.0 = None;
        let pair = Pair::new(self.qp, self.cq);
        let conn = VerbsConn::new(base, host, &self.adapter, sock, pair, theirs.credits);
        // Found by its number before the first message can come.
        let receiver = Arc::clone(&conn) as _;
        self.adapter.receive.add_receiver(conn.pair.number, receiver);
        let joined = Joined(Some(Arc::clone(&conn)));
        conn.pair.connect(&route).map_err(|e| {
            TransportError::os(format!("connect a queue pair of {}", device.pd.context.name), &e)
        })?;
        Ok(joined)
    }
}

/// A connection that works, but is not yet known to the progress thread.
struct Joined(Option<Arc<VerbsConn>>);

impl Joined {
    fn install(mut self, core: &Core<VerbsConn>) -> Result<Arc<VerbsConn>, TransportError> {
        let Some(conn) = self.0.as_ref().map(Arc::clone) else {
            return Err(TransportError::Shutdown);
        };
        core.add(&conn)?;
        self.0 = None;
        Ok(conn)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        if let Some(conn) = self.0.take() {
            conn.fail(TransportError::Shutdown);
            conn.cut();
            forget(&conn, false);
        }
    }
}

/// Nothing is received for a connection any more; `broke`: it did not end before it worked.
pub(super) fn forget(conn: &Arc<VerbsConn>, broke: bool) {
    let receiver = Arc::clone(conn) as _;
    let receive = &conn.adapter.receive;
    receive.remove_receiver(conn.pair.number, &receiver);
    receive.release(broke);
}

/// The peer's queue-pair data, or its reason not to have any.
fn receive_info(pipe: &mut FramedPipe) -> Result<Info, TransportError> {
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

/// Half of a connection; the peer is told if there can be none.
fn half(adapter: &Arc<Adapter>, greeted: &mut Greeted) -> Result<Half, TransportError> {
    Half::new(adapter, greeted.id).inspect_err(|e| {
        let mut sorry = SORRY.to_vec();
        sorry.extend(e.to_string().bytes().take(1024));
        // It is told as well as can be.
        let _gone = greeted.pipe.send(&sorry);
    })
}

/// Connects to a peer.
pub(super) fn connect(
    core: &Core<VerbsConn>,
    adapter: &Arc<Adapter>,
    addr: &str,
) -> Result<Arc<VerbsConn>, TransportError> {
    let from = Some(core.addr().ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback());
    let mut greeted = core.greet(addr, from)?;
    keep_alive(&greeted.pipe.sock, core.host.base.config.timeout);
    let half = half(adapter, &mut greeted)?;
    greeted.pipe.send(&half.info().encode())?;
    let theirs = receive_info(&mut greeted.pipe)?;
    let mut pipe = greeted.pipe.clone();
    let joined = half.join(&core.host, greeted, false, &theirs)?;
    pipe.send(READY)?;
    joined.install(core)
}

/// The listening side, on a thread of its own.
pub(super) fn welcome(
    core: &Core<VerbsConn>,
    adapter: &Arc<Adapter>,
    pipe: FramedPipe,
) -> Result<(), TransportError> {
    keep_alive(&pipe.sock, core.host.base.config.timeout);
    let mut greeted = core.welcome(pipe)?;
    let half = half(adapter, &mut greeted)?;
    let theirs = receive_info(&mut greeted.pipe)?;
    let ours = half.info().encode();
    let mut pipe = greeted.pipe.clone();
    let joined = half.join(&core.host, greeted, true, &theirs)?;
    pipe.send(&ours)?;
    if pipe.recv()? != READY {
        return Err(TransportError::Protocol {
            addr: pipe.addr(),
            detail: "not ready".to_owned(),
        });
    }
    joined.install(core).map(drop)
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
