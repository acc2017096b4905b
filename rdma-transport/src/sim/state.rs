//! The state of the simulated network: its endpoints, and their connections.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::SimConfig;
use super::event::{After, End, EndpointId, Inbox, PairId, Parcel, What};
use super::lanes::{EndState, Lanes, NewEnd, Pair};
use super::place::Nobody;
use super::regions::Regions;
use super::remote::{RemoteOp, outcome};
use super::schedule::Schedule;
use crate::common::{disconnected, ended};
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::stats;
use crate::stats::Counters;
use crate::{Access, AsyncOp, Completion, Connection, FabricConfig, Handler, Op, RegionKey, TransportError};

pub struct EndpointState {
    pub addr: String,
    pub key: Vec<u8>,
    pub identity: Vec<u8>,
    pub counters: Arc<Counters>,
    pub handler: Arc<dyn Handler>,
    pub regions: Regions,
    pub up: bool,
    /// Where its thread finds what it is to call; none where the test calls.
    pub inbox: Option<Inbox>,
}

impl EndpointState {
    /// Nothing of it is called any more, and it is not kept for that.
    pub fn go_down(&mut self) {
        self.up = false;
        self.regions.0.clear();
        self.inbox = None;
        self.handler = Arc::new(Nobody);
    }
}

pub struct State {
    pub endpoints: Vec<EndpointState>,
    pub lanes: Lanes,
    /// From which address to which nothing comes.
    apart: BTreeSet<[String; 2]>,
    next: u64,
}

impl State {
    pub fn new(seed: u64, config: SimConfig) -> Self {
        Self {
            endpoints: Vec::new(),
            lanes: Lanes {
                pairs: BTreeMap::new(),
                schedule: Schedule::new(seed, config),
            },
            apart: BTreeSet::new(),
            next: 1,
        }
    }

    /// Nothing comes from one address to another from now on, or it does again.
    pub fn set_silent(&mut self, [from, to]: [&str; 2], silent: bool) {
        // Also of those that have died: what they had sent last is still under way.
        let all = &self.endpoints;
        let at = |addr| (0..all.len()).filter(move |id: &EndpointId| all[*id].addr == addr);
        let ends: Vec<[EndpointId; 2]> = at(from).flat_map(|a| at(to).map(move |b| [a, b])).collect();
        let way = [from.to_owned(), to.to_owned()];
        if silent {
            self.apart.insert(way);
        } else {
            self.apart.remove(&way);
        }
        for ends in ends {
            if silent {
                self.lanes.hold(ends);
            } else {
                self.lanes.release(ends);
            }
        }
    }

    /// Does nothing come from one to the other?
    fn is_silent(&self, way: [&str; 2]) -> bool {
        self.apart.contains(&way.map(str::to_owned))
    }

    /// Is there no link between them, in one direction at least?
    pub fn are_apart(&self, [a, b]: [&str; 2]) -> bool {
        self.is_silent([a, b]) || self.is_silent([b, a])
    }

    /// Is there none in either?
    pub fn are_cut_off(&self, [a, b]: [&str; 2]) -> bool {
        self.is_silent([a, b]) && self.is_silent([b, a])
    }

