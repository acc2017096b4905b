//! What can go wrong in a storage node.

use std::path::PathBuf;

use fsd_node::store::StoreError;
use fsd_proto::rpc::Errno;

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
    /// The index says what cannot be.
    #[error("the index is damaged: {0}; nothing has been changed, fsd check tells more")]
    Damaged(String),
    /// The fabric refused.
    #[error(transparent)]
    Transport(#[from] rdma_transport::TransportError),
}

/// The error number of a storage error.
pub fn errno(error: &StorageError) -> Errno {
    tracing::error!("{error}");
    match error {
        StorageError::Store(StoreError::Full { .. }) => Errno(libc::ENOSPC),
        StorageError::Io { error, .. } => Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        _ => Errno(libc::EIO),
    }
}
