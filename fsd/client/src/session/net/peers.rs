//! The connections to the other mounts.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use lockmgr::NodeId;
use rdma_transport::Connection;
use rt::sync::Mutex;

use super::meta::MetaLink;
use super::stream::Stream;
use super::ways::{RETRY, Ways};
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{self, DeadMount, FrameKind, Hello, MountRequest, PeerState, Role};

#[derive(Default)]
struct Peer {
    /// Made by either mount.
    conn: Option<Arc<dyn Connection>>,
    stream: Stream,
    connecting: bool,
}

impl Peer {
    fn live(&self) -> Option<&Arc<dyn Connection>> {
        self.conn.as_ref().filter(|c| c.is_alive())
    }

    /// Everything there is to send goes over this connection from now on.
    fn adopt(&mut self, life: u64, conn: &Arc<dyn Connection>) {
        self.stream.connected(life);
        self.conn = Some(Arc::clone(conn));
        self.flush();
    }

    /// Sends what has not gone yet; whatever the connection loses goes over the next one.
    fn flush(&mut self) {
        // Not `live`, which borrows the stream as well; a message that comes calls this, mostly for nothing.
        let Some(conn) = self.conn.as_ref().filter(|c| c.is_alive()) else {
            return;
        };
        while let Some(frame) = self.stream.next() {
            if conn.queue(&wire::plain(FrameKind::Lease, &frame)).is_err() {
                return;
            }
        }
    }
}