    pub fn add(
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
            regions: Regions::default(),
            up: true,
            inbox: None,
        });
        (self.endpoints.len() - 1, self.unique(), counters)
    }

    pub fn step(&mut self) -> Option<After> {
        let what = self.lanes.schedule.pop()?;
        Some(self.happen(what))
    }

    fn happen(&mut self, what: What) -> After {
        let (pair, from, parcel) = match what {
            What::Arrive { pair, from, parcel } => (pair, from, parcel),
            What::Call(call) => return After::Call(call),
        };
        let to = 1 - from;
        let endpoint = self.lanes.pairs.get(&pair).map(|p| p.ends[to].endpoint);
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
    pub fn pull(&mut self, pair: PairId, end: End) -> Option<After> {
        let what = self.lanes.schedule.pull(pair, end)?;
        Some(self.happen(what))
    }

    pub fn crash(&mut self, addr: &str) {
        let Some(id) = self.find(addr) else { return };
        self.endpoints[id].go_down();
        for (pair, end) in self.lanes.ends_of(id) {
            self.crash_end(pair, end);
        }
    }

    /// Counts a peer turned away.
    pub fn wrong_key(&self, id: EndpointId) {
        stats::count(&self.endpoints[id].counters.wrong_keys, 1);
    }

    pub fn identity(&self, id: EndpointId) -> Vec<u8> {
        self.endpoints[id].identity.clone()
    }

    pub fn set_identity(&mut self, id: EndpointId, identity: Vec<u8>) {
        self.endpoints[id].identity = identity;
    }

    pub fn unique(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    pub fn is_up(&self, endpoint: EndpointId) -> bool {
        self.endpoints[endpoint].up
    }

    /// Why operations of this end fail.
    pub fn dead(&self, pair: PairId, end: End) -> TransportError {
        let Some(pair) = self.lanes.pairs.get(&pair) else {
            return disconnected("the peer", "closed");
        };
        let addr = &self.endpoints[pair.ends[1 - end].endpoint].addr;
        match &pair.ends[end].why {
            Some(why) => ended(addr, why),
            None => disconnected(addr, "closed"),
        }
    }

    /// Notes a batch and ships its operations.
    pub fn ship_batch(&mut self, lane: (PairId, End), ops: Vec<AsyncOp>, done: Completion) {
        let batch = self.unique();
        self.lanes.ship_batch(batch, lane, ops, done);
    }

    pub fn dynamic(&self, pair: PairId, end: End) -> Option<(Arc<dyn Handler>, Arc<dyn Connection>)> {
        let state = &self.lanes.pairs.get(&pair)?.ends[end];
        let handler = Arc::clone(&self.endpoints[state.endpoint].handler);
        Some((handler, Arc::clone(state.conn.as_ref()?)))
    }

    fn arrive(&mut self, pair: PairId, from: End, parcel: Parcel) -> After {
        let to = 1 - from;
        let Some(state) = self.lanes.pairs.get(&pair) else {
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
                    .lanes
                    .pairs
                    .get_mut(&pair)
                    .and_then(|p| p.ends[to].batches.remove(&batch));
                let failed = results.as_ref().err().cloned();
                let after = match taken {
                    Some(batch) => After::Done(batch.done, outcome(batch.ops, results)),
                    None => After::Nothing,
                };
                if let Some(why) = failed {
                    self.lanes.down_both(pair, &why);
                }
                after
            }
            Parcel::Credit => {
                let (room, most) = (Arc::clone(&state.ends[to].room), self.lanes.schedule.room());
                // On this end's own thread, as with adapters: while that waits for something, nothing is sent.
                After::Call(Box::new(move || room.give(most)))
            }
            Parcel::Down(_) => After::Nothing,
        }
    }

    fn received(&self, pair: PairId, end: End, bytes: usize) {
        if let Some(end) = self.lanes.pairs.get(&pair).map(|p| &p.ends[end]) {
            self.endpoints[end.endpoint].counters.received(bytes);
            if end.conn.is_some() {
                end.counters.received(bytes);
            }
        }
    }

    /// Counters of the endpoint at this end.
    pub fn counters(&self, pair: PairId, end: End) -> Option<&Counters> {
        let endpoint = self.lanes.pairs.get(&pair)?.ends[end].endpoint;
        Some(&self.endpoints[endpoint].counters)
    }

    pub fn find(&self, addr: &str) -> Option<EndpointId> {
        self.endpoints.iter().position(|e| e.up && e.addr == addr)
    }

    pub fn target(&self, id: EndpointId) -> (Vec<u8>, Arc<dyn Handler>) {
        (
            self.endpoints[id].key.clone(),
            Arc::clone(&self.endpoints[id].handler),
        )
    }

    pub fn register(
        &mut self,
        id: EndpointId,
        mem: &Arc<SharedMem>,
        access: Access,
    ) -> Result<RegionKey, TransportError> {
        if !self.endpoints[id].up {
            return Err(TransportError::Shutdown);
        }
        let key = (1 << 63) | self.unique() << 12;
        self.endpoints[id]
            .regions
            .0
            .insert(key, (Arc::clone(mem), access));
        Ok(RegionKey(key))
    }

    pub fn deregister(&mut self, id: EndpointId, key: RegionKey) -> bool {
        self.endpoints[id].regions.0.remove(&key.0).is_some()
    }

    /// Adds a connection, both ends with their counters; its listening end learns of it through the lane.
    pub fn pair(&mut self, id: PairId, from: (EndpointId, NewEnd), to: (EndpointId, NewEnd), peer: Peer) {
        let superseded: Vec<PairId> = self
            .lanes
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
        let state = |(endpoint, end)| EndState::new(endpoint, end);
        let ends = [state(from), state(to)];
        let held = [None, None];
        self.lanes.pairs.insert(id, Pair { ends, peer, held });
        self.lanes.ship(id, 0, Parcel::Connected);
    }

    /// An operation takes effect at the target.
    pub fn take_op(&mut self, pair: PairId, from: End, op: &RemoteOp, batch: u64, last: bool) {
        let Some(state) = self.lanes.pairs.get(&pair) else {
            return;
        };
        let target = state.ends[1 - from].endpoint;
        let result = self.endpoints[target].regions.remote(op);
        let Some(state) = self.lanes.pairs.get_mut(&pair) else {
            return;
        };
        let end = &mut state.ends[1 - from];
        match result {
            Ok(result) => {
                end.gathering.push(result);
                if last {
                    let results = std::mem::take(&mut end.gathering);
                    self.lanes.ship(
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
                self.lanes.ship(
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

    pub fn execute_one(&mut self, pair: PairId, end: End, op: &mut Op<'_>) -> Result<(), TransportError> {
        let dead = self.dead(pair, end);
        let Some(state) = self.lanes.pairs.get(&pair) else {
            return Err(dead);
        };
        let target = state.ends[1 - end].endpoint;
        // A target that has closed or died cannot be told from one whose end has already been seen.
        if !state.ends[end].alive || !state.ends[1 - end].alive || !self.endpoints[target].up {
            return Err(dead);
        }
        self.endpoints[target].regions.execute(op)
    }

    /// This end is told that the connection is over; once.
    pub fn end(&mut self, pair: PairId, end: End, why: TransportError) -> After {
        let dynamic = self.dynamic(pair, end);
        let Some(state) = self.lanes.pairs.get_mut(&pair) else {
            return After::Nothing;
        };
        let end = &mut state.ends[end];
        end.alive = false;
        end.room.end();
        let why = end.why.get_or_insert(why).clone();
        let batches = std::mem::take(&mut end.batches).into_values().collect();
        end.conn = None;
        let over = state
            .ends
            .iter()
            .all(|e| e.conn.is_none() || !self.endpoints[e.endpoint].up);
        if over {
            self.lanes.pairs.remove(&pair);
        }
        match dynamic {
            Some((handler, conn)) => After::Disconnected(handler, conn, why, batches),
            None => After::Nothing,
        }
    }

    /// This end closes: nothing of the other end takes effect here any more; what this end has sent arrives.
    pub fn close_end(&mut self, pair: PairId, end: End, why: TransportError) {
        let Some(state) = self.lanes.pairs.get_mut(&pair) else {
            return;
        };
        if !state.ends[end].alive || state.ends[end].ending {
            return;
        }
        state.ends[end].alive = false;
        state.ends[end].why = Some(why.clone());
        let addr = self.endpoints[state.ends[end].endpoint].addr.clone();
        self.lanes
            .tell(pair, 1 - end, disconnected(&addr, "the peer has gone"));
        self.lanes.tell_from(pair, 1 - end, end, why);
    }

    /// The endpoint of this end has died.
    pub fn crash_end(&mut self, pair: PairId, end: End) {
        self.lanes.lose(pair, end);
        let Some(state) = self.lanes.pairs.get_mut(&pair) else {
            return;
        };
        state.ends[end].alive = false;
        let addr = self.endpoints[state.ends[end].endpoint].addr.clone();
        if state.ends[1 - end].conn.is_some() {
            self.lanes
                .tell(pair, 1 - end, disconnected(&addr, "the peer has died"));
        }
    }

    /// Ends everything of an endpoint that shuts down; its own callbacks follow at once.
    pub fn shutdown(&mut self, endpoint: EndpointId) -> Vec<After> {
        if !self.endpoints[endpoint].up {
            return Vec::new();
        }
        let addr = self.endpoints[endpoint].addr.clone();
        let mut after = Vec::new();
        for (pair, end) in self.lanes.ends_of(endpoint) {
            self.lanes
                .tell(pair, 1 - end, disconnected(&addr, "the peer has gone"));
            after.push(self.end(pair, end, TransportError::Shutdown));
        }
        self.endpoints[endpoint].go_down();
        after
    }
}
