//! What breaks the protocol.

/// A rule that was broken; by a peer, by the memory or by the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The event does not fit the state.
    #[error("the lease is not in a state for this")]
    NotNow,
    /// A message that no correct peer sends now.
    #[error("an unexpected {0} has arrived")]
    Unexpected(&'static str),
    /// A node is in the queue already.
    #[error("a node asked for the lease twice")]
    QueuedTwice,
    /// Another node changed the word while this one owned it.
    #[error("the owner word was changed under its owner")]
    ReleaseFailed,
    /// The own holder bit was not as this node left it.
    #[error("the holder bit of this node was changed by another")]
    BitChanged,
    /// The word names this node, which does not own it.
    #[error("the owner word names this node, which has not taken it")]
    NamedWithoutCause,
    /// The outcome of a batch lacks a result.
    #[error("a batch returned other results than were asked for")]
    BadOutcome,
}
