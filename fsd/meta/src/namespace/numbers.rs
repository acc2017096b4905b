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

    /// Reserves numbers for a mount; used ones first. Those of all storage nodes come in turn, for a mount gives them to its
    /// new files in this order: the lease records and the first blocks of files made one after the other are then on all nodes.
    pub fn reserve(&self, node: u16, count: u32) -> Result<InoRange, Refusal> {
        let mut fresh = self.fresh.lock();
        let mut txn = self.journal.txn();
        let per_shard = (count as usize).div_ceil(usize::from(self.shards));
        let mut of_shards: Vec<Vec<u64>> = Vec::with_capacity(usize::from(self.shards));
        let mut left_to_give = count as usize;
        for step in 0..self.shards {
            let shard = (fresh.shard + step) % self.shards;
            let mut used = txn.scan_stored(&key::reusable(shard, 0)[..9], per_shard)?;
            let next = &mut fresh.index[usize::from(shard)];
            let left = (ino::MAX_INDEX + 1).saturating_sub(*next) as usize;
            if used.len() + left < per_shard {
                used.extend(txn.scan_stored(&key::worn(shard, 0)[..9], per_shard - used.len() - left)?);
            }
            let most = per_shard.min(left_to_give);
            let mut inos = Vec::with_capacity(most);
            for (k, v) in used.iter().take(most) {
                inos.push(ino::compose(shard, decode(v)?, key::second(k)));
                txn.delete(k.clone());
            }
            while inos.len() < most && *next <= ino::MAX_INDEX {
                inos.push(ino::compose(shard, 0, *next));
                *next += 1;
            }
            txn.put(key::next_index(shard), encode(next));
            left_to_give -= inos.len();
            of_shards.push(inos);
        }
        let inos: Vec<u64> = (0..per_shard)
            .flat_map(|nth| of_shards.iter().filter_map(move |inos| inos.get(nth).copied()))
            .collect();
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::takeover_tests::stage::Cluster;

    /// Files that are made one after the other are on all storage nodes, those whose records have been used before, too.
    #[test]
    fn numbers_of_all_storage_nodes_come_in_turn() {
        let cluster = Cluster::new(1);
        let numbers = &cluster.service.namespace.numbers;
        let reserve = |count| match numbers.reserve(0, count) {
            Ok(range) => range.inos,
            Err(refusal) => panic!("{refusal:?}"),
        };
        let shards = |inos: &[u64]| -> Vec<u16> { inos.iter().map(|&ino| ino::shard(ino)).collect() };
        let mut all = Vec::new();
        for (count, first) in [(6, 0), (5, 1), (1, 0), (4, 1)] {
            let inos = reserve(count);
            let turns: Vec<u16> = (first..).map(|n: u16| n % 2).take(count as usize).collect();
            assert_eq!(shards(&inos), turns);
            all.extend(inos);
        }
        let mut txn = cluster.service.journal.txn();
        all[..4].iter().for_each(|&ino| txn.recycle(ino));
        assert!(txn.commit().is_ok());
        let again = reserve(8);
        assert_eq!(shards(&again), [0, 1, 0, 1, 0, 1, 0, 1]);
        let used = again.iter().filter(|&&ino| ino::generation(ino) == 1);
        assert_eq!(used.count(), 4);
        all.extend(again);
        assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
    }
}
