//! One contract for one-sided remote memory access and small messages, and the providers that fulfil it.
//!
//! The contract is that of a reliable-connected InfiniBand queue pair, so that code written against it
//! runs over verbs unchanged:
//!
//! * operations submitted on one connection take effect at the target in submission order;
//! * messages on one connection arrive in sending order, and a message sent after an operation was
//!   submitted arrives after that operation took effect;
//! * atomics are atomic among fabric atomics only: a word that is ever the target of a fabric atomic is
//!   accessed through the fabric by everybody, its owner included (over a connection to itself);
//! * an operation that fails puts the connection into error; the effect of every operation not yet
//!   reported complete is then unknown, and both sides see [`Handler::disconnected`] exactly once.
#![forbid(clippy::todo)]

mod base;
mod buffer;
mod common;
mod deserted;
mod error;
mod fabric;
mod gather;
mod handshake;
mod kind;
pub mod mem;
mod open;
mod ops;
mod options;
mod pool;
mod regions;
mod shm;
pub mod sim;
mod stats;
mod stream;
mod tcp;
#[cfg(test)]
mod test_util;
mod threads;
#[cfg(feature = "verbs")]
mod verbs;
mod waiter;

pub use buffer::Buffer;
pub use deserted::is_deserted;
pub use error::TransportError;
pub use fabric::{ConnId, Connection, Fabric, FabricConfig, Handler, Limits};
pub use gather::{gather, gather_then};
pub use kind::FabricKind;
pub use open::{open, open_verbs};
pub use ops::{Access, AsyncOp, BatchError, Completion, Op, OpResult, Outcome, RegionKey, RemoteAddr};
pub use options::VerbsOptions;
pub use stats::FabricStats;
