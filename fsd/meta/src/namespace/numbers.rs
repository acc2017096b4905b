//! Numbers for new inodes.

use rt::sync::Mutex;

use crate::error::{MetaError, Refusal, no};
use crate::journal::Journal;
use crate::journal::records::{Txn, decode, encode, key};
use fsd_proto::ino;
use fsd_proto::wire::InoRange;

/// What has never been used.
struct Fresh {
    /// Next record index by storage node.
    index: Vec<u64>,
    /// The storage node that begins.
    shard: u16,
}

/// Numbers for new inodes, spread over the storage nodes.
pub struct Numbers {
    journal: Journal,
    shards: u16,
    fresh: Mutex<Fresh>,
}

impl Numbers {
    /// As a store says.
    pub fn load(journal: &Journal, shards: u16) -> Result<Self, MetaError> {
        let mut index = Vec::new();
        for shard in 0..shards {
            let first = if shard == 0 { ino::ROOT + 1 } else { 1 };
            let stored = journal.store.get(&key::next_index(shard))?;
            index.push(stored.map_or(Ok(first), |v| decode::<u64>(&v))?);
        }
        Ok(Self {
            journal: journal.clone(),
            shards,
            fresh: Mutex::new(Fresh { index, shard: 0 }),
        })
    }

    /// Reserves numbers for a mount; used ones first.
    pub fn reserve(&self, node: u16, count: u32) -> Result<InoRange, Refusal> {
        let mut fresh = self.fresh.lock();
        let mut txn = self.journal.txn();
        let per_shard = (count as usize).div_ceil(usize::from(self.shards));
        let mut inos = Vec::with_capacity(count as usize);
        for step in 0..self.shards {
            let shard = (fresh.shard + step) % self.shards;
            let mut used = txn.scan_stored(&key::reusable(shard, 0)[..9], per_shard)?;
            let next = &mut fresh.index[usize::from(shard)];
            let left = (ino::MAX_INDEX + 1).saturating_sub(*next) as usize;
            if used.len() + left < per_shard {
                used.extend(txn.scan_stored(&key::worn(shard, 0)[..9], per_shard - used.len() - left)?);
            }
            for (k, v) in used.iter().take(count as usize - inos.len()) {
                inos.push(ino::compose(shard, decode(v)?, key::second(k)));
                txn.delete(k.clone());
            }
            for _ in used.len()..per_shard {
                if inos.len() < count as usize && *next <= ino::MAX_INDEX {
                    inos.push(ino::compose(shard, 0, *next));
                    *next += 1;
                }
            }
            txn.put(key::next_index(shard), encode(next));
        }
        fresh.shard = (fresh.shard + 1) % self.shards;
        if inos.is_empty() {
            return no(libc::ENOSPC);
        }
        for &ino in &inos {
            txn.put(key::reserved(node, ino), Vec::new());
        }
        txn.commit()?;
        Ok(InoRange { inos })
    }
}

/// A mount's reserved numbers come back; how many.
/// Those that one which `left` in order has not used nobody has heard of; of one that died that is not certain.
pub fn give_back(txn: &mut Txn<'_>, node: u16, left: bool) -> Result<usize, Refusal> {
    let reserved = txn.scan_stored(&key::reserved(node, 0)[..9], usize::MAX)?;
    let unused = reserved.len();
    for (k, _) in reserved {
        let ino = key::second(&k);
        if left && ino::generation(ino) < ino::WORN {
            let unused = key::reusable(ino::shard(ino), ino::index(ino));
            txn.put(unused, encode(&ino::generation(ino)));
        } else {
            txn.recycle(ino);
        }
        txn.delete(k);
    }
    Ok(unused)
}
