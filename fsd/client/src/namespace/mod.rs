//! Names, and what else the metadata server changes in transactions.

pub mod dirs;
pub mod foresee;
pub mod names;
pub mod numbers;
pub mod transactions;
pub mod xattrs;

use std::sync::Arc;

use dirs::Directories;
use names::Names;
use numbers::Numbers;
use transactions::Transactions;
use xattrs::Xattrs;

use crate::cache::Base;
use crate::data::Data;
use crate::kernel::Kernel;
use crate::opens::Opens;

/// Names.
pub struct Namespace {
    /// Transactions.
    pub transactions: Arc<Transactions>,
    /// Look-ups and listings.
    pub directories: Arc<Directories>,
    /// Changes of names.
    pub names: Arc<Names>,
    /// Extended attributes.
    pub xattrs: Arc<Xattrs>,
}

impl Namespace {
    /// The room, with nothing in it.
    #[must_use]
    pub fn new(Base { session, cache }: &Base, kernel: &Kernel, data: &Data, opens: &Opens) -> Self {
        let transactions = Arc::new(Transactions {
            seqs: Default::default(),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
        });
        let directories = Arc::new(Directories {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
            pinning: Arc::clone(&opens.pinning),
        });
        let names = Arc::new(Names {
            numbers: Arc::new(Numbers::new(session)),
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            kernel: Arc::clone(&kernel.caches),
            front: Arc::clone(&kernel.front),
            reservations: Arc::clone(&data.reservations),
            pinning: Arc::clone(&opens.pinning),
            transactions: Arc::clone(&transactions),
            directories: Arc::clone(&directories),
        });
        let xattrs = Arc::new(Xattrs {
            session: Arc::clone(session),
            cache: Arc::clone(cache),
            transactions: Arc::clone(&transactions),
        });
        Self {
            transactions,
            directories,
            names,
            xattrs,
        }
    }
}
