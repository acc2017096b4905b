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
            // The node knew of the epoch, and of this record's upgrade, before the record was told: what the dead had granted is
            // dropped first, or this record would hold the epoch up, which the upgrade waits for.
            Phase::Paused if self.search.tainted => self.begin_drop(Phase::LostUpgrade { to: None }, out),
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

#[cfg(test)]
mod tests {
    use crate::fsm::{Event, Outcome};
    use crate::ids::{Mode, NodeId, NodeSet};
    use crate::msg::Body;
    use crate::record::OwnerWord;

    use super::*;

    fn found(owner: OwnerWord, bit: bool) -> Event {
        Event::BatchDone(Outcome {
            owner: Some(owner),
            bit: Some(bit),
            ..Outcome::default()
        })
    }

    /// The manager knows of an epoch for all records before each of them is told: a reader that asks for more in between still lets
    /// go of what one of the dead has granted to it, or the epoch would wait for it, and it for the epoch.
    #[test]
    fn an_upgrade_that_begins_with_the_epoch_does_not_hold_it_up() {
        let (mut cfg, mut fsm, mut out) = (Config::new(NodeId(0), 1), Fsm::new(), Vec::new());
        let owner = OwnerWord::owned(NodeId(1), 1, 0);
        let granted = Event::Message {
            from: NodeId(1),
            incarnation: 1,
            epoch: 0,
            body: Body::GrantS {
                version: 1,
                payload: None,
            },
        };
        let before = [
            Event::Want(Mode::Shared),
            found(owner, false),
            found(owner, true),
            granted,
            found(owner, false),
            Event::Used,
        ];
        for event in before {
            fsm.apply(&cfg, event, &mut out).unwrap();
        }
        assert_eq!(fsm.held(), Some(Mode::Shared));
        cfg.epoch = 1;
        cfg.dead = NodeSet::from_iter([NodeId(1)]);
        fsm.apply(&cfg, Event::Want(Mode::Exclusive), &mut out).unwrap();
        out.clear();
        fsm.apply(&cfg, Event::Epoch, &mut out).unwrap();
        assert_eq!(out, [Action::Invalidate]);
        assert!(
            fsm.holds_up_epoch(&cfg),
            "what the dead had granted is still used"
        );
        fsm.apply(&cfg, Event::Invalidated, &mut out).unwrap();
        assert!(!fsm.holds_up_epoch(&cfg));
        assert_eq!((fsm.held(), fsm.wanted()), (None, Some(Mode::Exclusive)));
        // Its bit is cleared.
        fsm.apply(&cfg, found(owner, true), &mut out).unwrap();
        cfg.dead = NodeSet::new();
        out.clear();
        fsm.apply(&cfg, Event::Resume, &mut out).unwrap();
        assert!(matches!(out[..], [Action::Post(_)]), "it asks again: {out:?}");
    }
}
