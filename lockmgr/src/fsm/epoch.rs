//! What a death changes for those that live.
//!
//! The membership goes through every epoch in four steps: the dead are fenced, so that nothing of them reaches a record any more;
//! every living node is told ([`Event::Epoch`](super::Event::Epoch)) and answers when nothing of its own dealings with earlier
//! epochs is under way; the words and bits of the dead are taken back; every living node is told that
//! ([`Event::Resume`](super::Event::Resume)). Between the two nothing new is acquired: whatever asks afterwards finds a record
//! without the dead, nobody remembers what was asked before, and no word comes to name one of the dead once they are looked for.

use super::Fsm;
use super::batch::BatchKind;
use super::types::{Action, Answer, Config, Flaw, Phase};
use crate::ids::Mode;

impl Answer {
    /// Leaves the dead out of a hand-over, and those who wait since an earlier epoch.
    pub(super) fn leave_out(&mut self, cfg: &Config) {
        if let Self::Exclusive { granted, queue, .. } = self {
            for dead in cfg.dead.iter() {
                granted.remove(dead);
            }
            queue.retain(|w| w.epoch >= cfg.epoch || cfg.flaw(Flaw::QueueOutlivesEpoch));
        }
    }
}

impl Fsm {
    /// Must the node not say yet that it has reached the epoch? A word that is being handed over may come to name one of the dead,
    /// or its receiver must hear of it before it asks again; an acquisition in flight may have seen the dead in the record.
    #[must_use]
    pub fn holds_up_epoch(&self, cfg: &Config) -> bool {
        let under_way = self.batch.as_ref().is_some_and(|batch| {
            matches!(
                batch.kind,
                BatchKind::HandOver | BatchKind::SharedAcquire | BatchKind::ExclusiveAcquire
            )
        });
        self.search.tainted || (under_way && !cfg.flaw(Flaw::BatchOutlivesEpoch))
    }

    /// Nothing comes from the dead any more, and everybody who waits asks again later.
    pub(super) fn epoch(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        if !cfg.flaw(Flaw::QueueOutlivesEpoch) {
            self.own.queue.clear();
        }
        let handing = matches!(self.phase, Phase::HandingOver { .. });
        for dead in cfg.dead.iter() {
            // Whether the word says that there are far readers has been decided.
            if !handing {
                self.own.granted.remove(dead);
            }
            self.answers.remove(dead);
            self.revokers.remove(dead);
        }
        let is_dead = |node| cfg.dead.contains(node);
        self.search.last_owner.take_if(|node| is_dead(*node));
        if !cfg.flaw(Flaw::GrantOfDeadKept) {
            // What the dead granted nobody else knows. What they handed over is in the word.
            self.search.via.take_if(|via| is_dead(via.granter));
            self.search
                .deferred
                .take_if(|(from, answer)| is_dead(*from) && matches!(answer, Answer::Shared { .. }));
        }
        if let Some((_, answer)) = &mut self.search.deferred {
            answer.leave_out(cfg);
        }
        self.search.tainted |= self.held == Some(Mode::Shared)
            && self.search.granted_by.is_some_and(is_dead)
            && !cfg.flaw(Flaw::GrantOfDeadKept);
        match self.phase {
            Phase::LostUpgrade { .. } => self.phase = Phase::LostUpgrade { to: None },
            Phase::Revoking if self.answers.is_empty() => self.become_exclusive(out),
            Phase::Granting if self.answers.is_empty() => self.next_step(cfg, out),
            _ => {}
        }
    }

    /// Everybody has forgotten what was asked in earlier epochs: it is asked again.
    pub(super) fn resume(&mut self, cfg: &Config) {
        if let Phase::Waiting { .. } | Phase::Paused = self.phase
            && self.search.deferred.is_none()
            && !cfg.flaw(Flaw::NotAskedAgain)
        {
            self.search.asking = false;
            self.search.deferred = Some((cfg.node, Answer::Retry));
        }
    }
}
