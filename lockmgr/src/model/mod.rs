//! An explicit-state model checker for the protocol.
//!
//! It drives the [`Fsm`](crate::fsm::Fsm) that the manager drives, for three nodes and one record. Every
//! operation of a batch, every completion, every message, every answer of the user, and everything the
//! user may do on its own is a step of its own; all orders of steps are explored. Channels are FIFO per
//! ordered pair of nodes.
//!
//! Checked in every state:
//! * *mutual exclusion*: an exclusive lease excludes every other, shared caches a user was let keep included;
//! * *freshness*: caches that are valid by the version under which they are kept show what was last written;
//!   attributes in a grant are those of the version granted;
//! * no fetch-and-add carries out of a bit, no release CAS fails, versions never go back, no message comes
//!   unexpected; the version of a free word has been confirmed where that is asked for.
//!
//! Checked in every quiescent state: nobody waits, bits and words are exactly the leases held. Last, the
//! graph of all states is searched for cycles; there being none, every execution ends.

mod explore;
mod membership;
mod node;
mod options;
mod state;
mod symmetry;
mod view;

pub use explore::{Found, Report, explore};
pub use options::{Options, Problem};

#[cfg(test)]
mod tests;
