//! The table of leases: sharded by record, read-mostly.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rt::sync::RwLock;

use crate::hint::Hint;
use crate::ids::{NodeId, NodeSet, RecordId};
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

    /// Forgets who owned a word last, where that is one of the dead: asked on that guess, they do not answer. Records that are in the
    /// table are told of the epoch themselves. To be called when [`Table::remove`] is already told who is dead.
    pub(crate) fn forget_owners(&self, dead: &NodeSet) {
        for shard in &self.shards {
            for hint in shard.0.write().hints.values_mut() {
                hint.owner.take_if(|owner| dead.contains(*owner));
            }
        }
    }

    /// Removes the lease if it is still this one. Who `is_dead` is asked with the table locked, so that no owner gets past
    /// [`Table::forget_owners`].
    pub(crate) fn remove(
        &self,
        lease: &Arc<LeaseHandle>,
        mut hint: Hint,
        is_dead: impl FnOnce(NodeId) -> bool,
    ) {
        let id = lease.id();
        let mut shard = self.shard(id).write();
        if shard.leases.get(&id).is_some_and(|l| Arc::ptr_eq(l, lease)) {
            shard.leases.remove(&id);
            if shard.hints.len() >= HINTS {
                shard.hints.clear();
            }
            hint.owner = hint.owner.filter(|owner| !is_dead(*owner));
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

#[cfg(test)]
mod tests {
    use super::*;

    const ID: RecordId = RecordId(7);
    const HINT: Hint = Hint {
        version: 3,
        owner: Some(NodeId(4)),
    };

    fn remembered(table: &Table) -> (u64, Option<NodeId>) {
        let lease = table.get_or_insert(ID);
        let record = lease.record.lock();
        (record.fsm.version(), record.fsm.last_owner())
    }

    /// Whoever asked one of the dead on a guess would wait until it gives up: nobody goes on with what was asked after the epoch.
    #[test]
    fn the_dead_are_not_remembered_as_owners() {
        let table = Table::new();
        let dead = NodeSet::from_iter([NodeId(4)]);
        table.remove(&table.get_or_insert(ID), HINT, |_| false);
        table.forget_owners(&NodeSet::from_iter([NodeId(5)]));
        assert_eq!(remembered(&table), (3, Some(NodeId(4))));
        table.remove(&table.get_or_insert(ID), HINT, |_| false);
        table.forget_owners(&dead);
        assert_eq!(remembered(&table), (3, None));
        // It was leaving the table while the epoch began.
        table.remove(&table.get_or_insert(ID), HINT, |node| dead.contains(node));
        assert_eq!(remembered(&table), (3, None));
    }
}
