//! The regions of the peer that are mapped here.

use std::sync::Arc;

use parking_lot::RwLock;

use super::layout::slot_of;
use super::seat::SLOTS;
use crate::mem::SharedMem;
use crate::ops::Access;

/// A region of the peer, mapped here.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) key: u64,
    pub(super) access: Access,
    pub(super) mem: SharedMem,
}

/// By slot; empty before the first.
#[derive(Default)]
pub(super) struct Maps(RwLock<Vec<Option<Arc<Mapped>>>>);

impl Maps {
    /// One more, if `wanted` still says so.
    pub(super) fn add(&self, mapped: Mapped, wanted: impl Fn() -> bool) {
        let mut maps = self.0.write();
        if maps.is_empty() {
            maps.resize_with(SLOTS, || None);
        }
        if wanted() {
            let slot = slot_of(mapped.key);
            maps[slot] = Some(Arc::new(mapped));
        }
    }

    /// The region of this key, if it is there.
    #[inline]
    pub(super) fn find(&self, key: u64) -> Option<Arc<Mapped>> {
        let maps = self.0.read();
        maps.get(slot_of(key))?.as_ref().filter(|m| m.key == key).cloned()
    }

    /// The region of this key is gone.
    pub(super) fn remove(&self, key: u64) {
        if let Some(slot) = self.0.write().get_mut(slot_of(key))
            && slot.as_ref().is_some_and(|m| m.key == key)
        {
            *slot = None;
        }
    }

    /// All are gone.
    pub(super) fn clear(&self) {
        self.0.write().clear();
    }
}
