//! Eras of lease versions: they begin again with new lease tables, and stored versions of older eras count as zero.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rt::sync::Mutex;

use super::records::{Inode, Superblock, Txn, encode, key};
use crate::error::Refusal;
use fsd_node::store::Store;
use fsd_proto::wire::Attr;

/// The era, and the lease tables that it belongs to.
pub struct Eras {
    store: Arc<dyn Store>,
    superblock: Superblock,
    tables: Mutex<Vec<u64>>,
    now: AtomicU32,
}

impl Eras {
    /// As a store says.
    pub fn new(store: Arc<dyn Store>, superblock: Superblock) -> Self {
        Self {
            store,
            tables: Mutex::new(superblock.tables.clone()),
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

    /// A mount tells which lease tables it has found. New ones begin with version zero: a new era, or the
    /// attributes pushed under the new versions would be taken for old.
    pub fn check(&self, found: &[u64]) -> Result<(), Refusal> {
        let mut tables = self.tables.lock();
        if *tables == found {
            return Ok(());
        }
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
        *tables = found.to_vec();
        self.now.store(era, Ordering::Release);
        Ok(())
    }
}
