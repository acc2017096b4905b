//! Who has what: frames of the pool, extents of the backing file, and which block is where.

use std::collections::HashMap;

use rdma_transport::ConnId;

use super::alloc::Allocator;
use super::index::Index;
use fsd_proto::layout::{CLASSES, class_for};
use fsd_proto::wire::Frame;

/// The backing file grows by so many slabs; the disk's blocks are taken as they are written.
const GROW: u32 = 64;

/// Who has what.
pub struct Space {
    /// Frames of the pool.
    pub alloc: Allocator,
    /// Blocks.
    pub index: Index,
    /// Reservations by connection, returned when it ends.
    pub reserved: HashMap<ConnId, u64>,
    /// Extents of the backing file.
    pub extents: Allocator,
    /// Extents that the index has ceased to name, which may not be durable yet.
    pub retired: Vec<Frame>,
}

impl Space {
    /// Uses up to `bytes` of a connection's reservation; returns how much it was.
    pub fn use_reservation(&mut self, conn: ConnId, bytes: u64) -> u64 {
        let have = self.reserved.entry(conn).or_default();
        let used = bytes.min(*have);
        *have -= used;
        self.alloc.unreserve(used);
        used
    }

    /// Gives a frame of the pool back, which is zero.
    pub fn give_back(&mut self, frame: Frame) {
        if let Some(class) = class_for(frame.size) {
            self.alloc.free(frame.offset, class);
        }
    }

    /// A place in the backing file for `size` bytes.
    pub fn take_extent(&mut self, size: u32) -> Option<Frame> {
        let class = class_for(size)?;
        let offset = self.extents.allocate(class, true).or_else(|| {
            self.extents.grow(GROW);
            self.extents.allocate(class, true)
        })?;
        self.extents.set_backed(offset);
        Some(Frame {
            offset,
            size: CLASSES[class],
        })
    }

    /// Gives a place in the backing file back that no entry names, not even one that a power cut may bring back.
    pub fn give_extent_back(&mut self, extent: Frame) {
        if let Some(class) = class_for(extent.size) {
            self.extents.free(extent.offset, class);
        }
    }

    /// Blocks whose contents are lost.
    pub fn lost(&self) -> u64 {
        self.index.all().filter(|(_, e)| e.lost).count() as u64
    }
}
