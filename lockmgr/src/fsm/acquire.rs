//! How a lease is got: the two acquisition batches, waiting, and what the answers lead to.

use super::Fsm;
use super::batch::{Batch, BatchKind, BatchState, Outcome, WordOp, WordOps};
use super::types::{Action, Answer, Config, Flaw, Phase, Readers, Via};
use super::violation::Violation;
use crate::ids::{Mode, NodeId, NodeSet};
use crate::msg::Body;
use crate::record::OwnerWord;

impl Fsm {
    pub(super) fn post(&mut self, kind: BatchKind, ops: WordOps, out: &mut Vec<Action>) {
        debug_assert!(self.batch.is_none(), "one batch at a time");
        for bit in ops.iter().filter_map(WordOp::bit) {
            self.bit = bit;
        }
        self.batch = Some(Batch {
            kind,
            ops,
            state: BatchState::InFlight,
        });
        out.push(Action::Post(ops));
    }

    /// Asks the last owner known instead of finding out from the record: between nodes that take turns it is right, and
    /// a round trip to the record is saved.
    pub(super) fn ask(&mut self, mode: Mode, owner: NodeId, out: &mut Vec<Action>) {
        self.phase = Phase::Waiting { at: owner };
        self.search.asking = true;
        out.push(Action::Send {
            to: owner,
            body: Body::Ask(mode),
        });
    }

    /// Nothing more comes from this node. If it was asked on a guess, the record is looked at instead; if it had
    /// granted or named this node already, that is found there.
    pub(super) fn gone(&mut self, cfg: &Config, node: NodeId, out: &mut Vec<Action>) {
        if self.search.last_owner == Some(node) {
            self.search.last_owner = None;
        }
        if self.search.asking && self.phase == (Phase::Waiting { at: node }) {
            self.search.asking = false;
            self.start(cfg, out);
        }
    }

    /// Starts, or starts again, what is wanted.
    pub(super) fn start(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        self.search.via = None;
        if self.want.is_some() && cfg.is_recovering() && !cfg.flaw(Flaw::AcquiredWhileRecovering) {
            self.phase = Phase::Paused;
            return;
        }
        self.phase = Phase::Acquiring;
        match self.want {
            Some(Mode::Shared) => self.post_shared(cfg, out),
            Some(Mode::Exclusive) => {
                let own = if self.bit && cfg.is_near() {
                    1 << cfg.node.0
                } else {
                    0
                };
                let expect = OwnerWord::free(self.last_version)
                    .read_by(self.search.seen.near | own, self.search.seen.far);
                self.post_exclusive(cfg, expect, out);
            }
            None => self.phase = Phase::Rest,
        }
    }

    fn post_shared(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        self.phase = Phase::Acquiring;
        let ops = if cfg.is_near() {
            WordOps::one(WordOp::SetBit)
        } else {
            WordOps::two(WordOp::SetBit, WordOp::ReadOwner)
        };
        self.post(BatchKind::SharedAcquire, ops, out);
    }

    /// Takes the word if it is as expected, readers included: they are who has to let go.
    fn post_exclusive(&mut self, cfg: &Config, expect: OwnerWord, out: &mut Vec<Action>) {
        let new =
            OwnerWord::owned(cfg.node, cfg.incarnation, expect.version).read_by(expect.near, expect.far);
        let cas = WordOp::Cas { expect, new };
        let ops = if expect.far {
            WordOps::two(cas, WordOp::ReadHolders)
        } else {
            WordOps::one(cas)
        };
        self.post(BatchKind::ExclusiveAcquire, ops, out);
    }

    pub(super) fn batch_done(
        &mut self,
        cfg: &Config,
        mut outcome: Outcome,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        match self.batch.take() {
            None => Err(Violation::NotNow),
            Some(batch) if batch.state == BatchState::Reconciling => {
                self.reconcile(cfg, batch, &outcome, out)
            }
            Some(batch) => {
                for wanted in batch.ops.iter().filter_map(WordOp::bit) {
                    // A carry or borrow out of somebody's bit shows up here, if anywhere.
                    if outcome.bit.ok_or(Violation::BadOutcome)? == wanted {
                        return Err(Violation::BitChanged);
                    }
                }
                if let (BatchKind::SharedAcquire, Some((expect, new))) = (batch.kind, batch.ops.cas())
                    && outcome.owner == Some(expect)
                {
                    outcome.owner = Some(new);
                }
                self.complete(cfg, batch, outcome, out)
            }
        }
    }

