//! The state of the simulated network: who is connected, what is under way, what takes effect when.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::endpoint::SimConn;
use super::net::{NetRef, SimConfig};
use super::rng::Rng;
use crate::common::{self, Counters, disconnected, remote_access};
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::{
    Access, AsyncOp, Completion, ConnId, Connection, FabricConfig, Handler, Op, OpResult, RegionKey,
    RemoteAddr, TransportError,
};

pub(super) type EndpointId = usize;
/// A connection as the net knows it: both its ends.
pub(super) type PairId = u64;

/// One end of a connection: 0 connected, 1 listened.
pub(super) type End = usize;

/// Something under way in a lane.
pub(super) enum Parcel {
    /// One operation of a batch; its last one sends the results back.
    Op {
        op: AsyncOp,
        batch: u64,
        last: bool,
    },
    Message(Box<[u8]>),
    /// Results of a batch, on their way back.
    Results {
        batch: u64,
        results: Result<Vec<OpResult>, TransportError>,
    },
    /// The other end has accepted us: its handler learns of the connection first of all.
    Connected,
    /// The end of everything in this lane.
    Down(TransportError),
}

pub(super) enum What {
    /// A parcel of `pair` arrives that was sent by `from`.
    Arrive {
        pair: PairId,
        from: End,
        parcel: Parcel,
    },
    Call(Box<dyn FnOnce() + Send>),
}

pub(super) struct EndState {
    pub(super) endpoint: EndpointId,
    pub(super) conn: Option<Arc<SimConn>>,
    pub(super) alive: bool,
    /// Its `Down` is under way or has come.
    ending: bool,
    why: Option<TransportError>,
    /// When the last parcel of each lane from here arrives: requests and messages, results.
    last: [u64; 2],
    batches: BTreeMap<u64, (Option<Completion>, Vec<OpResult>)>,
    /// Results gathered here for the other end's batch.
    gathering: Vec<OpResult>,
}

pub(super) struct Pair {
    pub(super) ends: [EndState; 2],
    pub(super) peer: Peer,
}

struct EndpointState {
    addr: String,
    key: Vec<u8>,
    identity: Vec<u8>,
    counters: Arc<Counters>,
    handler: Arc<dyn Handler>,
    regions: HashMap<u64, (Arc<SharedMem>, Access)>,
    up: bool,
}

pub(super) struct State {
    pub(super) now: u64,
    seq: u64,
    rng: Rng,
    config: SimConfig,
    queue: BTreeMap<(u64, u64), What>,
    endpoints: Vec<EndpointState>,
    pairs: BTreeMap<PairId, Pair>,
    next: u64,
}

/// What to do once the state is unlocked again.
pub(super) enum After {
    Nothing,
    Message(Arc<dyn Handler>, Arc<dyn Connection>, Box<[u8]>),
    Connected(Arc<dyn Handler>, Arc<dyn Connection>),
    Done(Completion, Result<Vec<OpResult>, TransportError>),
    Disconnected(
        Arc<dyn Handler>,
        Arc<dyn Connection>,
        TransportError,
        Vec<Completion>,
    ),
    Call(Box<dyn FnOnce() + Send>),
}

impl After {
    pub(super) fn run(self) {
        match self {
            Self::Nothing => {}
            Self::Message(handler, conn, message) => {
                handler.message(&conn, &message);
            }
            Self::Connected(handler, conn) => handler.connected(&conn),
            Self::Done(done, result) => done(result),
            Self::Disconnected(handler, conn, why, completions) => {
                for done in completions {
                    done(Err(match &why {
                        e @ (TransportError::Disconnected { .. } | TransportError::Shutdown) => e.clone(),
                        other => disconnected(&conn.peer_addr(), &other.to_string()),
                    }));
                }
                handler.disconnected(&conn, &why);
            }
            Self::Call(call) => call(),
        }
    }
}

pub(super) fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

impl State {
    pub(super) fn new(seed: u64, config: SimConfig) -> Self {
        Self {
            now: 0,
            seq: 0,
            rng: Rng::new(seed),
            config,
            queue: BTreeMap::new(),
            endpoints: Vec::new(),
            pairs: BTreeMap::new(),
            next: 1,
        }
    }

    pub(super) fn add(
        &mut self,
        config: &FabricConfig,
        handler: Arc<dyn Handler>,
    ) -> (EndpointId, u64, Arc<Counters>) {
        let counters = Arc::new(Counters::default());
        self.endpoints.push(EndpointState {
            addr: config.listen.clone(),
            key: config.key.clone(),
            identity: config.identity.clone(),
            counters: Arc::clone(&counters),
            handler,
            regions: HashMap::new(),
            up: true,
        });
        (self.endpoints.len() - 1, self.unique(), counters)
    }

