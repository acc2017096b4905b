//! The table of leases: sharded by record, read-mostly.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rt::sync::RwLock;

use crate::hint::Hint;
use crate::ids::RecordId;
use crate::lease::LeaseHandle;

const SHARDS: usize = 64;
/// Forgotten records of which version and owner are remembered, per shard. Not to remember costs a round trip at the
/// next acquisition, no more.
const HINTS: usize = 256;

/// Record numbers are dense, not hostile: one multiplication spreads them.
#[derive(Default)]
pub(crate) struct RecordHasher(u64);

impl Hasher for RecordHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(self.0 ^ u64::from(b));
        }
    }
    fn write_u64(&mut self, i: u64) {
        let h = i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = h ^ h >> 32;
    }
}

type Map<V> = HashMap<RecordId, V, BuildHasherDefault<RecordHasher>>;

#[derive(Default)]
struct Shard {
    leases: Map<Arc<LeaseHandle>>,
    hints: Map<Hint>,
}

/// Keeps shards from sharing cache lines.
#[repr(align(128))]
#[derive(Default)]
struct Aligned(RwLock<Shard>);

pub(crate) struct Table {
    shards: Box<[Aligned]>,
    len: AtomicUsize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Aligned::default()).collect(),
            len: AtomicUsize::new(0),
        }
    }

    fn shard(&self, id: RecordId) -> &RwLock<Shard> {
        let h = id.0.wrapping_mul(0xd1b5_4a32_d192_ed03) >> 32;
        &self.shards[h as usize % SHARDS].0
    }

    pub(crate) fn get(&self, id: RecordId) -> Option<Arc<LeaseHandle>> {
        self.shard(id).read().leases.get(&id).cloned()
    }

    /// Runs `f` on the lease without counting a reference.
    pub(crate) fn with<T>(&self, id: RecordId, f: impl FnOnce(&Arc<LeaseHandle>) -> Option<T>) -> Option<T> {
        self.shard(id).read().leases.get(&id).and_then(f)
    }

    pub(crate) fn get_or_insert(&self, id: RecordId) -> Arc<LeaseHandle> {
        if let Some(lease) = self.get(id) {
            return lease;
        }
        let mut shard = self.shard(id).write();
        let hint = shard.hints.get(&id).copied().unwrap_or_default();
        let lease = shard.leases.entry(id).or_insert_with(|| {
            self.len.fetch_add(1, Ordering::SeqCst);
            Arc::new(LeaseHandle::new(id, hint))
        });
        Arc::clone(lease)
    }

    /// Removes the lease if it is still this one.
    pub(crate) fn remove(&self, lease: &Arc<LeaseHandle>, hint: Hint) {
        let id = lease.id();
        let mut shard = self.shard(id).write();
        if shard.leases.get(&id).is_some_and(|l| Arc::ptr_eq(l, lease)) {
            shard.leases.remove(&id);
            if shard.hints.len() >= HINTS {
                shard.hints.clear();
            }
            if hint != Hint::default() {
                shard.hints.insert(id, hint);
            }
            self.len.fetch_sub(1, Ordering::SeqCst);
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len.load(Ordering::SeqCst) == 0
    }

    pub(crate) fn all(&self) -> Vec<Arc<LeaseHandle>> {
        self.shards
            .iter()
            .flat_map(|s| s.0.read().leases.values().cloned().collect::<Vec<_>>())
            .collect()
    }
}
