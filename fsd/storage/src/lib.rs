//! The storage node: a pool of registered memory over a backing file, and the lease table.
//!
//! Clients read and write the pool and the lease records one-sided; the node's CPU allocates, frees,
//! makes durable, and answers where blocks are.

pub mod alloc;
pub mod blocks;
pub mod check;
#[cfg(test)]
mod crash_disk;
#[cfg(test)]
mod crash_tests;
mod cut;
pub mod disk;
mod fence;
mod flush;
#[cfg(test)]
mod fuzz_tests;
pub mod generation;
pub mod index;
pub mod label;
pub mod leases;
pub mod load;
pub mod pool;
mod requests;
mod scrub;
pub mod server;
mod status;

pub use server::StorageNode;

use std::path::PathBuf;

use fsd_node::store::StoreError;
use fsd_proto::rpc::Errno;

/// What can go wrong in a storage node.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The directory has not been formatted, or for another cluster or node.
    #[error("{path}: {detail}")]
    Format {
        /// The storage directory, as the configuration names it.
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
        /// What was tried, to be followed by the path: "cannot write".
        what: &'static str,
        /// The file that it was tried on.
        path: PathBuf,
        /// The system's answer.
        error: std::io::Error,
    },
    /// The index says what cannot be.
    #[error("the index is damaged: {0}; nothing has been changed, fsd check tells more")]
    Damaged(String),
    /// The fabric refused.
    #[error(transparent)]
    Transport(#[from] rdma_transport::TransportError),
}

/// The error number of a storage error.
fn errno(error: &StorageError) -> Errno {
    tracing::error!("{error}");
    match error {
        StorageError::Store(StoreError::Full { .. }) => Errno(libc::ENOSPC),
        StorageError::Io { error, .. } => Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        _ => Errno(libc::EIO),
    }
}
