//! What is kept: records, their transactions in the order of all, and up to where a crash undoes nothing.

pub mod commits;
pub mod eras;
pub mod format;
pub mod order;
pub mod records;

use std::path::Path;
use std::sync::Arc;

use rt::channel::Receiver;

use crate::error::MetaError;
use commits::{Commits, OnceDurable};
use eras::Eras;
use fsd_node::store::Store;
use order::Order;
use records::{Superblock, Txn};

/// What is kept.
#[derive(Clone)]
pub struct Journal {
    /// The records.
    pub store: Arc<dyn Store>,
    /// The order of transactions.
    pub order: Arc<Order>,
    /// Who waits until everything is durable.
    pub commits: Arc<Commits>,
    /// Eras of lease versions.
    pub eras: Arc<Eras>,
}

impl Journal {
    /// Goes on where a store ends. Whether transactions may have been lost with the last life, and what the thread that syncs
    /// is told.
    pub fn open(
        store: Arc<dyn Store>,
        superblock: &Superblock,
        memory_dir: &Path,
    ) -> Result<(Self, bool, Receiver<OnceDurable>), MetaError> {
        let (order, lost) = Order::open(Arc::clone(&store), memory_dir, &superblock.uuid)?;
        let order = Arc::new(order);
        let (commits, waiting) = Commits::new(Arc::clone(&store), Arc::clone(&order));
        let journal = Self {
            eras: Arc::new(Eras::new(Arc::clone(&store), superblock.clone())),
            store,
            order,
            commits: Arc::new(commits),
        };
        Ok((journal, lost, waiting))
    }

    /// Begins a transaction.
    pub fn txn(&self) -> Txn<'_> {
        Txn::new(self.store.as_ref())
    }
}
