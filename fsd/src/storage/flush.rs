//! Making data durable: on request, in the background, and at the end.
//!
//! Clients write one-sided, so this node does not see their writes; each is followed by an increment of
//! the slab's dirty counter. A slab whose counter has not moved since all of it was stored is clean.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};

use super::server::Inner;
use super::{BLOCK, StorageError};
use crate::rpc::Errno;
use crate::wire::{Frame, PoolSpace, StorageReply, StorageStatus};

/// How often the background flusher looks for unstored data.
const FLUSH_EVERY: Duration = Duration::from_secs(2);

/// Inode, block and frame.
type Placed = (u64, u64, Frame);

/// The error number of a storage error.
pub(super) fn errno(error: &StorageError) -> Errno {
    tracing::error!("{error}");
    match error {
        StorageError::Store(crate::store::StoreError::Full { .. }) => Errno(libc::ENOSPC),
        StorageError::Io { error, .. } => Errno(error.raw_os_error().unwrap_or(libc::EIO)),
        _ => Errno(libc::EIO),
    }
}

impl Inner {
    fn is_dirty(&self, frame: Frame) -> bool {
        let slab = frame.offset / BLOCK;
        self.space.lock().stored.get(&slab) != Some(&self.pool.dirty_count(frame.offset))
    }

    /// Makes everything written to these inodes durable.
    pub(super) fn flush(&self, inos: &[u64]) -> Result<(), StorageError> {
        let mut blocks: Vec<Placed> = Vec::new();
        {
            let space = self.space.lock();
            for &ino in inos.iter().collect::<HashSet<_>>() {
                blocks.extend(
                    space
                        .index
                        .entries(ino)
                        .into_iter()
                        .map(|(block, e)| (ino, block, e.frame)),
                );
            }
        }
        blocks.retain(|(_, _, frame)| self.is_dirty(*frame));
        self.store_blocks(&blocks, &BTreeMap::new())?;
        // Also where no block was dirty: the index may have allocations that are not durable yet.
        self.store.sync()?;
        Ok(())
    }

    /// Writes blocks to the backing file and marks them; `counts` gives the slabs that are stored wholly,
    /// with the counter read before.
    fn store_blocks(&self, blocks: &[Placed], counts: &BTreeMap<u64, u64>) -> Result<(), StorageError> {
        if blocks.is_empty() {
            return Ok(());
        }
        let whole: Vec<(u64, u64)> = blocks
            .iter()
            .filter(|(_, _, f)| u64::from(f.size) == BLOCK)
            .map(|(_, _, f)| (f.offset / BLOCK, self.pool.dirty_count(f.offset)))
            .chain(counts.iter().map(|(&slab, &count)| (slab, count)))
            .collect();
        let mut scratch = Vec::new();
        for (_, _, frame) in blocks {
            self.pool.store(*frame, &mut scratch)?;
        }
        self.pool.sync()?;
        let mut space = self.space.lock();
        space.index.mark_stored(blocks)?;
        space.stored.extend(whole);
        Ok(())
    }

    /// Stores every slab that has changed.
    pub(super) fn flush_all(&self) -> Result<(), StorageError> {
        let (blocks, counts) = self.changed();
        self.store_blocks(&blocks, &counts)?;
        Ok(self.store.sync()?)
    }

    /// The blocks in slabs that have changed, and those slabs' counters.
    fn changed(&self) -> (Vec<Placed>, BTreeMap<u64, u64>) {
        let mut counts = BTreeMap::new();
        let space = self.space.lock();
        let blocks = space
            .index
            .all()
            .filter(|(_, _, e)| {
                let slab = e.frame.offset / BLOCK;
                let count = self.pool.dirty_count(e.frame.offset);
                let dirty = space.stored.get(&slab) != Some(&count);
                if dirty {
                    counts.entry(slab).or_insert(count);
                }
                dirty
            })
            .map(|(ino, block, e)| (ino, block, e.frame))
            .collect();
        (blocks, counts)
    }

    fn dirty_sum(&self) -> u64 {
        let slabs = self.pool.mem.len() as u64 / BLOCK;
        (0..slabs)
            .map(|s| self.pool.dirty_count(s * BLOCK))
            .fold(0, u64::wrapping_add)
    }

    /// Bounds how long data that nobody fsyncs stays in memory only.
    pub(super) fn flush_loop(&self, stop: &Receiver<()>) {
        let mut seen = self.dirty_sum();
        let mut pending = true;
        loop {
            match stop.recv_timeout(FLUSH_EVERY) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return,
            }
            let now = self.dirty_sum();
            let moved = now != seen;
            seen = now;
            if moved || pending {
                pending = false;
                if let Err(error) = self.flush_all() {
                    pending = true;
                    tracing::error!("background flush: {error}");
                }
            }
        }
    }

    pub(super) fn reset_leases(&self) -> Result<StorageReply, StorageError> {
        let own = self.own.lock().clone();
        if let Some(own) = own {
            let cleared = self.leases.reset(own.as_ref())?;
            tracing::info!("storage node {}: {cleared} lease records reset", self.id);
        }
        Ok(StorageReply::Done)
    }

    pub(super) fn status(&self) -> Result<StorageStatus, StorageError> {
        let own = self.own.lock().clone();
        let held = own
            .map(|own| self.leases.held(own.as_ref()))
            .transpose()?
            .unwrap_or_default();
        let (blocks, _) = self.changed();
        let space = self.space.lock();
        let PoolSpace { total, free } = space.figures();
        Ok(StorageStatus {
            id: self.id,
            total,
            free,
            reserved: space.alloc.reserved(),
            frames: space.alloc.frames(),
            exclusive: held.exclusive,
            shared: held.shared,
            dirty: blocks.iter().map(|(_, _, f)| u64::from(f.size)).sum(),
            requests: self.requests.load(Ordering::Relaxed),
            connections: self.connections.load(Ordering::Relaxed),
        })
    }
}
