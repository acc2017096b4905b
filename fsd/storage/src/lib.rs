//! The storage node: a pool of registered memory over a backing file, and the lease table.
//!
//! Clients read and write the pool and the lease records one-sided; the node's CPU allocates, frees,
//! makes durable, and answers where blocks are.

pub mod alloc;
pub mod blocks;
pub mod check;
mod cleaner;
mod cut;
pub mod disk;
mod error;
mod fence;
mod flush;
mod frames;
pub mod generation;
pub mod index;
mod keeping;
mod kept;
pub mod label;
pub mod leases;
pub mod load;
mod media;
pub mod pool;
mod requests;
mod scrub;
pub mod server;
mod space;
mod status;
mod storing;
mod takeback;
mod words;
mod work;

pub use error::StorageError;
pub use server::StorageNode;

#[cfg(test)]
mod crash_disk;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod fuzz_tests;
