//! The lease table as the node itself reaches it: its lock words through the fabric, like everybody.

use std::sync::Arc;

use rdma_transport::{Connection, Fabric, RegionKey};
use rt::sync::Mutex;

use super::error::StorageError;
use super::fence::Fence;
use super::leases::{Held, LeaseTable};
use super::takeback;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{DeadMount, Records};

/// The lease table, and who may use it.
pub struct Words {
    pub id: u16,
    pub table: LeaseTable,
    pub fence: Fence,
    /// The endpoint; none once the node has stopped.
    pub fabric: Mutex<Option<Arc<dyn Fabric>>>,
    /// A connection to it.
    pub own: Mutex<Option<Arc<dyn Connection>>>,
}

impl Words {
    /// By which mounts reach a segment.
    pub fn key(&self, segment: u32) -> Result<RegionKey, Errno> {
        let fabric = self.fabric.lock().clone().ok_or(Errno(libc::ESHUTDOWN))?;
        self.table.key(fabric.as_ref(), segment)
    }

    /// What is held.
    pub fn held(&self) -> Result<Held, StorageError> {
        let own = self.own.lock().clone();
        let held = own.map(|own| self.table.held(own.as_ref()));
        Ok(held.transpose()?.unwrap_or_default())
    }

    /// The connection by which the node reaches its words; a new one if it broke.
    fn reach(&self) -> Result<Arc<dyn Connection>, StorageError> {
        let mut own = self.own.lock();
        let stopped = || StorageError::from(rdma_transport::TransportError::Shutdown);
        match own.as_ref().filter(|c| c.is_alive()) {
            Some(conn) => Ok(Arc::clone(conn)),
            None => {
                let fabric = self.fabric.lock().clone().ok_or_else(stopped)?;
                let conn = fabric.connect(&fabric.local_addr())?;
                Ok(Arc::clone(own.insert(conn)))
            }
        }
    }

    /// A mount is dead: nothing of it is served any more, and nothing of it can change memory.
    pub fn fence(&self, dead: DeadMount) -> Result<(), StorageError> {
        tracing::warn!(
            "storage node {}: mount {} is dead, and shut out",
            self.id,
            dead.node
        );
        self.fence.fence(&[dead.life])
    }

    /// The records that one of the dead owns, from one on; a part of them.
    pub fn owned(&self, dead: &[DeadMount], from: u64) -> Result<Records, StorageError> {
        takeback::owned(&self.table, self.reach()?.as_ref(), (dead, from))
    }

    /// Takes the records of the dead back.
    pub fn take_back(&self, dead: &[DeadMount]) -> Result<(), StorageError> {
        let records = takeback::take_back(&self.table, self.reach()?.as_ref(), dead)?;
        tracing::info!(
            "storage node {}: {records} lease records have been taken back from the dead",
            self.id
        );
        Ok(())
    }

    /// Which of these inodes nobody uses, and have no name.
    pub fn unused(&self, inos: &[u64]) -> Result<Vec<u64>, StorageError> {
        takeback::unused(&self.table, self.reach()?.as_ref(), inos)
    }

    /// Every mount is dead: none of those that are connected is served any more, and nothing is held.
    pub fn reset(&self) -> Result<(), StorageError> {
        let own = self.own.lock().clone();
        let mounts = self.fence.close()?;
        if mounts > 0 {
            tracing::warn!(
                "storage node {}: {mounts} mounts that are taken for dead are still connected: they are not served any more",
                self.id
            );
        }
        if let Some(own) = own {
            let cleared = self.table.reset(own.as_ref())?;
            tracing::info!("storage node {}: {cleared} lease records reset", self.id);
        }
        Ok(())
    }
}
