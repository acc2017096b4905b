//! The storage node: a pool of registered memory over a backing file, and the lease table.
//!
//! Clients read and write the pool and the lease records one-sided; the node's CPU allocates, frees,
//! makes durable, and answers where blocks are.

pub mod alloc;
mod flush;
pub mod index;
pub mod label;
pub mod leases;
pub mod pool;
mod requests;
pub mod server;

pub use server::StorageNode;

use std::path::PathBuf;

use crate::store::StoreError;

/// Bytes of a file block: the unit of striping and the largest frame.
pub const BLOCK: u64 = 256 << 10;

/// What can go wrong in a storage node.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The directory has not been formatted, or for another cluster or node.
    #[error("{path}: {detail}")]
    Format {
        /// Directory.
        path: PathBuf,
        /// What, and what to do.
        detail: String,
    },
    /// The index failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The backing file or the pool failed.
    #[error("{what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// File.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The fabric refused.
    #[error(transparent)]
    Transport(#[from] rdma_transport::TransportError),
}
