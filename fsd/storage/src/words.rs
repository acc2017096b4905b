//! The lease table as the node itself reaches it: its lock words through the fabric, like everybody.

use std::sync::Arc;

use rdma_transport::{Connection, Fabric, RegionKey};
use rt::sync::Mutex;

use super::error::StorageError;
use super::fence::Fence;
use super::leases::{Held, LeaseTable};
use fsd_proto::rpc::Errno;

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

    /// Every mount is dead: none of those that are connected is served any more, and nothing is held.
    pub fn reset(&self) -> Result<(), StorageError> {
        let own = self.own.lock().clone();
        let mounts = self.fence.close();
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
