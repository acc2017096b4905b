//! The state of the simulated network: who is connected, what is under way, what takes effect when.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use rt::chance::Chance;

use super::config::SimConfig;
use super::place::{Clock, Nobody};
use super::remote::{RemoteOp, RemoteResult, outcome};
use super::room::Room;
use crate::common::{disconnected, ended};
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::stats;
use crate::stats::Counters;
use crate::{
    Access, AsyncOp, BatchError, Completion, Connection, FabricConfig, Handler, Outcome, RegionKey,
    TransportError,
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
        op: RemoteOp,
        batch: u64,
        last: bool,
    },
    Message(Box<[u8]>),
    /// A message of the other end has been dealt with.
    Credit,
    /// Results of a batch, on their way back.
    Results {
        batch: u64,
        results: Result<Vec<RemoteResult>, TransportError>,
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

/// A batch that an end waits for.
pub(super) struct Batch {
    pub(super) done: Completion,
    pub(super) ops: Vec<AsyncOp>,
}

pub(super) struct EndState {
    pub(super) endpoint: EndpointId,
    pub(super) conn: Option<Arc<dyn Connection>>,
    counters: Arc<Counters>,
    pub(super) room: Arc<Room>,
    pub(super) alive: bool,
    /// Its `Down` is under way or has come.
    pub(super) ending: bool,
    pub(super) why: Option<TransportError>,
    /// When the last parcel of each lane from here arrives: requests and messages, results.
    pub(super) last: [u64; 2],
    pub(super) batches: BTreeMap<u64, Batch>,
    /// Results gathered here for the other end's batch.
    pub(super) gathering: Vec<RemoteResult>,
}

pub(super) struct Pair {
    pub(super) ends: [EndState; 2],
    pub(super) peer: Peer,
}

pub(super) struct EndpointState {
    pub(super) addr: String,
    pub(super) key: Vec<u8>,
    pub(super) identity: Vec<u8>,
    pub(super) counters: Arc<Counters>,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) regions: HashMap<u64, (Arc<SharedMem>, Access)>,
    pub(super) up: bool,
    /// Where its thread finds what it is to call; none where the test calls.
    pub(super) inbox: Option<Inbox>,
}

/// One end of a connection to be: itself, what it counts, and what it may send.
pub(super) type NewEnd = (Arc<dyn Connection>, Arc<Counters>, Arc<Room>);

/// What an endpoint's thread is to call, and for which end of which connection.
pub(super) type Inbox = rt::channel::Sender<((PairId, End), After)>;

impl EndpointState {
    /// Nothing of it is called any more, and it is not kept for that.
    pub(super) fn go_down(&mut self) {
        self.up = false;
        self.regions.clear();
        self.inbox = None;
        self.handler = Arc::new(Nobody);
    }
}

pub(super) struct State {
    pub(super) now: u64,
    pub(super) seq: u64,
    pub(super) chance: Chance,
    pub(super) config: SimConfig,
    pub(super) queue: BTreeMap<(u64, u64), What>,
    pub(super) endpoints: Vec<EndpointState>,
    pub(super) pairs: BTreeMap<PairId, Pair>,
    pub(super) next: u64,
    /// Told of events to come, where a thread waits for them.
    pub(super) clock: Option<Arc<Clock>>,
}

/// What to do once the state is unlocked again.
pub(super) enum After {
    Nothing,
    Message(Arc<dyn Handler>, Arc<dyn Connection>, Box<[u8]>),
    Connected(Arc<dyn Handler>, Arc<dyn Connection>),
    Done(Completion, Outcome),
    Disconnected(Arc<dyn Handler>, Arc<dyn Connection>, TransportError, Vec<Batch>),
    Call(Box<dyn FnOnce() + Send>),
    /// The endpoint's thread is to end.
    Stop,
}

impl After {
    pub(super) fn run(self) {
        match self {
            Self::Nothing | Self::Stop => {}
            Self::Message(handler, conn, message) => {
                handler.message(&conn, &message);
            }
            Self::Connected(handler, conn) => handler.connected(&conn),
            Self::Done(done, result) => done(result),
            Self::Disconnected(handler, conn, why, batches) => {
                for batch in batches {
                    (batch.done)(Err(BatchError::unstarted(
                        ended(&conn.peer_addr(), &why),
                        batch.ops,
                    )));
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
            chance: Chance::new(seed),
            config,
            queue: BTreeMap::new(),
            endpoints: Vec::new(),
            pairs: BTreeMap::new(),
            next: 1,
            clock: None,
        }
    }

    /// The time it is.
    pub(super) fn look(&mut self) -> u64 {
        if let Some(clock) = &self.clock {
            self.now = self.now.max(nanos(clock.began.elapsed()));
        }
        self.now
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
            inbox: None,
        });
        (self.endpoints.len() - 1, self.unique(), counters)
    }

