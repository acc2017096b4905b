//! Connections, and what is under way in their lanes.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::event::{Batch, End, EndpointId, PairId, Parcel, What};
use super::remote::{RemoteOp, RemoteResult};
use super::room::Room;
use super::schedule::Schedule;
use crate::common::disconnected;
use crate::handshake::Peer;
use crate::stats::Counters;
use crate::{AsyncOp, Completion, Connection, TransportError};

pub struct EndState {
    pub endpoint: EndpointId,
    pub conn: Option<Arc<dyn Connection>>,
    pub counters: Arc<Counters>,
    pub room: Arc<Room>,
    pub alive: bool,
    /// Its `Down` is under way or has come.
    pub ending: bool,
    pub why: Option<TransportError>,
    /// When the last parcel of each lane from here arrives: requests and messages, results.
    pub last: [u64; 2],
    pub batches: BTreeMap<u64, Batch>,
    /// Results gathered here for the other end's batch.
    pub gathering: Vec<RemoteResult>,
}

pub struct Pair {
    pub ends: [EndState; 2],
    pub peer: Peer,
    /// By the end that it comes from: what waits until the link is there again in that direction; none while it is there.
    pub held: [Option<Vec<Parcel>>; 2],
}

impl Pair {
    /// The end at the first of two endpoints, where the other end is at the second.
    fn end_at(&self, [from, to]: [EndpointId; 2]) -> Option<End> {
        let is = |end: End| self.ends[end].endpoint == from && self.ends[1 - end].endpoint == to;
        (0..2).find(|end| is(*end))
    }
}

/// One end of a connection to be: itself, what it counts, and what it may send.
pub type NewEnd = (Arc<dyn Connection>, Arc<Counters>, Arc<Room>);

impl EndState {
    pub fn new(endpoint: EndpointId, (conn, counters, room): NewEnd) -> Self {
        Self {
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
        }
    }
}

/// All connections, and the events of all.
pub struct Lanes {
    pub pairs: BTreeMap<PairId, Pair>,
    pub schedule: Schedule,
}

impl Lanes {
    pub fn alive(&self, pair: PairId, end: End) -> bool {
        self.pairs.get(&pair).is_some_and(|p| p.ends[end].alive)
    }

    /// Puts something into the lane from `end`.
    pub fn ship(&mut self, pair: PairId, end: End, parcel: Parcel) {
        if let Some(state) = self.pairs.get_mut(&pair)
            && let Some(held) = &mut state.held[end]
        {
            // An end that has closed, or was told of an error, hears of that whatever the link does.
            let local = matches!(parcel, Parcel::Down(_)) && !state.ends[1 - end].alive;
            if !local {
                return held.push(parcel);
            }
        }
        let delay = self.schedule.delay();
        let now = self.schedule.look();
        let lane = usize::from(matches!(parcel, Parcel::Results { .. } | Parcel::Credit));
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        let last = &mut state.ends[end].last[lane];
        *last = (*last).max(now.saturating_add(delay));
        let at = *last;
        self.schedule.add(
            at,
            What::Arrive {
                pair,
                from: end,
                parcel,
            },
        );
    }

    /// Notes a batch and ships its operations.
    pub fn ship_batch(
        &mut self,
        batch: u64,
        (pair, end): (PairId, End),
        ops: Vec<AsyncOp>,
        done: Completion,
    ) {
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

    /// `to` learns behind everything else in its lane that the connection is over.
    pub fn tell(&mut self, pair: PairId, to: End, why: TransportError) {
        self.tell_from(pair, 1 - to, to, why);
    }

    pub fn tell_from(&mut self, pair: PairId, from: End, to: End, why: TransportError) {
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
    pub fn down_both(&mut self, pair: PairId, why: &TransportError) {
        for end in 0..2 {
            let Some(state) = self.pairs.get_mut(&pair) else {
                return;
            };
            state.ends[end].alive = false;
            state.ends[end].why.get_or_insert_with(|| why.clone());
            self.tell(pair, end, why.clone());
        }
    }

    /// All connections between two endpoints break; of what was under way a random first part of each direction arrives.
    pub fn cut(&mut self, ends: [EndpointId; 2]) {
        for pair in self.between(ends) {
            self.lose(pair, 0);
            self.lose(pair, 1);
            self.down_both(pair, &disconnected("the peer", "the link was cut"));
        }
    }

    fn between(&self, ends: [EndpointId; 2]) -> Vec<PairId> {
        let pairs = self.pairs.iter().filter(|(_, pair)| pair.end_at(ends).is_some());
        pairs.map(|(id, _)| *id).collect()
    }

    /// Nothing more goes from the first of two endpoints to the second, and neither is told.
    pub fn hold(&mut self, ends: [EndpointId; 2]) {
        for state in self.pairs.values_mut() {
            if let Some(end) = state.end_at(ends) {
                state.held[end].get_or_insert_default();
            }
        }
    }

    /// What was held goes on.
    pub fn release(&mut self, ends: [EndpointId; 2]) {
        for pair in self.between(ends) {
            let Some(state) = self.pairs.get_mut(&pair) else {
                continue;
            };
            let Some(end) = state.end_at(ends) else { continue };
            for parcel in state.held[end].take().into_iter().flatten() {
                self.ship(pair, end, parcel);
            }
        }
    }

    /// Does what this end sends not arrive?
    pub fn is_held(&self, pair: PairId, end: End) -> bool {
        self.pairs
            .get(&pair)
            .is_some_and(|state| state.held[end].is_some())
    }

    /// Of what this end has sent only a random first part still arrives.
    pub fn lose(&mut self, pair: PairId, end: End) {
        self.schedule.lose(pair, end);
        if let Some(state) = self.pairs.get_mut(&pair) {
            // What a link without an end has taken is the last that was sent.
            if let Some(held) = &mut state.held[end] {
                held.clear();
            }
            // A `Down` that was under way may have been among what was lost.
            state.ends[1 - end].ending = false;
        }
    }

    /// The ends of connections that are at an endpoint.
    pub fn ends_of(&self, endpoint: EndpointId) -> Vec<(PairId, End)> {
        let all = self.pairs.iter();
        let all =
            all.flat_map(|(id, pair)| pair.ends.iter().enumerate().map(|(end, state)| (*id, end, state)));
        all.filter(|(_, _, state)| state.endpoint == endpoint)
            .map(|(id, end, _)| (id, end))
            .collect()
    }

    /// Serials of the live connections `from` has made to `to`.
    pub fn links(&self, from: EndpointId, to: EndpointId) -> Vec<u64> {
        let ours = self
            .pairs
            .values()
            .filter(|p| p.ends[0].endpoint == from && p.ends[1].endpoint == to && p.ends[0].alive);
        ours.map(|p| p.peer.serial).collect()
    }
}