    pub(super) fn step(&mut self) -> Option<After> {
        let ((at, _), what) = self.queue.pop_first()?;
        self.now = self.now.max(at);
        Some(match what {
            What::Arrive { pair, from, parcel } => self.arrive(pair, from, parcel),
            What::Call(call) => After::Call(call),
        })
    }

    /// Lets the next parcel of the lane from `end` arrive now.
    pub(super) fn pull(&mut self, pair: PairId, end: End) -> Option<After> {
        let in_lane = |what: &What| match what {
            What::Arrive {
                pair: p,
                from,
                parcel,
            } => *p == pair && *from == end && !matches!(parcel, Parcel::Results { .. } | Parcel::Down(_)),
            What::Call(_) => false,
        };
        let key = *self.queue.iter().find(|(_, what)| in_lane(what))?.0;
        match self.queue.remove(&key)? {
            What::Arrive { pair, from, parcel } => Some(self.arrive(pair, from, parcel)),
            What::Call(call) => Some(After::Call(call)),
        }
    }

    pub(super) fn crash(&mut self, addr: &str) {
        let Some(id) = self.find(addr) else { return };
        self.endpoints[id].up = false;
        self.endpoints[id].regions.clear();
        let pairs: Vec<PairId> = self.pairs.keys().copied().collect();
        for pair in pairs {
            for end in 0..2 {
                if self.pairs.get(&pair).is_some_and(|p| p.ends[end].endpoint == id) {
                    self.crash_end(pair, end);
                }
            }
        }
    }

    /// Counts a peer turned away.
    pub(super) fn wrong_key(&self, id: EndpointId) {
        common::count(&self.endpoints[id].counters.wrong_keys, 1);
    }

    pub(super) fn identity(&self, id: EndpointId) -> Vec<u8> {
        self.endpoints[id].identity.clone()
    }

    pub(super) fn set_identity(&mut self, id: EndpointId, identity: Vec<u8>) {
        self.endpoints[id].identity = identity;
    }