/// The ways to the other mounts.
pub struct Peers {
    me: Weak<Self>,
    ways: Arc<Ways>,
    meta: Arc<MetaLink>,
    /// Whoever has it locked waits for nobody: lease messages are sent by the progress thread, too, which would wait for it
    /// instead of bringing what is waited for.
    peers: Mutex<HashMap<NodeId, Peer>>,
    /// Lives that have been declared dead: nothing of them is heard any more.
    dead: Mutex<HashSet<u64>>,
    /// Runs when everybody has heard what was sent before it was asked for.
    heard: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

/// Why another mount was not reached.
enum Unreached {
    /// It may be, later.
    Yet(RpcError),
    /// It has left or ended.
    Ever(RpcError),
}

impl Peers {
    pub(super) fn new(ways: &Arc<Ways>, meta: &Arc<MetaLink>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            ways: Arc::clone(ways),
            meta: Arc::clone(meta),
            peers: Mutex::default(),
            dead: Mutex::default(),
            heard: Mutex::default(),
        })
    }

    /// Mounts have been declared dead: nothing goes to them, and nothing of them is heard any more.
    pub fn bury(&self, dead: &[DeadMount]) {
        self.dead.lock().extend(dead.iter().map(|d| d.life));
        let mut conns = Vec::new();
        {
            let mut peers = self.peers.lock();
            for mount in dead {
                if let Some(peer) = peers.get_mut(&NodeId(mount.node)) {
                    peer.stream.end();
                    conns.extend(peer.conn.take());
                }
            }
        }
        for conn in conns {
            conn.close();
        }
        self.tell_if_heard();
    }

    /// May this life of a mount say anything?
    pub fn is_dead(&self, life: u64) -> bool {
        self.dead.lock().contains(&life)
    }

    /// Runs `then`, on some thread, when every other mount has heard all that this one has sent so far, or has ended. Of several
    /// that are asked for only the last.
    pub fn once_heard(&self, then: Box<dyn FnOnce() + Send>) {
        *self.heard.lock() = Some(then);
        for peer in self.peers.lock().values_mut() {
            if peer.stream.await_heard() {
                peer.flush();
            }
        }
        self.tell_if_heard();
    }

    fn tell_if_heard(&self) {
        if self.peers.lock().values().any(|peer| peer.stream.is_awaited()) {
            return;
        }
        let then = self.heard.lock().take();
        if let Some(then) = then {
            then();
        }
    }

    /// Sends a lease message to another mount; messages to one mount keep their order. Never waits.
    pub fn send_lease(&self, to: NodeId, message: &[u8]) {
        let mut peers = self.peers.lock();
        let peer = peers.entry(to).or_default();
        peer.stream.push(message);
        if peer.live().is_some() {
            peer.flush();
        } else {
            self.begin_to_reach(to, peer);
        }
    }

    /// A frame of lease messages has come from another mount; the message in it, unless it has come before.
    pub fn take_lease<'a>(
        &self,
        from: NodeId,
        hello: &Hello,
        conn: &Arc<dyn Connection>,
        frame: &'a [u8],
    ) -> Option<&'a [u8]> {
        if self.is_dead(hello.life) {
            conn.close();
            return None;
        }
        let mut peers = self.peers.lock();
        let peer = peers.entry(from).or_default();
        let awaited = peer.stream.is_awaited();
        match peer.stream.take(hello.life, frame) {
            Ok(message) => {
                peer.flush();
                let heard = awaited && !peer.stream.is_awaited();
                drop(peers);
                if heard {
                    self.tell_if_heard();
                }
                message
            }
            Err(broken) => {
                tracing::error!(
                    "a lease message from mount {}: {broken}; it is sent again",
                    from.0
                );
                drop(peers);
                conn.close();
                None
            }
        }
    }

    /// Another mount has connected to this one: where there is no connection to it, that is the one.
    pub fn connected(&self, from: NodeId, hello: &Hello, conn: &Arc<dyn Connection>) {
        if self.is_dead(hello.life) {
            return conn.close();
        }
        let mut peers = self.peers.lock();
        let peer = peers.entry(from).or_default();
        if peer.live().is_none() {
            peer.adopt(hello.life, conn);
            drop(peers);
            self.tell_if_heard();
        }
    }

    /// A connection has ended. If it was the one to another mount, that is connected to again, or found to have ended.
    pub(super) fn disconnected(&self, conn: &Arc<dyn Connection>) {
        let mut peers = self.peers.lock();
        let mut all = peers.iter_mut();
        let lost = all.find(|(_, p)| p.conn.as_ref().is_some_and(|c| c.id() == conn.id()));
        if let Some((&node, peer)) = lost {
            peer.conn = None;
            self.begin_to_reach(node, peer);
        }
    }

    fn begin_to_reach(&self, to: NodeId, peer: &mut Peer) {
        if std::mem::replace(&mut peer.connecting, true) {
            return;
        }
        let me = Weak::clone(&self.me);
        self.ways.workers.run(move || {
            if let Some(net) = me.upgrade() {
                net.reach(to);
            }
        });
    }

    /// Asks another mount; `done` gets the answer on some thread. None, and `done` is not called, without a connection.
    pub fn ask<R>(
        &self,
        to: NodeId,
        request: R,
        done: impl FnOnce(Result<R::Reply, RpcError>) + Send + 'static,
    ) -> Option<()>
    where
        R: ask::Request<Message = MountRequest, Answer: 'static>,
    {
        let peers = self.peers.lock();
        let conn = peers.get(&to)?.live().cloned()?;
        drop(peers);
        self.ways.calls.call_async(
            &conn,
            &request.message(),
            move |result: Result<R::Answer, RpcError>| {
                done(result.and_then(ask::answer_to::<R>));
            },
        );
        Some(())
    }

    /// Connects to another mount and sends what waits for it; gives up when it has left or ended.
    fn reach(&self, to: NodeId) {
        loop {
            let reached = self.connect_peer(to);
            let mut peers = self.peers.lock();
            let peer = peers.entry(to).or_default();
            match reached {
                _ if peer.live().is_some() => {}
                Ok((life, conn)) if self.is_dead(life) => conn.close(),
                Ok((life, conn)) => peer.adopt(life, &conn),
                Err(Unreached::Yet(error)) if !self.ways.stopping.load(Ordering::Acquire) => {
                    drop(peers);
                    tracing::debug!("mount {} cannot be reached yet: {error}", to.0);
                    if let Some(owner) = self.ways.owner() {
                        owner.peer_unreachable(to);
                    }
                    rt::thread::sleep(RETRY);
                    continue;
                }
                Err(Unreached::Yet(error) | Unreached::Ever(error)) => {
                    peer.connecting = false;
                    peer.stream.end();
                    drop(peers);
                    tracing::debug!("mount {} has left or ended: {error}", to.0);
                    self.tell_if_heard();
                    if let Some(owner) = self.ways.owner() {
                        owner.peer_gone(to);
                    }
                    return;
                }
            }
            peer.connecting = false;
            drop(peers);
            self.tell_if_heard();
            if let Some(owner) = self.ways.owner() {
                owner.peer_back(to);
            }
            return;
        }
    }

    /// A connection to another mount, and its life.
    fn connect_peer(&self, to: NodeId) -> Result<(u64, Arc<dyn Connection>), Unreached> {
        let listen = match self.meta.ask(ask::meta::Peer { node: to.0 }) {
            Ok((_, PeerState::Dead)) => Err(Unreached::Ever(RpcError::Errno(Errno(libc::EHOSTDOWN)))),
            Ok((listen, _)) => Ok(listen),
            Err(error @ RpcError::Errno(_)) => Err(Unreached::Ever(error)),
            Err(error) => Err(Unreached::Yet(error)),
        }?;
        let fabric = &self.ways.fabric;
        let conn = fabric.connect(&listen).map_err(|error| {
            if fabric.is_deserted(&listen) {
                Unreached::Ever(error.into())
            } else {
                Unreached::Yet(error.into())
            }
        })?;
        match Hello::check(conn.peer_identity(), &self.ways.cluster) {
            Ok(hello) if hello.role == Role::Client(Some(to.0)) => Ok((hello.life, conn)),
            // It does not know its number yet: what it sent over this connection would be nobody's.
            _ => {
                conn.close();
                Err(Unreached::Yet(RpcError::Errno(Errno(libc::EAGAIN))))
            }
        }
    }
}
