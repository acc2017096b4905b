//! The other nodes as the metadata server sees them.

pub mod fabric;
pub mod mounts;
pub mod stores;

use std::sync::Arc;

use crate::error::MetaError;
use fabric::StorageNodes;
use fsd_proto::ask;
use fsd_proto::wire::{StorageReply, StorageRequest};
use mounts::Mounts;
use stores::Stores;

/// The other nodes.
#[derive(Clone)]
pub struct Nodes {
    /// Which store is which.
    pub stores: Arc<Stores>,
    /// Asks the storage nodes.
    pub asks: Arc<dyn StorageNodes>,
    /// Asks the mounts.
    pub mounts: Arc<dyn Mounts>,
}

/// What asks the other nodes.
pub struct Reach {
    /// The storage nodes.
    pub storage: Arc<dyn StorageNodes>,
    /// The mounts.
    pub mounts: Arc<dyn Mounts>,
}

impl Nodes {
    /// The numbers of the storage nodes.
    pub fn ids(&self) -> impl Iterator<Item = u16> + '_ {
        self.stores.sections().iter().map(|section| section.id)
    }

    /// Asks a storage node for something without which this server does not go on.
    ///
    /// # Errors
    /// It cannot be reached, or refuses.
    pub fn ask<R>(&self, node: u16, request: R) -> Result<R::Reply, MetaError>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply>,
    {
        self.asks.asked(node, request).map_err(|error| MetaError::Io {
            what: format!("storage node {node} does not do what it is asked"),
            error: std::io::Error::other(error.to_string()),
        })
    }
}
