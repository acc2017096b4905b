//! Eras of lease versions: they begin again with new lease tables, and stored versions of older eras count as zero.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rt::sync::Mutex;

use super::records::{Inode, Superblock, Txn, encode, key};
use crate::error::Refusal;
use fsd_node::store::Store;
use fsd_proto::wire::Attr;

/// The lease tables of an era.
#[derive(Default)]
struct Tables {
    /// By storage node; none before the first mount.
    known: Vec<u64>,
    /// They are no more: nobody may begin to lease in them.
    over: bool,
}

/// What a mount may do that has found lease tables.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// They are those of the era.
    Known,
    /// There are none yet.
    First,
    /// They are others; or they are those of the era, and that is over.
    Others,
}

/// The era, and the lease tables that it belongs to.
pub struct Eras {
    store: Arc<dyn Store>,
    superblock: Superblock,
    tables: Mutex<Tables>,
    now: AtomicU32,
}

impl Eras {
    /// As a store says.
    pub fn new(store: Arc<dyn Store>, superblock: Superblock) -> Self {
        Self {
            store,
            tables: Mutex::new(Tables {
                known: superblock.tables.clone(),
                over: false,
            }),
            now: AtomicU32::new(superblock.era),
            superblock,
        }
    }

    /// The era.
    pub fn now(&self) -> u32 {
        self.now.load(Ordering::Acquire)
    }

    /// The attributes of an inode, with a version of this era.
    pub fn attr(&self, inode: &Inode) -> Attr {
        let mut attr = inode.told();
        if inode.era != self.now() {
            attr.version = 0;
        }
        attr
    }

    /// A mount has found these tables. With `begin`, of those of the era: it begins to lease in them, before they can be given up.
    pub fn found(
        &self,
        found: &[u64],
        begin: impl FnOnce() -> Result<(), Refusal>,
    ) -> Result<Found, Refusal> {
        let tables = self.tables.lock();
        if tables.known.is_empty() {
            return Ok(Found::First);
        }
        if tables.over || tables.known != found {
            return Ok(Found::Others);
        }
        begin()?;
        Ok(Found::Known)
    }

    /// Are these the tables of the era, or are there none yet? Else that is over.
    pub fn check(&self, found: &[u64]) -> bool {
        let mut tables = self.tables.lock();
        let known = tables.known.is_empty() || tables.known == found;
        tables.over |= !known;
        known
    }

    /// Has any mount ever leased?
    pub fn has_tables(&self) -> bool {
        !self.tables.lock().known.is_empty()
    }

    /// Is this the table of a storage node in this era?
    pub fn is_known(&self, node: u16, table: u64) -> bool {
        self.tables.lock().known.get(usize::from(node)) == Some(&table)
    }

    /// New tables begin with version zero: a new era, or the attributes pushed under the new versions would be taken for old.
    pub fn begin(&self, found: &[u64]) -> Result<(), Refusal> {
        let mut tables = self.tables.lock();
        let era = self.now() + 1;
        let superblock = Superblock {
            era,
            tables: found.to_vec(),
            ..self.superblock.clone()
        };
        let mut txn = Txn::new(self.store.as_ref());
        txn.put(key::superblock(), encode(&superblock));
        txn.commit()?;
        self.store.sync()?;
        tracing::info!("lease tables are new: era {era}");
        *tables = Tables {
            known: found.to_vec(),
            over: false,
        };
        self.now.store(era, Ordering::Release);
        Ok(())
    }
}
