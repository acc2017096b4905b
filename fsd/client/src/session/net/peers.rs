//! The connections to the other mounts.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use lockmgr::NodeId;
use rdma_transport::Connection;
use rt::sync::Mutex;

use super::meta::MetaLink;
use super::ways::{RETRY, Ways};
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{self, FrameKind, MountRequest, PeerState};

#[derive(Default)]
pub(super) struct Peer {
    pub(super) conn: Option<Arc<dyn Connection>>,
    /// Messages that wait for a connection; while not empty, new ones queue behind.
    queue: VecDeque<Vec<u8>>,
    connecting: bool,
}

/// The ways to the other mounts.
pub struct Peers {
    me: Weak<Self>,
    ways: Arc<Ways>,
    meta: Arc<MetaLink>,
    pub(super) peers: Mutex<HashMap<NodeId, Peer>>,
}

impl Peers {
    pub(super) fn new(ways: &Arc<Ways>, meta: &Arc<MetaLink>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            ways: Arc::clone(ways),
            meta: Arc::clone(meta),
            peers: Mutex::default(),
        })
    }

    /// Sends a lease message to another mount; messages to one mount keep their order. Never waits for the peer: the progress
    /// thread sends lease messages, too, and would wait for `peers` meanwhile instead of bringing the peer's credits.
    pub fn send_lease(&self, to: NodeId, message: &[u8]) {
        let frame = wire::plain(FrameKind::Lease, message);
        let mut peers = self.peers.lock();
        let peer = peers.entry(to).or_default();
        if peer.queue.is_empty()
            && let Some(conn) = peer.conn.as_ref().filter(|c| c.is_alive())
            && conn.queue(&frame).is_ok()
        {
            return;
        }
        peer.queue.push_back(frame);
        if !peer.connecting {
            peer.connecting = true;
            let me = Weak::clone(&self.me);
            self.ways.workers.run(move || {
                if let Some(net) = me.upgrade() {
                    net.reach(to);
                }
            });
        }
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
        let conn = peers.get(&to)?.conn.as_ref().filter(|c| c.is_alive()).cloned()?;
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

    /// Connects to another mount and sends what waits for it; gives up when it is known to be dead.
    fn reach(&self, to: NodeId) {
        loop {
            let reached = self.connect_peer(to);
            let mut peers = self.peers.lock();
            let peer = peers.entry(to).or_default();
            match reached {
                Ok(conn) => {
                    while let Some(frame) = peer.queue.front() {
                        if conn.queue(frame).is_err() {
                            break;
                        }
                        peer.queue.pop_front();
                    }
                    if peer.queue.is_empty() {
                        peer.conn = Some(conn);
                        peer.connecting = false;
                        drop(peers);
                        if let Some(owner) = self.ways.owner() {
                            owner.peer_back(to);
                        }
                        return;
                    }
                }
                Err((error, final_)) => {
                    drop(peers);
                    if let Some(owner) = self.ways.owner() {
                        owner.peer_gone(to);
                    }
                    if final_ || self.ways.stopping.load(Ordering::Acquire) {
                        tracing::warn!("mount {} cannot be reached: {error}", to.0);
                        if let Some(peer) = self.peers.lock().get_mut(&to) {
                            peer.queue.clear();
                            peer.connecting = false;
                        }
                        return;
                    }
                }
            }
            rt::thread::sleep(RETRY);
        }
    }

    fn connect_peer(&self, to: NodeId) -> Result<Arc<dyn Connection>, (RpcError, bool)> {
        match self.meta.ask(ask::meta::Peer { node: to.0 }) {
            Ok((_, PeerState::Dead)) => Err((RpcError::Errno(Errno(libc::EHOSTDOWN)), true)),
            Ok((listen, _)) => self
                .ways
                .fabric
                .connect(&listen)
                .map_err(|error| (error.into(), false)),
            Err(error @ RpcError::Errno(_)) => Err((error, true)),
            Err(error) => Err((error, false)),
        }
    }
}
