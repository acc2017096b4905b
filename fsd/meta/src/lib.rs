//! The metadata server: names, inodes, extended attributes, file locks, membership.
//!
//! Every change is one transaction of the embedded store. Clients' leases protect the clients' caches, not
//! the store: requests are carried out one after the other on the progress thread.

mod changes;
pub mod copies;
#[cfg(test)]
mod crash_cluster;
#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod crash_world;
#[cfg(test)]
mod fuzz_tests;
mod house;
mod membership;
mod missed;
pub mod names;
mod nodes;
mod opening;
mod order;
pub mod records;
mod recovery;
pub mod server;
mod service;
pub mod sessions;
mod status;
pub mod stores;
mod waiting;
mod window;
pub mod xattrs;

pub use server::MetaServer;

use std::path::PathBuf;

use fsd_node::store::StoreError;
use fsd_proto::rpc::Errno;

/// What can go wrong in the metadata server.
#[derive(Debug, thiserror::Error)]
pub enum MetaError {
    /// The directory has not been formatted, or for another cluster.
    #[error("{path}: {detail}")]
    Format {
        /// The metadata directory, as the configuration names it.
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
        /// What was tried, with the file: "cannot open …".
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

/// Shorthand for a refusal with an error number.
pub(crate) fn no<T>(number: i32) -> Result<T, Refusal> {
    Err(Refusal::Errno(Errno(number)))
}