    pub(super) fn step(&mut self) -> Option<After> {
        let ((at, _), what) = self.queue.pop_first()?;
        self.now = self.now.max(at);
        Some(self.happen(what))
    }

    fn happen(&mut self, what: What) -> After {
        let (pair, from, parcel) = match what {
            What::Arrive { pair, from, parcel } => (pair, from, parcel),
            What::Call(call) => return After::Call(call),
        };
        let to = 1 - from;
        let endpoint = self.pairs.get(&pair).map(|p| p.ends[to].endpoint);
        let after = self.arrive(pair, from, parcel);
        match endpoint.and_then(|id| self.endpoints[id].inbox.as_ref()) {
            Some(inbox) if !matches!(after, After::Nothing) => {
                // It has no end while the endpoint is up.
                let _ = inbox.send(((pair, to), after));
                After::Nothing
            }
            _ => after,
        }
    }

    /// Lets the next parcel of the lane from `end` arrive now.
    pub(super) fn pull(&mut self, pair: PairId, end: End) -> Option<After> {
        let in_lane = |what: &What| match what {
            What::Arrive {
                pair: p,
                from,
                parcel,
            } => {
                *p == pair
                    && *from == end
                    && !matches!(parcel, Parcel::Results { .. } | Parcel::Credit | Parcel::Down(_))
            }
            What::Call(_) => false,
        };
        let key = *self.queue.iter().find(|(_, what)| in_lane(what))?.0;
        let what = self.queue.remove(&key)?;
        Some(self.happen(what))
    }

    pub(super) fn crash(&mut self, addr: &str) {
        let Some(id) = self.find(addr) else { return };
        self.endpoints[id].go_down();
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
        stats::count(&self.endpoints[id].counters.wrong_keys, 1);
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
        if let Some(clock) = &self.clock {
            clock.changed.notify_all();
        }
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
            Some(why) => ended(addr, why),
            None => disconnected(addr, "closed"),
        }
    }

    /// Puts something into the lane from `end`.
    pub(super) fn ship(&mut self, pair: PairId, end: End, parcel: Parcel) {
        let delay = self
            .chance
            .between(nanos(self.config.min_delay), nanos(self.config.max_delay));
        let now = self.look();
        let lane = usize::from(matches!(parcel, Parcel::Results { .. } | Parcel::Credit));
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
        let remote: Vec<RemoteOp> = if let Some(state) = self.pairs.get_mut(&pair) {
            let remote = ops.iter().map(RemoteOp::of).collect();
            state.ends[end].batches.insert(batch, Batch { done, ops });
            remote
        } else {
            Vec::new()
        };
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
        for (i, op) in remote.into_iter().enumerate() {
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

    pub(super) fn dynamic(&self, pair: PairId, end: End) -> Option<(Arc<dyn Handler>, Arc<dyn Connection>)> {
        let state = &self.pairs.get(&pair)?.ends[end];
        let handler = Arc::clone(&self.endpoints[state.endpoint].handler);
        Some((handler, Arc::clone(state.conn.as_ref()?)))
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
                    Some(batch) => After::Done(batch.done, outcome(batch.ops, results)),
                    None => After::Nothing,
                };
                if let Some(why) = failed {
                    self.down_both(pair, &why);
                }
                after
            }
            Parcel::Credit => {
                let (room, most) = (Arc::clone(&state.ends[to].room), self.config.room);
                // On this end's own thread, as with adapters: while that waits for something, nothing is sent.
                After::Call(Box::new(move || room.give(most)))
            }
            Parcel::Down(_) => After::Nothing,
        }
    }

    fn received(&self, pair: PairId, end: End, bytes: usize) {
        if let Some(end) = self.pairs.get(&pair).map(|p| &p.ends[end]) {
            self.endpoints[end.endpoint].counters.received(bytes);
            if end.conn.is_some() {
                end.counters.received(bytes);
            }
        }
    }

    /// Counters of the endpoint at this end.
    pub(super) fn counters(&self, pair: PairId, end: End) -> Option<&Counters> {
        let endpoint = self.pairs.get(&pair)?.ends[end].endpoint;
        Some(&self.endpoints[endpoint].counters)
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

    /// Adds a connection, both ends with their counters; its listening end learns of it through the lane.
    pub(super) fn pair(
        &mut self,
        id: PairId,
        from: (EndpointId, NewEnd),
        to: (EndpointId, NewEnd),
        peer: Peer,
    ) {
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
        let state = |(endpoint, (conn, counters, room))| EndState {
            endpoint,
            conn: Some(conn),
            counters,
            room,
            alive: true,
            ending: false,
            why: None,
            last: [0; 2],
            batches: BTreeMap::new(),
            gathering: Vec::new(),
        };
        let ends = [state(from), state(to)];
        self.pairs.insert(id, Pair { ends, peer });
        self.ship(id, 0, Parcel::Connected);
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
