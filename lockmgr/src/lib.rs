//! Leases on records in remote memory.
//!
//! A *lease record* lives in registered memory of a storage node and is changed with remote atomics only.
//! Nodes that want the same record talk to each other directly; no server takes part. The crate has three
//! layers:
//!
//! * [`ids`], [`record`], [`msg`]: the names, the words in memory and the messages;
//! * [`fsm`]: the protocol, a pure state machine per node and record (events in, actions out), which
//!   [`model`] explores exhaustively;
//! * [`manager`]: the driver that runs the state machines over a fabric, and the lease cache.
//!
//! The rules, and the flaw each of them prevents, are in `docs/lease-protocol.md`.

#![forbid(unsafe_code)]
pub mod error;
pub mod fsm;
mod gate;
mod hint;
pub mod ids;
mod lease;
pub mod manager;
pub mod model;
pub mod msg;
pub mod record;
mod sync;
mod table;
mod timers;
mod wire;

pub use error::LeaseError;
pub use ids::{Mode, NodeId, NodeSet, RecordId};
pub use lease::{EnterFn, Guard, LeaseHandle};
pub use manager::{Directory, LeaseInfo, LeaseManager, LeaseUser, ManagerConfig, Relinquish, Stats};
pub use record::{NEAR_NODES, OwnerWord, RecordLayout};
