//! The connections to the other mounts.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use lockmgr::NodeId;
use rdma_transport::Connection;
use rt::sync::Mutex;
use rt::time::Instant;

use super::alarm::Alarm;
use super::meta::MetaLink;
use super::peer::{self, Peer, Relayed};
use super::stream::{Carrier, Taken};
use super::ways::{RETRY, Ways};
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{DeadMount, Hello, MountRequest, PeerState, Role};

/// Longest pause between attempts to reach another mount.
const LONGEST_RETRY: Duration = Duration::from_secs(1);
/// Most connections to other mounts; beyond that the one that has been idle longest is closed.
const MOST: usize = 256;

/// How a frame has come from another mount.
enum Came<'a> {
    /// Over this connection.
    Over(&'a Arc<dyn Connection>),
    /// By way of the metadata server.
    Round,
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
    /// When somebody is to be looked after.
    alarm: Arc<Alarm>,
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
            alarm: Arc::default(),
        })
    }

    /// What a thread does that looks after messages which are not told to have come, until [`Self::stop`].
    pub fn attending(&self) -> impl FnOnce() + Send + use<> {
        let (me, alarm) = (Weak::clone(&self.me), Arc::clone(&self.alarm));
        move || {
            while alarm.wait() {
                let Some(peers) = me.upgrade() else { return };
                peers.tend();
            }
        }
    }

    /// Nobody is looked after any more.
    pub fn stop(&self) {
        self.alarm.end();
    }

    /// Looks after all.
    fn tend(&self) {
        let now = Instant::now();
        let (mut relayed, mut silent) = (Vec::new(), Vec::new());
        for (&node, peer) in self.peers.lock().iter_mut() {
            let todo = peer.tend(now);
            relayed.extend(todo.relayed.map(|frame| (node, frame)));
            silent.extend(todo.silent.then_some(node));
            self.set_alarm(todo.due);
        }
        for (node, frame) in relayed {
            self.relay(node, Some(frame));
        }
        if let Some(owner) = self.ways.owner() {
            silent.into_iter().for_each(|node| owner.peer_silent(node));
        }
    }

    fn set_alarm(&self, due: Option<Instant>) {
        if let Some(at) = due {
            self.alarm.set(at);
        }
    }

    /// Passes a frame on by way of the metadata server, and then the next one. With nothing locked.
    fn relay(&self, to: NodeId, relayed: Option<Relayed>) {
        let Some(Relayed { turn, frame }) = relayed else {
            return;
        };
        let me = Weak::clone(&self.me);
        let answered = move |answer| {
            if let Some(peers) = me.upgrade() {
                peers.relayed(to, turn, &answer);
            }
        };
        // Without a connection it is tried again when no answer has come for a while.
        self.meta.ask_now(ask::meta::Relay { to: to.0, frame }, answered);
    }

    fn relayed(&self, to: NodeId, turn: u64, answer: &Result<(), RpcError>) {
        let mut peers = self.peers.lock();
        let Some(peer) = peers.get_mut(&to) else { return };
        // An answer to what was asked of the life before says nothing of this one.
        let left = peer.waits_for(turn) && answer.as_ref().is_err_and(peer::has_left);
        if left {
            // Nobody has this number any more.
            peer.end();
        }
        let back = peer.relayed(turn, answer);
        let next = peer.flush();
        self.set_alarm(peer.due());
        drop(peers);
        if let Err(error) = answer {
            tracing::debug!(
                "mount {} cannot be reached by way of the metadata server: {error}",
                to.0
            );
        }
        self.relay(to, next);
        let Some(owner) = self.ways.owner() else { return };
        if left {
            self.tell_if_heard();
            owner.peer_gone(to);
        } else if back {
            owner.peer_back(to);
        }
    }

    /// Mounts have been declared dead: nothing goes to them, and nothing of them is heard any more.
    pub fn bury(&self, dead: &[DeadMount]) {
        self.dead.lock().extend(dead.iter().map(|d| d.life));
        let mut conns = Vec::new();
        {
            let mut peers = self.peers.lock();
            for mount in dead {
                if let Some(peer) = peers.get_mut(&NodeId(mount.node)) {
                    peer.end();
                    conns.extend(peer.unlink());
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
        let mut relayed = Vec::new();
        for (&node, peer) in self.peers.lock().iter_mut() {
            if peer.stream.await_heard() {
                relayed.push((node, peer.flush()));
            }
        }
        for (node, frame) in relayed {
            self.relay(node, frame);
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
        if peer.push(message) {
            self.set_alarm(peer.due());
        }
        if peer.live().is_none() {
            self.begin_to_reach(to, peer);
        }
        let relayed = peer.flush();
        drop(peers);
        self.relay(to, relayed);
    }

    /// A frame of lease messages has come from another mount; the message in it, unless it has come before.
    pub fn take_lease<'a>(
        &self,
        from: NodeId,
        life: u64,
        conn: &Arc<dyn Connection>,
        frame: &'a [u8],
    ) -> Option<&'a [u8]> {
        self.take(from, life, &Came::Over(conn), frame)
            .unwrap_or_else(|_| {
                conn.close();
                None
            })
    }

    /// One has come by way of the metadata server.
    ///
    /// # Errors
    /// `ESTALE`: it is for, or of, a life that is over; `EPROTO`: it cannot be taken now, and is to be sent again.
    pub fn take_relayed<'a>(
        &self,
        from: NodeId,
        life: u64,
        relayed: &'a [u8],
    ) -> Result<Option<&'a [u8]>, Errno> {
        let (to, frame) = peer::open(relayed).ok_or(Errno(libc::EPROTO))?;
        if to != 0 && to != self.ways.life {
            return Err(Errno(libc::ESTALE));
        }
        self.take(from, life, &Came::Round, frame)
    }

    /// Both carriers' frames are taken here, on the progress thread, so that what they bring is done in the order in which it is taken.
    fn take<'a>(
        &self,
        from: NodeId,
        life: u64,
        came: &Came<'_>,
        frame: &'a [u8],
    ) -> Result<Option<&'a [u8]>, Errno> {
        if self.is_dead(life) {
            return Err(Errno(libc::ESTALE));
        }
        let mut peers = self.peers.lock();
        let peer = peers.entry(from).or_default();
        let awaited = peer.stream.is_awaited();
        let acknowledged = peer.stream.acknowledged();
        let carrier = match came {
            Came::Over(_) => Carrier::Direct,
            Came::Round => Carrier::Relay,
        };
        let taken = peer.stream.take(life, carrier, frame).map_err(|broken| {
            tracing::error!(
                "a lease message from mount {}: {broken}; it is sent again",
                from.0
            );
            Errno(libc::EPROTO)
        })?;
        peer.heard(acknowledged, life);
        match (came, &taken) {
            (Came::Over(_), Taken::Answer) if peer.is_round() => peer.go_direct(),
            (Came::Over(conn), Taken::Bye) => {
                if peer.is_over(conn) {
                    peer.unlink();
                    if peer.stream.keeps() {
                        self.begin_to_reach(from, peer);
                    }
                }
                conn.close();
            }
            (Came::Over(_), _) => {}
            (Came::Round, _) => {
                // It cannot reach this mount itself, and is not to wait until that is found out here.
                peer.go_round();
                if peer.live().is_none() {
                    self.begin_to_reach(from, peer);
                }
            }
        }
        let relayed = peer.flush();
        if peer.is_round() {
            self.set_alarm(peer.due());
        }
        let heard = awaited && !peer.stream.is_awaited();
        drop(peers);
        self.relay(from, relayed);
        if heard {
            self.tell_if_heard();
        }
        Ok(match taken {
            Taken::Message(message) => Some(message),
            _ => None,
        })
    }

    /// Another mount has connected to this one: where there is no connection to it that works, that is the one.
    pub fn connected(&self, from: NodeId, hello: &Hello, conn: &Arc<dyn Connection>) {
        if self.is_dead(hello.life) {
            return conn.close();
        }
        let mut peers = self.peers.lock();
        let peer = peers.entry(from).or_default();
        if peer.answering().is_none() {
            peer.adopt(hello.life, conn, false);
            self.adopted(&mut peers, from);
            drop(peers);
            self.tell_if_heard();
        }
    }

    /// There is a connection more.
    fn adopted(&self, peers: &mut HashMap<NodeId, Peer>, to: NodeId) {
        self.set_alarm(peers.get(&to).and_then(Peer::due));
        if peers.values().filter(|peer| peer.live().is_some()).count() <= MOST {
            return;
        }
        let now = Instant::now();
        let others = peers.iter_mut().filter(|(node, _)| **node != to);
        let idle = others.filter_map(|(_, peer)| Some((peer.idle_since(now)?, peer)));
        if let Some((_, longest)) = idle.min_by_key(|(since, _)| *since) {
            longest.say_goodbye();
        }
    }

    /// A connection has ended. If it was the one to another mount, that is connected to again, or found to have ended.
    pub(super) fn disconnected(&self, conn: &Arc<dyn Connection>) {
        let mut peers = self.peers.lock();
        if let Some((&node, peer)) = peers.iter_mut().find(|(_, p)| p.is_over(conn)) {
            peer.unlink();
            self.begin_to_reach(node, peer);
            self.set_alarm(peer.due());
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

    /// Asks another mount; `done` gets the answer on some thread. None, and `done` is not called, without a connection that works.
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
        let conn = peers.get(&to)?.answering().cloned()?;
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
        let mut pause = RETRY;
        loop {
            let before = self.peers.lock().entry(to).or_default().life();
            let deaths = self.dead.lock().len();
            let reached = self.connect_peer(to);
            let mut peers = self.peers.lock();
            let peer = peers.entry(to).or_default();
            match reached {
                _ if peer.live().is_some() => {}
                // Another life of it has come meanwhile, or may have: what has ended is the one before.
                Err(Unreached::Ever(_)) if peer.life() != before || self.dead.lock().len() != deaths => {
                    continue;
                }
                Ok((life, conn)) if self.is_dead(life) => conn.close(),
                Ok((life, conn)) => {
                    peer.adopt(life, &conn, true);
                    peer.connecting = false;
                    self.adopted(&mut peers, to);
                    drop(peers);
                    return self.back(to);
                }
                Err(Unreached::Yet(error)) if !self.ways.stopping.load(Ordering::Acquire) => {
                    let relayed = peer.is_relayed();
                    drop(peers);
                    tracing::debug!("mount {} cannot be reached yet: {error}", to.0);
                    if let Some(owner) = self.ways.owner().filter(|_| !relayed) {
                        owner.peer_unreachable(to);
                    }
                    rt::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_RETRY);
                    continue;
                }
                Err(Unreached::Yet(error) | Unreached::Ever(error)) => {
                    let left = peer::has_left(&error);
                    peer.connecting = false;
                    peer.end();
                    drop(peers);
                    tracing::debug!("mount {} has left or ended: {error}", to.0);
                    self.tell_if_heard();
                    if let Some(owner) = self.ways.owner() {
                        if left {
                            owner.peer_gone(to);
                        } else {
                            owner.peer_unreachable(to);
                        }
                    }
                    return;
                }
            }
            peer.connecting = false;
            drop(peers);
            return self.back(to);
        }
    }

    /// Another mount was reached.
    fn back(&self, to: NodeId) {
        self.tell_if_heard();
        if let Some(owner) = self.ways.owner() {
            owner.peer_back(to);
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

impl Drop for Peers {
    fn drop(&mut self) {
        self.alarm.end();
    }
}
