//! Inodes and their names: looked up, changed, and what remains of those that are gone.

pub mod change;
pub mod freeing;
pub mod lookups;
pub mod names;
pub mod numbers;
pub mod operations;
pub mod recent;
pub mod rename;
pub mod sharing;
pub mod transactions;
pub mod xattrs;

use std::sync::Arc;

use rt::channel::Receiver;

use crate::error::MetaError;
use crate::journal::Journal;
use crate::nodes::Nodes;
use crate::rules::Rules;
use freeing::{Freeing, Told};
use lookups::Lookups;
use numbers::Numbers;
use transactions::Transactions;

/// Inodes and their names.
#[derive(Clone)]
pub struct Namespace {
    /// Looks.
    pub lookups: Lookups,
    /// Numbers for new inodes.
    pub numbers: Arc<Numbers>,
    /// Changes.
    pub transactions: Arc<Transactions>,
    /// Blocks of inodes that are gone.
    pub freeing: Arc<Freeing>,
}

impl Namespace {
    /// As it is stored, and what the thread that frees blocks is told.
    pub fn load(
        journal: &Journal,
        shards: u16,
        nodes: &Nodes,
        rules: Rules,
    ) -> Result<(Self, Receiver<Told>), MetaError> {
        let (freeing, told) = Freeing::load(journal, nodes, rules)?;
        let freeing = Arc::new(freeing);
        let namespace = Self {
            lookups: Lookups(journal.clone()),
            numbers: Arc::new(Numbers::load(journal, shards)?),
            transactions: Arc::new(Transactions::load(journal, &freeing)?),
            freeing,
        };
        Ok((namespace, told))
    }
}
