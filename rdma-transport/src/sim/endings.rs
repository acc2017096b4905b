//! How connections end: closed, in error, shut down, or crashed.

use super::state::{After, End, EndpointId, Pair, PairId, Parcel, State, What};
use crate::TransportError;
use crate::common::disconnected;

impl State {
    /// This end is told that the connection is over; once.
    pub(super) fn end(&mut self, pair: PairId, end: End, why: TransportError) -> After {
        let dynamic = self.dynamic(pair, end);
        let Some(state) = self.pairs.get_mut(&pair) else {
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
            self.pairs.remove(&pair);
        }
        match dynamic {
            Some((handler, conn)) => After::Disconnected(handler, conn, why, batches),
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
    pub(super) fn tell(&mut self, pair: PairId, to: End, why: TransportError) {
        self.tell_from(pair, 1 - to, to, why);
    }

    pub(super) fn tell_from(&mut self, pair: PairId, from: End, to: End, why: TransportError) {
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

    /// Of what this end has sent only a random first part still arrives.
    fn lose(&mut self, pair: PairId, end: End) {
        let under_way: Vec<(u64, u64)> = self
            .queue
            .iter()
            .filter(|(_, w)| matches!(w, What::Arrive { pair: p, from, .. } if *p == pair && *from == end))
            .map(|(k, _)| *k)
            .collect();
        let kept = self.chance.between(0, under_way.len() as u64) as usize;
        for key in &under_way[kept..] {
            self.queue.remove(key);
        }
        if let Some(state) = self.pairs.get_mut(&pair) {
            // A `Down` that was under way may have been among what was lost.
            state.ends[1 - end].ending = false;
        }
    }

    /// All connections between two endpoints break.
    pub(super) fn cut(&mut self, ends: [EndpointId; 2]) {
        let between = |pair: &Pair| {
            let [a, b] = &pair.ends;
            [a.endpoint, b.endpoint] == ends || [b.endpoint, a.endpoint] == ends
        };
        let pairs: Vec<PairId> = self
            .pairs
            .iter()
            .filter(|(_, pair)| between(pair))
            .map(|(id, _)| *id)
            .collect();
        for pair in pairs {
            self.lose(pair, 0);
            self.lose(pair, 1);
            self.down_both(pair, &disconnected("the peer", "the link was cut"));
        }
    }

    /// The endpoint of this end has died.
    pub(super) fn crash_end(&mut self, pair: PairId, end: End) {
        self.lose(pair, end);
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        state.ends[end].alive = false;
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
        self.endpoints[endpoint].go_down();
        after
    }
}