    /// The batch has taken effect, with this outcome.
    pub(super) fn complete(
        &mut self,
        cfg: &Config,
        batch: Batch,
        outcome: Outcome,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let owner = outcome.owner.ok_or(Violation::BadOutcome);
        match batch.kind {
            BatchKind::SharedAcquire => self.shared_done(cfg, owner?, out),
            BatchKind::ExclusiveAcquire => {
                let (expect, _) = batch.ops.cas().ok_or(Violation::BadOutcome)?;
                self.exclusive_done(cfg, expect, owner?, outcome.holders, out)
            }
            BatchKind::ClearBit => {
                if self.phase == Phase::ClearingBit {
                    self.phase = Phase::Rest;
                }
                Ok(())
            }
            BatchKind::HandOver | BatchKind::Free | BatchKind::FreeKeep => {
                let from = batch.ops.moved().ok_or(Violation::BadOutcome)?;
                if owner?.owners_part() != from {
                    return Err(Violation::ReleaseFailed);
                }
                self.released(cfg, batch.kind, out);
                Ok(())
            }
        }
    }

    fn shared_done(
        &mut self,
        cfg: &Config,
        owner: OwnerWord,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        if owner.writer.is_none() && !owner.far && !cfg.is_near() && !cfg.flaw(Flaw::FarUnsaid) {
            // Whoever takes the word without this flag would not look at the bit of this node.
            let cas = WordOp::Cas {
                expect: owner,
                new: owner.read_by(owner.near, true),
            };
            self.post(BatchKind::SharedAcquire, WordOps::one(cas), out);
            return Ok(());
        }
        let via = self.search.via.take();
        let granter = via.as_ref().map(|v| v.granter);
        let held = match owner.writer {
            None => true,
            Some(w) if Some(w) == granter => true,
            Some(w) if w == cfg.node => return Err(Violation::NamedWithoutCause),
            Some(_) => false,
        };
        // Either the bit is seen by whoever takes the word next, or it is on its way off and nothing is
        // held: the granter need not wait any longer in both cases.
        if let Some(to) = granter {
            out.push(Action::Send { to, body: Body::Ack });
        }
        match (held, owner.writer) {
            (true, writer) => {
                // The granter frees the word, and moves its version, only later.
                let from_grant = writer.is_some() && !cfg.flaw(Flaw::VersionFromWord);
                let version = match &via {
                    Some(v) if from_grant => v.version,
                    _ => owner.version,
                };
                let payload = via.and_then(|v| v.payload).filter(|_| writer.is_some());
                self.held = Some(Mode::Shared);
                self.used = false;
                self.want = None;
                self.phase = Phase::Rest;
                self.last_version = version;
                self.search.seen = Readers::in_word(owner);
                self.search.granted_by = writer;
                out.push(Action::Granted {
                    mode: Mode::Shared,
                    version,
                    payload,
                });
            }
            (false, Some(writer)) => {
                self.post(BatchKind::ClearBit, WordOps::one(WordOp::ClearBit), out);
                self.want_from(cfg, writer, Mode::Shared, out);
            }
            (false, None) => return Err(Violation::BadOutcome),
        }
        Ok(())
    }

    fn exclusive_done(
        &mut self,
        cfg: &Config,
        expect: OwnerWord,
        found: OwnerWord,
        holders: Option<NodeSet>,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let mine = found.writer == Some(cfg.node) && found.incarnation == cfg.incarnation;
        if found == expect || mine {
            let mut readers = if cfg.flaw(Flaw::NearForgotten) {
                NodeSet::new()
            } else {
                found.near_holders()
            };
            match holders {
                Some(far) if found.far => readers.union(&far),
                // Handed over, and the message with it lost: the swap fails again, but shows the readers.
                None if found.far => {
                    self.post_exclusive(cfg, OwnerWord::free(found.version).read_by(found.near, true), out);
                    return Ok(());
                }
                _ => {}
            }
            self.own.word_version = found.version;
            self.own.word_far = found.far;
            self.own(cfg, readers, found.version, out);
            return Ok(());
        }
        match found.writer {
            None => self.post_exclusive(cfg, found, out),
            Some(to) if self.held.is_some() && !cfg.flaw(Flaw::LoserKeepsShared) => {
                let to = Some(to).filter(|_| !cfg.is_recovering());
                self.begin_drop(Phase::LostUpgrade { to }, out);
            }
            Some(to) => self.wait_for(cfg, to, out),
        }
        Ok(())
    }

