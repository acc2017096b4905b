//! Batches of unknown outcome.
//!
//! When the connection to the storage node breaks, some prefix of the batch in flight has taken effect. Once
//! a new connection exists, and nothing of the old one can land any more, the record tells which: only this
//! node changes its own bit, and only the owner changes a word that names it. So the bit, and whether the
//! word names this node, are stable from the break until this node acts again, and reading the record is
//! enough; it need not even be read in one piece.

use super::Fsm;
use super::batch::{Batch, BatchKind, BatchState, Outcome, WordOp, WordOps};
use super::types::{Action, Config, Flaw};
use super::violation::Violation;

impl Fsm {
    pub(super) fn batch_lost(&mut self) -> Result<(), Violation> {
        let batch = self.batch.as_mut().ok_or(Violation::NotNow)?;
        batch.state = BatchState::Unknown;
        Ok(())
    }

    pub(super) fn reconnected(&mut self, out: &mut Vec<Action>) {
        if let Some(batch) = &mut self.batch
            && batch.state == BatchState::Unknown
        {
            batch.state = BatchState::Reconciling;
            out.push(Action::Post(WordOps::two(WordOp::ReadOwner, WordOp::ReadHolders)));
        }
    }

    /// The record has been read after the batch was lost: goes on with what is left of it.
    pub(super) fn reconcile(
        &mut self,
        cfg: &Config,
        batch: Batch,
        read: &Outcome,
        out: &mut Vec<Action>,
    ) -> Result<(), Violation> {
        let owner = read.owner.ok_or(Violation::BadOutcome)?;
        let holders = read.holders.clone().ok_or(Violation::BadOutcome)?;
        if cfg.flaw(Flaw::RepostAll) {
            self.repost(batch.kind, batch.ops, out);
            return Ok(());
        }
        let bit = if cfg.is_near() {
            owner.near_holders().contains(cfg.node)
        } else {
            holders.contains(cfg.node)
        };
        let bit_done = batch
            .ops
            .iter()
            .all(|op| op.bit().is_none_or(|wanted| wanted == bit));
        let done = match batch.kind {
            // A swap of the flag is repeated if need be: what counts is the word as it is now.
            BatchKind::SharedAcquire | BatchKind::ClearBit => bit_done,
            // Unless it names us, the swap has not happened. If the word is still as expected it may
            // succeed now; else it fails, and what was read is what it would have found.
            BatchKind::ExclusiveAcquire => batch.ops.cas().is_some_and(|(expect, _)| owner != expect),
            BatchKind::HandOver | BatchKind::Free | BatchKind::FreeKeep => {
                let from = batch.ops.moved().ok_or(Violation::BadOutcome)?;
                if owner.owners_part() != from {
                    if !bit_done {
                        return Err(Violation::ReleaseFailed);
                    }
                    // Whoever changed the word since, it was after we moved it.
                    let outcome = Outcome {
                        owner: Some(from),
                        ..Outcome::default()
                    };
                    return self.complete(cfg, batch, outcome, out);
                }
                if bit_done {
                    let rest = batch.ops.iter().find(|op| matches!(op, WordOp::Move { .. }));
                    let ops = rest.map_or(batch.ops, WordOps::one);
                    self.repost(batch.kind, ops, out);
                    return Ok(());
                }
                false
            }
        };
        if done {
            let outcome = Outcome {
                owner: Some(owner),
                holders: Some(holders),
                bit: None,
            };
            return self.complete(cfg, batch, outcome, out);
        }
        self.repost(batch.kind, batch.ops, out);
        Ok(())
    }

    fn repost(&mut self, kind: BatchKind, ops: WordOps, out: &mut Vec<Action>) {
        self.batch = Some(Batch {
            kind,
            ops,
            state: BatchState::InFlight,
        });
        out.push(Action::Post(ops));
    }
}
