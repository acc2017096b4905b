//! Space set aside on the storage nodes, so that a write that has been acknowledged can also be stored.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::Client;
use super::ctx::{Ctx, Res, fail};
use crate::storage::BLOCK;
use crate::storage::alloc::{CLASSES, class_for};
use crate::wire::{PoolSpace, StorageReply, StorageRequest};

/// Reserved in one request, bytes.
const CHUNK: u64 = 8 << 20;

/// What is set aside and not yet promised to a block, by storage node.
#[derive(Debug, Default)]
pub struct SpaceBank(Mutex<HashMap<u16, u64>>);

impl SpaceBank {
    fn take(&self, node: u16, bytes: u64) -> bool {
        let mut bank = self.0.lock();
        let have = bank.entry(node).or_default();
        if *have < bytes {
            return false;
        }
        *have -= bytes;
        true
    }

    /// Gives back what a block needs no more.
    pub fn put(&self, node: u16, bytes: u64) {
        *self.0.lock().entry(node).or_default() += bytes;
    }

    /// A storage node has restarted or the connection broke: its reservations are void.
    pub fn forget(&self, node: u16) {
        self.0.lock().remove(&node);
    }

    /// Takes everything out, to be given back.
    pub fn drain(&self) -> Vec<(u16, u64)> {
        self.0.lock().drain().filter(|(_, bytes)| *bytes > 0).collect()
    }
}

/// The frame size for a block whose data ends `end` bytes into it. Later blocks of a file are allocated
/// whole: such a file is likely to grow on.
#[must_use]
pub fn frame_size(block: u64, end: u64) -> u32 {
    if block > 0 || end >= BLOCK / 2 {
        return BLOCK as u32;
    }
    class_for(end as u32).map_or(BLOCK as u32, |c| CLASSES[c])
}

impl Client {
    /// How full a storage node is.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn pool_space(&self, node: u16) -> Res<PoolSpace> {
        match self.net.ask_storage(node, &StorageRequest::Space)? {
            StorageReply::Space(space) => Ok(space),
            _ => fail(libc::EPROTO),
        }
    }

    /// Has a storage node set aside what is `needed` for this mount, or less, or up to what is `wanted`;
    /// returns how much it was.
    ///
    /// # Errors
    /// It cannot be reached.
    pub fn ask_for_space(&self, node: u16, needed: u64, wanted: u64) -> Res<u64> {
        match self
            .net
            .ask_storage(node, &StorageRequest::Reserve { needed, wanted })?
        {
            StorageReply::Reserved(granted) => Ok(granted),
            _ => fail(libc::EPROTO),
        }
    }

    /// Sets `bytes` aside on a storage node.
    ///
    /// # Errors
    /// Park; `ENOSPC`.
    pub fn reserve(&self, ctx: &Ctx<'_>, node: u16, bytes: u64) -> Res<()> {
        if self.space.take(node, bytes) {
            return Ok(());
        }
        ctx.may_wait()?;
        let granted = self.ask_for_space(node, bytes, CHUNK)?;
        self.space.put(node, granted);
        if self.space.take(node, bytes) {
            return Ok(());
        }
        fail(libc::ENOSPC)
    }

    /// Gives back what is set aside and not promised.
    pub fn return_space(&self) {
        for (node, bytes) in self.space.drain() {
            if let Err(error) = self.net.ask_storage(node, &StorageRequest::Unreserve { bytes }) {
                tracing::debug!("reservation not given back to storage node {node}: {error}");
            }
        }
    }
}
