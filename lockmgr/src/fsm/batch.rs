//! Batches of word operations, as the state machine sees them.

use crate::ids::NodeSet;
use crate::record::OwnerWord;

/// One remote operation on the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WordOp {
    /// Fetch-and-add that sets the own holder bit. A near one is in the owner word, which is thus seen as well.
    SetBit,
    /// Fetch-and-add that clears the own holder bit.
    ClearBit,
    /// Fetch-and-add by which the owner changes its part of the owner word, which nobody else changes, and its own holder
    /// bit if that is near. Unlike a compare-and-swap it does not mind near holders that come and go.
    Move {
        /// The owner's part as it is.
        from: OwnerWord,
        /// As it is to be.
        to: OwnerWord,
        /// The own near holder bit is set, or cleared.
        bit: Option<bool>,
    },
    /// Compare-and-swap of the owner word.
    Cas {
        /// Value it must have.
        expect: OwnerWord,
        /// Value it then gets.
        new: OwnerWord,
    },
    /// Read of the owner word.
    ReadOwner,
    /// Read of the far holders.
    ReadHolders,
}

impl WordOp {
    /// What it makes of the own holder bit.
    pub(super) fn bit(self) -> Option<bool> {
        match self {
            Self::SetBit => Some(true),
            Self::ClearBit => Some(false),
            Self::Move { bit, .. } => bit,
            _ => None,
        }
    }
}

/// The operations of a batch: one or two, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WordOps {
    /// The first.
    pub first: WordOp,
    /// The second.
    pub second: Option<WordOp>,
}

impl WordOps {
    pub(super) fn one(op: WordOp) -> Self {
        Self {
            first: op,
            second: None,
        }
    }

    pub(super) fn two(first: WordOp, second: WordOp) -> Self {
        Self {
            first,
            second: Some(second),
        }
    }

    /// `op`, after the bit was brought to the state wanted.
    pub(super) fn with_bit(bit: Option<WordOp>, op: WordOp) -> Self {
        bit.map_or(Self::one(op), |b| Self::two(b, op))
    }

    /// The operations in order.
    pub fn iter(&self) -> impl Iterator<Item = WordOp> + '_ {
        std::iter::once(self.first).chain(self.second)
    }

    /// What the owner's part of the word is moved from.
    pub(super) fn moved(&self) -> Option<OwnerWord> {
        self.iter().find_map(|op| match op {
            WordOp::Move { from, .. } => Some(from),
            _ => None,
        })
    }

    /// The compare-and-swap among them.
    pub(super) fn cas(&self) -> Option<(OwnerWord, OwnerWord)> {
        self.iter().find_map(|op| match op {
            WordOp::Cas { expect, new } => Some((expect, new)),
            _ => None,
        })
    }
}

/// What a batch brought.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Outcome {
    /// The owner word that was read, or found by an atomic.
    pub owner: Option<OwnerWord>,
    /// The far holders that were read.
    pub holders: Option<NodeSet>,
    /// The own bit before it was set or cleared.
    pub bit: Option<bool>,
}

/// What a batch is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BatchKind {
    /// { set bit, seeing the owner }, or { set bit; read owner } and, where there was no far holder, { CAS far }.
    SharedAcquire,
    /// { CAS none → me }, and where there may be far holders, { …; read them }.
    ExclusiveAcquire,
    /// { clear bit }.
    ClearBit,
    /// { clear bit if set, move me → next }, as one operation if the bit is near.
    HandOver,
    /// { clear bit if set, move me → none }.
    Free,
    /// { set bit unless set, move me → none }.
    FreeKeep,
}

/// How far a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BatchState {
    /// Posted.
    InFlight,
    /// The connection broke; nobody knows what took effect.
    Unknown,
    /// The record is being read to find out.
    Reconciling,
}

/// The batch in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Batch {
    /// What it is for.
    pub kind: BatchKind,
    /// Its operations.
    pub ops: WordOps,
    /// How far it is.
    pub state: BatchState,
}

impl Batch {
    /// The operations that are at the storage node now.
    #[must_use]
    pub fn posted(&self) -> Option<WordOps> {
        match self.state {
            BatchState::InFlight => Some(self.ops),
            BatchState::Unknown => None,
            BatchState::Reconciling => Some(WordOps::two(WordOp::ReadOwner, WordOp::ReadHolders)),
        }
    }
}
