//! What `fsd status` is told by a storage node.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::StorageError;
use super::flush::bytes_of;
use super::storing::Storing;
use super::words::Words;
use fsd_node::config::Size;
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::{PoolSpace, StorageStatus};

/// A pool counts as full when less than one part in so many can still be given to who writes …
const FULL_SHARE: u64 = 100;
/// … and less than this, bytes.
const FULL_MOST: u64 = 64 << 20;

/// Is a pool as good as full?
fn is_full(reservable: u64, total: u64) -> bool {
    reservable < (total / FULL_SHARE).clamp(BLOCK, FULL_MOST)
}

/// Requests and connections since the start.
#[derive(Default)]
pub struct Counts {
    pub requests: AtomicU64,
    pub connections: AtomicU64,
}

/// Knows how the node is.
pub struct Status {
    pub storing: Arc<Storing>,
    pub words: Arc<Words>,
    pub counts: Arc<Counts>,
}

impl Status {
    /// As it is now.
    pub fn now(&self) -> Result<StorageStatus, StorageError> {
        let held = self.words.held()?;
        let blocks = &self.storing.blocks;
        let dirty = bytes_of(&blocks.flusher.unstored());
        let troubles = self.troubles();
        let PoolSpace { total, free } = blocks.frames.figures();
        let space = blocks.media.space.lock();
        Ok(StorageStatus {
            id: self.words.id,
            total,
            free,
            reserved: space.alloc.reserved(),
            frames: space.alloc.frames(),
            exclusive: held.exclusive,
            shared: held.shared,
            dirty,
            lost: space.lost(),
            damaged: blocks.scrubber.faults.damaged.load(Ordering::Relaxed),
            checked: blocks.scrubber.faults.scrubbed.load(Ordering::Relaxed),
            requests: self.counts.requests.load(Ordering::Relaxed),
            connections: self.counts.connections.load(Ordering::Relaxed),
            holders: held.holders.into_iter().collect(),
            generation: blocks.media.generation.durable(),
            place: blocks.media.generation.place()?,
            troubles,
        })
    }

    fn troubles(&self) -> Vec<String> {
        let mut troubles = Vec::new();
        let blocks = &self.storing.blocks;
        let space = blocks.media.space.lock();
        let (total, lacking) = (space.alloc.bytes(), blocks.media.lacking(&space));
        // What is being cleaned is soon free.
        let reservable = space.alloc.reservable().saturating_sub(lacking) + blocks.cleaner.bytes();
        drop(space);
        if is_full(reservable, total) && lacking > 0 {
            troubles.push(
                "the memory file system of the pool is full: make room there, or make it larger".into(),
            );
        } else if is_full(reservable, total) {
            troubles.push(format!(
                "the pool of {} is full: remove files, or make it larger",
                Size(total)
            ));
        }
        troubles.extend(
            self.storing
                .blocks
                .media
                .store
                .room()
                .err()
                .map(|error| error.to_string()),
        );
        let failing = self.storing.failing.lock();
        troubles.extend(
            failing
                .as_ref()
                .map(|why| format!("what was written cannot be stored: {why}")),
        );
        troubles
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_full_before_its_last_byte() {
        assert!(is_full(0, 8 << 20) && is_full(BLOCK - 1, 8 << 20) && !is_full(BLOCK, 8 << 20));
        assert!(is_full(9 << 20, 1 << 30) && !is_full(11 << 20, 1 << 30));
        assert!(is_full(63 << 20, 1 << 40) && !is_full(64 << 20, 1 << 40));
    }
}
