//! Batches of the state machine as operations of the fabric.

use rdma_transport::{AsyncOp, OpResult, RemoteAddr};

use crate::fsm::{Outcome, Violation, WordOp, WordOps};
use crate::ids::NodeId;
use crate::record::{OwnerWord, RecordLayout};

/// The operations on the record at `base`.
pub(crate) fn operations(
    ops: &WordOps,
    base: RemoteAddr,
    layout: RecordLayout,
    node: NodeId,
) -> Vec<AsyncOp> {
    let (offset, bit) = layout.holder_bit(node);
    let add = |on: bool| if on { bit } else { bit.wrapping_neg() };
    ops.iter()
        .map(|op| match op {
            WordOp::SetBit => AsyncOp::Faa {
                at: base.plus(offset),
                add: add(true),
            },
            WordOp::ClearBit => AsyncOp::Faa {
                at: base.plus(offset),
                add: add(false),
            },
            WordOp::Move { from, to, bit } => {
                // What overflows does so out of the top of the word.
                let moved = to
                    .owners_part()
                    .encode()
                    .wrapping_sub(from.owners_part().encode());
                AsyncOp::Faa {
                    at: base.plus(RecordLayout::OWNER),
                    add: moved.wrapping_add(bit.map_or(0, add)),
                }
            }
            WordOp::Cas { expect, new } => AsyncOp::Cas {
                at: base.plus(RecordLayout::OWNER),
                expect: expect.encode(),
                new: new.encode(),
            },
            WordOp::ReadOwner => AsyncOp::ReadWords {
                at: base.plus(RecordLayout::OWNER),
                words: 1,
            },
            WordOp::ReadHolders => AsyncOp::ReadWords {
                at: base.plus(RecordLayout::HOLDERS),
                words: layout.map_words(),
            },
        })
        .collect()
}

/// What the results of `ops` say.
pub(crate) fn outcome(
    ops: &WordOps,
    results: &[OpResult],
    layout: RecordLayout,
    node: NodeId,
) -> Result<Outcome, Violation> {
    let (offset, bit) = layout.holder_bit(node);
    let near = offset == RecordLayout::OWNER;
    let mut outcome = Outcome::default();
    let mut results = results.iter();
    for op in ops.iter() {
        match (op, results.next()) {
            (WordOp::SetBit | WordOp::ClearBit, Some(OpResult::Old(old))) => {
                outcome.bit = Some(old & bit != 0);
                if near {
                    outcome.owner = Some(OwnerWord::decode(*old));
                }
            }
            (WordOp::Move { bit: change, .. }, Some(OpResult::Old(old))) => {
                outcome.owner = Some(OwnerWord::decode(*old));
                if change.is_some() {
                    outcome.bit = Some(old & bit != 0);
                }
            }
            (WordOp::Cas { .. }, Some(OpResult::Old(old))) => outcome.owner = Some(OwnerWord::decode(*old)),
            (WordOp::ReadOwner, Some(OpResult::Words(words))) => {
                let word = words.first().ok_or(Violation::BadOutcome)?;
                outcome.owner = Some(OwnerWord::decode(*word));
            }
            (WordOp::ReadHolders, Some(OpResult::Words(words)))
                if words.len() == layout.map_words() as usize =>
            {
                outcome.holders = Some(layout.set(words));
            }
            _ => return Err(Violation::BadOutcome),
        }
    }
    Ok(outcome)
}
