//! What the manager knows of the connections to storage nodes.

use std::collections::HashMap;

use rt::sync::Mutex;

/// What is known about the storage nodes.
#[derive(Default)]
pub(super) struct Storage(Mutex<HashMap<u32, Shard>>);

#[derive(Default)]
struct Shard {
    /// Counts reconnections: a batch that fails after the next one began is looked into at once.
    connection: u64,
    lost: bool,
}

impl Storage {
    pub(super) fn lost(&self, shard: u32) {
        self.0.lock().entry(shard).or_default().lost = true;
    }

    pub(super) fn reconnected(&self, shard: u32) {
        let mut shards = self.0.lock();
        let shard = shards.entry(shard).or_default();
        shard.connection += 1;
        shard.lost = false;
    }

    pub(super) fn connection(&self, shard: u32) -> u64 {
        self.0.lock().get(&shard).map_or(0, |s| s.connection)
    }

    pub(super) fn is_lost(&self, shard: u32) -> bool {
        self.0.lock().get(&shard).is_some_and(|s| s.lost)
    }
}
