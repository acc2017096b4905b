//! What is known of who takes part.

use super::options::NODES;

/// What the membership service knows.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Membership {
    /// How many nodes may still die.
    pub(super) crashes: u8,
    /// How many may come back.
    pub(super) restarts: u8,
    pub(super) epoch: u8,
    /// Nodes that are dead.
    pub(super) fenced: u8,
    /// Of those, the ones of which everything has been taken back.
    pub(super) recovered: u8,
}

/// How far a node is in the membership.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) epoch: u8,
    /// Whose leases are being taken back, as it was told.
    pub(super) dead: u8,
    /// It has nothing under way, but for what others have not heard.
    pub(super) settled: bool,
    /// So many messages each of the others has to hear.
    pub(super) unheard: [u8; NODES],
}

/// What may happen to the membership.
#[derive(Debug, Clone, Copy)]
pub(super) enum Change {
    Fence(usize),
    Epoch(usize),
    Recover,
    Resume(usize),
    Rejoin(usize),
}