    pub(super) fn unique(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub(super) fn schedule(&mut self, at: u64, what: What) {
        self.seq += 1;
        self.queue.insert((at, self.seq), what);
    }

    pub(super) fn is_up(&self, endpoint: EndpointId) -> bool {
        self.endpoints[endpoint].up
    }

    pub(super) fn alive(&self, pair: PairId, end: End) -> bool {
        self.pairs.get(&pair).is_some_and(|p| p.ends[end].alive)
    }

    /// Why operations of this end fail.
    pub(super) fn dead(&self, pair: PairId, end: End) -> TransportError {
        let Some(pair) = self.pairs.get(&pair) else {
            return disconnected("the peer", "closed");
        };
        let addr = &self.endpoints[pair.ends[1 - end].endpoint].addr;
        match &pair.ends[end].why {
            Some(e @ (TransportError::Disconnected { .. } | TransportError::Shutdown)) => e.clone(),
            Some(other) => disconnected(addr, &other.to_string()),
            None => disconnected(addr, "closed"),
        }
    }

    /// Puts something into the lane from `end`.
    pub(super) fn ship(&mut self, pair: PairId, end: End, parcel: Parcel) {
        let delay = self
            .rng
            .between(nanos(self.config.min_delay), nanos(self.config.max_delay));
        let now = self.now;
        let lane = usize::from(matches!(parcel, Parcel::Results { .. }));
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        let last = &mut state.ends[end].last[lane];
        *last = (*last).max(now.saturating_add(delay));
        let at = *last;
        self.schedule(
            at,
            What::Arrive {
                pair,
                from: end,
                parcel,
            },
        );
    }

    /// Notes a batch and ships its operations.
    pub(super) fn ship_batch(&mut self, pair: PairId, end: End, ops: Vec<AsyncOp>, done: Completion) {
        let batch = self.unique();
        let count = ops.len();
        if let Some(state) = self.pairs.get_mut(&pair) {
            state.ends[end].batches.insert(batch, (Some(done), Vec::new()));
        }
        if count == 0 {
            self.ship(
                pair,
                1 - end,
                Parcel::Results {
                    batch,
                    results: Ok(Vec::new()),
                },
            );
        }
        for (i, op) in ops.into_iter().enumerate() {
            self.ship(
                pair,
                end,
                Parcel::Op {
                    op,
                    batch,
                    last: i + 1 == count,
                },
            );
        }
    }

    fn dynamic(&self, pair: PairId, end: End) -> Option<(Arc<dyn Handler>, Arc<dyn Connection>)> {
        let state = &self.pairs.get(&pair)?.ends[end];
        let handler = Arc::clone(&self.endpoints[state.endpoint].handler);
        Some((handler, Arc::clone(state.conn.as_ref()?) as _))
    }

    fn arrive(&mut self, pair: PairId, from: End, parcel: Parcel) -> After {
        let to = 1 - from;
        let Some(state) = self.pairs.get(&pair) else {
            return After::Nothing;
        };
        if !self.endpoints[state.ends[to].endpoint].up {
            return After::Nothing;
        }
        if let Parcel::Down(why) = parcel {
            return self.end(pair, to, why);
        }
        if !state.ends[to].alive {
            return After::Nothing;
        }
        match parcel {
            Parcel::Message(message) => match self.dynamic(pair, to) {
                Some((handler, conn)) => {
                    self.received(pair, to, message.len());
                    After::Message(handler, conn, message)
                }
                None => After::Nothing,
            },
            Parcel::Connected => match self.dynamic(pair, to) {
                Some((handler, conn)) => After::Connected(handler, conn),
                None => After::Nothing,
            },
            Parcel::Op { op, batch, last } => {
                self.take_op(pair, from, &op, batch, last);
                After::Nothing
            }
            Parcel::Results { batch, results } => {
                let taken = self
                    .pairs
                    .get_mut(&pair)
                    .and_then(|p| p.ends[to].batches.remove(&batch));
                let failed = results.as_ref().err().cloned();
                let after = match taken {
                    Some((Some(done), _)) => After::Done(done, results),
                    _ => After::Nothing,
                };
                if let Some(why) = failed {
                    self.down_both(pair, &why);
                }
                after
            }
            Parcel::Down(_) => After::Nothing,
        }
    }

    fn received(&self, pair: PairId, end: End, bytes: usize) {
        if let Some(end) = self.pairs.get(&pair).map(|p| &p.ends[end]) {
            self.endpoints[end.endpoint].counters.received(bytes);
            if let Some(conn) = &end.conn {
                conn.counters.received(bytes);
            }
        }
    }

    /// Counters of the endpoint at this end.
    pub(super) fn counters(&self, pair: PairId, end: End) -> Option<&Counters> {
        let endpoint = self.pairs.get(&pair)?.ends[end].endpoint;
        Some(&self.endpoints[endpoint].counters)
    }

    /// An operation takes effect at the target.
    fn take_op(&mut self, pair: PairId, from: End, op: &AsyncOp, batch: u64, last: bool) {
        let Some(state) = self.pairs.get(&pair) else {
            return;
        };
        let target = state.ends[1 - from].endpoint;
        let result = match op {
            AsyncOp::ReadWords { at, words } => {
                let words = *words as usize;
                self.on_region(
                    target,
                    *at,
                    words * 8,
                    |a| a.read,
                    |mem, off| {
                        let word = |i| Ok(mem.word(off + i * 8)?.load(Ordering::SeqCst));
                        (0..words)
                            .map(word)
                            .collect::<Result<_, TransportError>>()
                            .map(OpResult::Words)
                    },
                )
            }
            AsyncOp::Cas { at, expect, new } => self.cas(target, *at, *expect, *new).map(OpResult::Old),
            AsyncOp::Faa { at, add } => self.faa(target, *at, *add).map(OpResult::Old),
        };
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        let end = &mut state.ends[1 - from];
        match result {
            Ok(result) => {
                end.gathering.push(result);
                if last {
                    let results = std::mem::take(&mut end.gathering);
                    self.ship(
                        pair,
                        1 - from,
                        Parcel::Results {
                            batch,
                            results: Ok(results),
                        },
                    );
                }
            }
            Err(error) => {
                // In error from now on: nothing behind the failed operation arrives.
                end.alive = false;
                end.why = Some(error.clone());
                self.ship(
                    pair,
                    1 - from,
                    Parcel::Results {
                        batch,
                        results: Err(error),
                    },
                );
            }
        }
    }

    pub(super) fn execute_one(
        &mut self,
        pair: PairId,
        end: End,
        op: &mut Op<'_>,
    ) -> Result<(), TransportError> {
        let dead = self.dead(pair, end);
        let Some(state) = self.pairs.get(&pair) else {
            return Err(dead);
        };
        let target = state.ends[1 - end].endpoint;
        // A target that has closed or died cannot be told from one whose end has already been seen.
        if !state.ends[end].alive || !state.ends[1 - end].alive || !self.endpoints[target].up {
            return Err(dead);
        }
        match op {
            Op::Read { at, into } => self.on_region(
                target,
                *at,
                into.len(),
                |a| a.read,
                |mem, off| mem.read_at(off, into),
            ),
            Op::Write { at, from } => self.on_region(
                target,
                *at,
                from.len(),
                |a| a.write,
                |mem, off| mem.write_at(off, from),
            ),
            Op::Cas { at, expect, new, old } => self.cas(target, *at, *expect, *new).map(|v| *old = v),
            Op::Faa { at, add, old } => self.faa(target, *at, *add).map(|v| *old = v),
        }
    }

    fn cas(&self, target: EndpointId, at: RemoteAddr, expect: u64, new: u64) -> Result<u64, TransportError> {
        self.on_region(
            target,
            at,
            8,
            |a| a.atomic,
            |mem, off| {
                Ok(
                    match mem
                        .word(off)?
                        .compare_exchange(expect, new, Ordering::SeqCst, Ordering::SeqCst)
                    {
                        Ok(old) | Err(old) => old,
                    },
                )
            },
        )
    }

    fn faa(&self, target: EndpointId, at: RemoteAddr, add: u64) -> Result<u64, TransportError> {
        self.on_region(
            target,
            at,
            8,
            |a| a.atomic,
            |mem, off| Ok(mem.word(off)?.fetch_add(add, Ordering::SeqCst)),
        )
    }

    fn on_region<R>(
        &self,
        target: EndpointId,
        at: RemoteAddr,
        len: usize,
        permits: impl Fn(Access) -> bool,
        act: impl FnOnce(&SharedMem, usize) -> Result<R, TransportError>,
    ) -> Result<R, TransportError> {
        let refused = |why: &str| Err(remote_access(at, len as u64, why));
        let Some((mem, access)) = self.endpoints[target].regions.get(&at.key.0) else {
            return refused("no such region");
        };
        if !permits(*access) {
            return refused("the region does not permit this");
        }
        match usize::try_from(at.offset) {
            Ok(off) if mem.contains(off, len) => act(mem, off),
            _ => refused("outside of the region"),
        }
    }

    /// This end is told that the connection is over; once.
    fn end(&mut self, pair: PairId, end: End, why: TransportError) -> After {
        let dynamic = self.dynamic(pair, end);
        let Some(state) = self.pairs.get_mut(&pair) else {
            return After::Nothing;
        };
        let end = &mut state.ends[end];
        end.alive = false;
        let why = end.why.get_or_insert(why).clone();
        let completions = std::mem::take(&mut end.batches)
            .into_values()
            .filter_map(|(done, _)| done)
            .collect();
        end.conn = None;
        let over = state
            .ends
            .iter()
            .all(|e| e.conn.is_none() || !self.endpoints[e.endpoint].up);
        if over {
            self.pairs.remove(&pair);
        }
        match dynamic {
            Some((handler, conn)) => After::Disconnected(handler, conn, why, completions),
            None => After::Nothing,
        }
    }

    /// This end closes: nothing of the other end takes effect here any more; what this end has sent arrives.
    pub(super) fn close_end(&mut self, pair: PairId, end: End, why: TransportError) {
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        if !state.ends[end].alive || state.ends[end].ending {
            return;
        }
        state.ends[end].alive = false;
        state.ends[end].why = Some(why.clone());
        let addr = self.endpoints[state.ends[end].endpoint].addr.clone();
        self.tell(pair, 1 - end, disconnected(&addr, "the peer has gone"));
        self.tell_from(pair, 1 - end, end, why);
    }

    /// `to` learns behind everything else in its lane that the connection is over.
    fn tell(&mut self, pair: PairId, to: End, why: TransportError) {
        self.tell_from(pair, 1 - to, to, why);
    }

    fn tell_from(&mut self, pair: PairId, from: End, to: End, why: TransportError) {
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        if state.ends[to].ending {
            return;
        }
        state.ends[to].ending = true;
        self.ship(pair, from, Parcel::Down(why));
    }

    /// An operation has failed: both ends are in error.
    pub(super) fn down_both(&mut self, pair: PairId, why: &TransportError) {
        for end in 0..2 {
            let Some(state) = self.pairs.get_mut(&pair) else {
                return;
            };
            state.ends[end].alive = false;
            state.ends[end].why.get_or_insert_with(|| why.clone());
            self.tell(pair, end, why.clone());
        }
    }

    /// The endpoint of this end has died.
    fn crash_end(&mut self, pair: PairId, end: End) {
        let under_way: Vec<(u64, u64)> = self
            .queue
            .iter()
            .filter(|(_, w)| matches!(w, What::Arrive { pair: p, from, .. } if *p == pair && *from == end))
            .map(|(k, _)| *k)
            .collect();
        let kept = self.rng.between(0, under_way.len() as u64) as usize;
        for key in &under_way[kept..] {
            self.queue.remove(key);
        }
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        state.ends[end].alive = false;
        // A `Down` that was under way may have been among what was lost.
        state.ends[1 - end].ending = false;
        let addr = self.endpoints[state.ends[end].endpoint].addr.clone();
        if state.ends[1 - end].conn.is_some() {
            self.tell(pair, 1 - end, disconnected(&addr, "the peer has died"));
        }
    }

    /// Ends everything of an endpoint that shuts down; its own callbacks follow at once.
    pub(super) fn shutdown(&mut self, endpoint: EndpointId) -> Vec<After> {
        if !self.endpoints[endpoint].up {
            return Vec::new();
        }
        let pairs: Vec<PairId> = self.pairs.keys().copied().collect();
        let mut after = Vec::new();
        for pair in pairs {
            for end in 0..2 {
                if self
                    .pairs
                    .get(&pair)
                    .is_some_and(|p| p.ends[end].endpoint == endpoint)
                {
                    let addr = self.endpoints[endpoint].addr.clone();
                    self.tell(pair, 1 - end, disconnected(&addr, "the peer has gone"));
                    after.push(self.end(pair, end, TransportError::Shutdown));
                }
            }
        }
        self.endpoints[endpoint].up = false;
        self.endpoints[endpoint].regions.clear();
        after
    }

    pub(super) fn find(&self, addr: &str) -> Option<EndpointId> {
        self.endpoints.iter().position(|e| e.up && e.addr == addr)
    }

    pub(super) fn target(&self, id: EndpointId) -> (Vec<u8>, Arc<dyn Handler>) {
        (
            self.endpoints[id].key.clone(),
            Arc::clone(&self.endpoints[id].handler),
        )
    }

    pub(super) fn register(
        &mut self,
        id: EndpointId,
        mem: &Arc<SharedMem>,
        access: Access,
    ) -> Result<RegionKey, TransportError> {
        if !self.endpoints[id].up {
            return Err(TransportError::Shutdown);
        }
        let key = (1 << 63) | self.unique() << 12;
        self.endpoints[id].regions.insert(key, (Arc::clone(mem), access));
        Ok(RegionKey(key))
    }

    pub(super) fn deregister(&mut self, id: EndpointId, key: RegionKey) -> bool {
        self.endpoints[id].regions.remove(&key.0).is_some()
    }

    /// Adds a connection; its listening end learns of it through the lane.
    pub(super) fn pair(
        &mut self,
        net: &NetRef,
        from: (EndpointId, ConnId),
        to: (EndpointId, ConnId),
        identities: [Vec<u8>; 2],
        peer: Peer,
    ) -> Arc<SimConn> {
        let id = self.unique();
        let superseded: Vec<PairId> = self
            .pairs
            .iter()
            .filter(|(_, p)| p.ends[1].endpoint == to.0 && p.ends[1].alive && p.peer.superseded_by(&peer))
            .map(|(id, _)| *id)
            .collect();
        for old in superseded {
            let why = disconnected(
                &self.endpoints[from.0].addr,
                "replaced by a newer connection of the same peer",
            );
            self.close_end(old, 1, why);
        }
        let [ours, theirs] = identities;
        let conn = |end: End, id_at: ConnId, identity: Vec<u8>, addr: String| {
            Arc::new(SimConn::new(net.clone(), (id, end), id_at, identity, addr))
        };
        let connecting = conn(0, from.1, theirs, self.endpoints[to.0].addr.clone());
        let listening = conn(1, to.1, ours, self.endpoints[from.0].addr.clone());
        let state = |endpoint, conn| EndState {
            endpoint,
            conn: Some(conn),
            alive: true,
            ending: false,
            why: None,
            last: [0; 2],
            batches: BTreeMap::new(),
            gathering: Vec::new(),
        };
        let ends = [state(from.0, Arc::clone(&connecting)), state(to.0, listening)];
        self.pairs.insert(id, Pair { ends, peer });
        self.ship(id, 0, Parcel::Connected);
        connecting
    }

    /// Serials of the live connections `from` has made to `to`.
    pub(super) fn links(&self, from: EndpointId, to: EndpointId) -> Vec<u64> {
        let ours = self
            .pairs
            .values()
            .filter(|p| p.ends[0].endpoint == from && p.ends[1].endpoint == to && p.ends[0].alive);
        ours.map(|p| p.peer.serial).collect()
    }
}
