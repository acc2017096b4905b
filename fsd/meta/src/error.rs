//! What can go wrong.

use std::path::PathBuf;

use fsd_node::store::StoreError;
use fsd_proto::rpc::Errno;

/// What can go wrong in the metadata server.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The directory has not been formatted, or for another cluster.
    #[error("{path}: {detail}")]
    Format {
        /// Directory.
        path: PathBuf,
        /// What, and what to do.
        detail: String,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The fabric refused.
    #[error(transparent)]
    Transport(#[from] rdma_transport::TransportError),
    /// The system refused.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's answer.
        error: std::io::Error,
    },
}

/// Why a request is answered with an error number.
#[derive(Debug)]
pub enum Refusal {
    /// The request is not possible.
    Errno(Errno),
    /// The store failed.
    Store(StoreError),
}

impl From<Errno> for Refusal {
    fn from(e: Errno) -> Self {
        Self::Errno(e)
    }
}

impl From<StoreError> for Refusal {
    fn from(e: StoreError) -> Self {
        Self::Store(e)
    }
}

impl Refusal {
    /// The number for the client.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Errno(e) => *e,
            Self::Store(error @ StoreError::Full { .. }) => {
                tracing::error!("{error}");
                Errno(libc::ENOSPC)
            }
            Self::Store(error) => {
                tracing::error!("{error}");
                Errno(libc::EIO)
            }
        }
    }
}

impl From<Refusal> for MetaError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Store(error) => Self::Store(error),
            Refusal::Errno(e) => Self::Io {
                what: "the metadata store is damaged".into(),
                error: std::io::Error::from_raw_os_error(e.0),
            },
        }
    }
}

/// Shorthand for a refusal with an error number.
pub fn no<T>(number: i32) -> Result<T, Refusal> {
    Err(Refusal::Errno(Errno(number)))
}
