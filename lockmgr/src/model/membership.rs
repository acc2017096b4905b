//! Deaths in the model, and what is done about them.
//!
//! The membership service is one that does everything at once, but each node hears of it when it does: a fence (nothing of the node
//! reaches the memory any more), the epoch at each of the living, the recovery once all have got there, the end at each of them. What
//! a dead node had sent may still arrive, or not.

use super::node::Node;
use super::options::{NODES, Options, Problem};
use super::state::State;
use super::view::{Change, Place};
use crate::fsm::Event;
use crate::ids::NodeId;

impl State {
    pub(super) fn alive(&self, i: usize) -> bool {
        self.membership.fenced >> i & 1 == 0
    }

    fn living(&self) -> impl Iterator<Item = usize> + '_ {
        (0..NODES).filter(|&i| self.alive(i))
    }

    /// What happens by itself.
    pub(super) fn due(&self) -> Vec<Change> {
        let m = &self.membership;
        let mut due = Vec::new();
        for i in self.living().filter(|&i| self.nodes[i].place.epoch < m.epoch) {
            due.push(Change::Epoch(i));
        }
        let there = |i: usize| {
            let place = &self.nodes[i].place;
            place.epoch == m.epoch && place.settled && self.living().all(|j| place.unheard[j] == 0)
        };
        if m.recovered != m.fenced && self.living().all(there) {
            due.push(Change::Recover);
        }
        if m.recovered == m.fenced {
            let told = |&i: &usize| self.nodes[i].place.epoch == m.epoch && self.nodes[i].place.dead != 0;
            due.extend(self.living().filter(told).map(Change::Resume));
        }
        due
    }

    /// What may happen, or not.
    pub(super) fn possible(&self) -> Vec<Change> {
        let m = &self.membership;
        let mut possible = Vec::new();
        if m.crashes > 0 {
            possible.extend(self.living().map(Change::Fence));
        }
        let over = |i: usize| self.nodes[i].place.epoch == m.epoch && self.nodes[i].place.dead == 0;
        if m.restarts > 0 && m.recovered == m.fenced && self.living().all(over) {
            possible.extend((0..NODES).filter(|&i| !self.alive(i)).map(Change::Rejoin));
        }
        possible
    }

    pub(super) fn change(&mut self, options: &Options, change: Change) {
        match change {
            Change::Fence(i) => self.fence(i),
            Change::Epoch(i) => {
                let dead = self.membership.fenced & !self.membership.recovered;
                // Nothing that the dead of earlier epochs have sent is taken any more.
                for former in (0..NODES).filter(|&d| self.membership.recovered >> d & 1 == 1) {
                    self.channels[former][i].clear();
                }
                let place = &mut self.nodes[i].place;
                *place = Place {
                    epoch: self.membership.epoch,
                    dead,
                    ..Place::default()
                };
                if let Some(version) = self.nodes[i].versions.kept {
                    self.nodes[i].push(version);
                }
                self.event(options, i, Event::Epoch);
            }
            Change::Recover => self.recover(options),
            Change::Resume(i) => {
                self.nodes[i].place.dead = 0;
                for dead in (0..NODES).filter(|&d| !self.alive(d)).collect::<Vec<_>>() {
                    self.channels[dead][i].clear();
                }
                self.event(options, i, Event::Resume);
            }
            Change::Rejoin(i) => {
                self.membership.restarts -= 1;
                self.membership.fenced &= !(1 << i);
                self.membership.recovered &= !(1 << i);
                let place = Place {
                    epoch: self.membership.epoch,
                    ..Place::default()
                };
                self.nodes[i] = Node {
                    incarnation: self.nodes[i].incarnation + 1,
                    place,
                    ..Node::new(1)
                };
            }
        }
    }

    /// Nothing of the node happens any more, and what it had changed and not stored is lost.
    fn fence(&mut self, i: usize) {
        self.membership.crashes -= 1;
        self.membership.epoch += 1;
        self.membership.fenced |= 1 << i;
        self.store_fresh |= self.nodes[i].modified;
        self.nodes[i] = Node {
            incarnation: self.nodes[i].incarnation,
            ..Node::new(0)
        };
        for j in 0..NODES {
            self.channels[j][i].clear();
            self.nodes[j].place.unheard[i] = 0;
        }
    }

    fn recover(&mut self, options: &Options) {
        let dead = self.membership.fenced;
        self.membership.recovered = dead;
        let near = self.word.near & !u16::from(dead);
        let far = self.word.far;
        if self.word.writer.is_some_and(|w| dead >> w.0 & 1 == 1) {
            // What the living have stored and handed to the dead the authority must have by now.
            if options.confirm
                && self
                    .nodes
                    .iter()
                    .any(|node| node.versions.stored > self.confirmed)
            {
                self.fail(Problem::Unconfirmed);
            }
            self.word = self.word.freed_after_death();
            // The authority's attributes are the ones of this version.
            self.confirmed = self.confirmed.max(self.word.version);
        }
        self.word = self.word.read_by(near, far);
        self.bits &= !dead;
    }

    /// Notes which nodes have nothing of earlier epochs under way any more.
    pub(super) fn note_settled(&mut self, options: &Options) {
        if self.membership.recovered == self.membership.fenced {
            return;
        }
        for i in 0..NODES {
            let place = &self.nodes[i].place;
            if !self.alive(i) || place.epoch != self.membership.epoch || place.settled {
                continue;
            }
            let cfg = self.config(options, i);
            if self.nodes[i].fsm.holds_up_epoch(&cfg) || !self.nodes[i].versions.confirm.is_empty() {
                continue;
            }
            let lens = std::array::from_fn(|j| {
                if self.alive(j) {
                    self.channels[i][j].len() as u8
                } else {
                    0
                }
            });
            let place = &mut self.nodes[i].place;
            place.settled = true;
            place.unheard = lens;
        }
    }

    /// Who is dead has nothing left of it in the record.
    pub(super) fn is_forgotten(&self, i: usize) -> bool {
        !self.bit(i) && self.word.writer != Some(NodeId(i as u16))
    }
}
