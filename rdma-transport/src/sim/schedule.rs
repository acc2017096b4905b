//! What takes effect when.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rt::chance::Chance;

use super::config::SimConfig;
use super::event::{End, PairId, Parcel, What};
use super::place::Clock;

pub fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// Events to come, in the order in which they happen.
pub struct Schedule {
    now: u64,
    seq: u64,
    chance: Chance,
    config: SimConfig,
    queue: BTreeMap<(u64, u64), What>,
    /// Told of events to come, where a thread waits for them.
    pub clock: Option<Arc<Clock>>,
}

impl Schedule {
    pub fn new(seed: u64, config: SimConfig) -> Self {
        Self {
            now: 0,
            seq: 0,
            chance: Chance::new(seed),
            config,
            queue: BTreeMap::new(),
            clock: None,
        }
    }

    /// Messages that a peer has room for.
    pub fn room(&self) -> usize {
        self.config.room
    }

    /// The time of the last event.
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The time it is.
    pub fn look(&mut self) -> u64 {
        if let Some(clock) = &self.clock {
            self.now = self
                .now
                .max(nanos(rt::time::for_all().saturating_sub(clock.origin)));
        }
        self.now
    }

    /// How long something is on its way.
    pub fn delay(&mut self) -> u64 {
        self.chance
            .between(nanos(self.config.min_delay), nanos(self.config.max_delay))
    }

    /// One or the other.
    pub fn toss(&mut self) -> bool {
        self.chance.between(0, 1) == 0
    }

    pub fn add(&mut self, at: u64, what: What) {
        self.seq += 1;
        self.queue.insert((at, self.seq), what);
        if let Some(clock) = &self.clock {
            clock.changed.notify_all();
        }
    }

    /// When the next event is due.
    pub fn next(&self) -> Option<u64> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// The next event, which happens now.
    pub fn pop(&mut self) -> Option<What> {
        let ((at, _), what) = self.queue.pop_first()?;
        self.now = self.now.max(at);
        Some(what)
    }

    /// The next parcel of the lane from `end`, out of its turn.
    pub fn pull(&mut self, pair: PairId, end: End) -> Option<What> {
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
        self.queue.remove(&key)
    }

    /// Loses what `end` has under way, but for a random first part.
    pub fn lose(&mut self, pair: PairId, end: End) {
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
    }
}