    /// Waits for the owner found in the word. While leases of the dead are taken back that may be one of them, and everybody asks
    /// again afterwards anyhow.
    fn want_from(&mut self, cfg: &Config, to: NodeId, mode: Mode, out: &mut Vec<Action>) {
        if cfg.is_recovering() && !cfg.flaw(Flaw::AcquiredWhileRecovering) {
            self.phase = Phase::Paused;
            return;
        }
        self.phase = Phase::Waiting { at: to };
        out.push(Action::Send {
            to,
            body: Body::Want(mode),
        });
    }

    /// The word went to somebody else, but who that was may be dead by now.
    pub(super) fn look_again(&mut self, cfg: &Config, out: &mut Vec<Action>) {
        if self.bit {
            self.post(BatchKind::ClearBit, WordOps::one(WordOp::ClearBit), out);
        }
        self.phase = Phase::Paused;
        self.retry_all(out);
        if !cfg.is_recovering() {
            self.resume(cfg);
        }
    }

    /// The word went to somebody else: queue there, and send away those who queued here.
    pub(super) fn wait_for(&mut self, cfg: &Config, writer: NodeId, out: &mut Vec<Action>) {
        if self.bit && self.held.is_none() {
            self.post(BatchKind::ClearBit, WordOps::one(WordOp::ClearBit), out);
        }
        self.want_from(cfg, writer, Mode::Exclusive, out);
        self.retry_all(out);
    }

    /// The word is ours, the data have this version. Exclusive, unless somebody may still hold it shared.
    pub(super) fn own(&mut self, cfg: &Config, holders: NodeSet, version: u64, out: &mut Vec<Action>) {
        self.own.new_version = version;
        let mut pending = holders;
        pending.remove(cfg.node);
        for dead in cfg.dead.iter() {
            pending.remove(dead);
        }
        if pending.is_empty() {
            self.become_exclusive(out);
            return;
        }
        self.phase = Phase::Revoking;
        for to in pending.iter() {
            out.push(Action::Send {
                to,
                body: Body::Revoke,
            });
        }
        self.answers = pending;
    }

    pub(super) fn become_exclusive(&mut self, out: &mut Vec<Action>) {
        self.held = Some(Mode::Exclusive);
        self.search.tainted = false;
        self.search.granted_by = None;
        self.search.last_owner = None;
        self.used = false;
        self.want = None;
        self.phase = Phase::Rest;
        self.last_version = self.own.new_version;
        out.push(Action::Granted {
            mode: Mode::Exclusive,
            version: self.own.new_version,
            payload: self.payload.take(),
        });
    }

    /// Acts upon the answer to a WANT; the own bit is off.
    pub(super) fn take_answer(
        &mut self,
        cfg: &Config,
        from: NodeId,
        answer: Answer,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        match answer {
            Answer::Shared { version, payload } => {
                self.search.via = Some(Via {
                    granter: from,
                    version,
                    payload,
                });
                self.post_shared(cfg, out);
            }
            Answer::Exclusive {
                version,
                granted,
                far,
                queue,
                payload,
            } => {
                if self
                    .own
                    .queue
                    .iter()
                    .any(|own| queue.iter().any(|w| w.node == own.node))
                {
                    return Err(Violation::QueuedTwice);
                }
                let own = std::mem::replace(&mut self.own.queue, queue);
                self.own.queue.extend(own);
                self.own.word_version = version;
                self.own.word_far = far && !cfg.flaw(Flaw::FarForgotten);
                self.payload = payload;
                let granted = if cfg.flaw(Flaw::GrantedForgotten) {
                    NodeSet::new()
                } else {
                    granted
                };
                self.own(cfg, granted, version, out);
            }
            Answer::Retry => self.start(cfg, out),
        }
        Ok(())
    }
}
