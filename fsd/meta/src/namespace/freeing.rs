//! Freeing the blocks of removed files on the storage nodes.

use std::sync::atomic::{AtomicU64, Ordering};

use rt::channel::{Receiver, Sender, unbounded};

use crate::error::MetaError;
use crate::journal::Journal;
use crate::journal::records::key;
use crate::nodes::Nodes;
use crate::rules::{Flaw, Rules};
use fsd_proto::ask;
use fsd_proto::rpc::Responder;
use fsd_proto::wire::{BlockRange, MOST_RANGES};

/// So many inodes are freed between two syncs of the storage nodes.
const FREED_TOGETHER: usize = 4096;

/// What the thread that frees blocks is told.
pub enum Told {
    /// An inode is gone, and its blocks are to be freed.
    Freed(u64),
    /// Somebody waits for what has been told so far.
    Settle(Responder),
}

/// Inodes that are gone, and whose blocks are not freed yet.
pub struct Freeing {
    journal: Journal,
    nodes: Nodes,
    rules: Rules,
    tell: Sender<Told>,
    inodes: AtomicU64,
}

impl Freeing {
    /// Those that a store knows; what the thread that frees blocks is told.
    pub fn load(journal: &Journal, nodes: &Nodes, rules: Rules) -> Result<(Self, Receiver<Told>), MetaError> {
        let (tell, told) = unbounded();
        let freeing = Self {
            journal: journal.clone(),
            nodes: nodes.clone(),
            rules,
            tell,
            inodes: AtomicU64::new(0),
        };
        for (k, _) in journal.store.scan(b"F", b"G", usize::MAX)? {
            freeing.later(key::number(&k));
        }
        Ok((freeing, told))
    }

    /// How many there are.
    pub fn inodes(&self) -> u64 {
        self.inodes.load(Ordering::Relaxed)
    }

    /// One more.
    pub fn later(&self, ino: u64) {
        self.inodes.fetch_add(1, Ordering::Relaxed);
        let _ = self.tell.send(Told::Freed(ino));
    }

    /// Answers when it has been tried to free all there are now.
    pub fn settle(&self, responder: Responder) {
        // A server that stops closes the connection.
        let _ = self.tell.send(Told::Settle(responder));
    }

    /// Frees the blocks of removed inodes everywhere, then lets their records be used again. What is left in `inos` is to
    /// be tried again.
    pub fn free(&self, inos: &mut Vec<u64>) -> Result<(), MetaError> {
        // A crash that undid a removal would bring back the name of a file whose blocks are gone.
        if !self.rules.lack(Flaw::FreedEarly) {
            self.journal.order.sync()?;
        }
        while !inos.is_empty() {
            let some = &inos[inos.len().saturating_sub(FREED_TOGETHER)..];
            for node in self.nodes.ids() {
                for some in some.chunks(MOST_RANGES) {
                    let ranges = some.iter().map(|&ino| BlockRange::all(ino)).collect();
                    self.nodes.ask(node, ask::storage::Free { ranges })?;
                }
                // A crash of the storage node that undid this would leave it blocks that nobody frees any more: the record
                // of what is to be freed stays until it cannot.
                if !self.rules.lack(Flaw::FreedForgotten) {
                    self.nodes.ask(
                        node,
                        ask::storage::Flush {
                            inos: Vec::new(),
                            parts: Vec::new(),
                            data: Vec::new(),
                        },
                    )?;
                }
            }
            let mut txn = self.journal.txn();
            for &ino in some {
                txn.delete(key::freed(ino));
                txn.recycle(ino);
            }
            txn.commit()?;
            self.inodes.fetch_sub(some.len() as u64, Ordering::Relaxed);
            inos.truncate(inos.len() - some.len());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash_tests::world::NODES;
    use crate::takeover_tests::stage::Cluster;
    use fsd_node::store::Store;
    use fsd_proto::ino;
    use fsd_proto::wire::StorageRequest;

    /// Removed inodes, as their removal leaves them.
    fn removed(cluster: &Cluster, count: usize) -> Vec<u64> {
        let inos: Vec<u64> = (2..).map(|index| ino::compose(0, 0, index)).take(count).collect();
        let mut txn = cluster.service.journal.txn();
        inos.iter().for_each(|&ino| txn.put(key::freed(ino), Vec::new()));
        txn.commit().unwrap();
        inos.iter()
            .for_each(|&ino| cluster.service.namespace.freeing.later(ino));
        inos
    }

    /// Each storage node is asked for few things, of bounded size, and for all; then to make that durable.
    #[test]
    fn the_blocks_of_many_files_are_freed_by_few_requests() {
        let cluster = Cluster::new(1);
        let inos = removed(&cluster, 2 * MOST_RANGES + 1);
        let freeing = &cluster.service.namespace.freeing;
        assert_eq!(freeing.inodes(), inos.len() as u64);
        cluster.storage.asked.lock().clear();
        freeing.free(&mut inos.clone()).unwrap();
        let asked = cluster.storage.asked.lock().clone();
        for node in 0..NODES as u16 {
            let mut theirs: Vec<StorageRequest> = asked
                .iter()
                .filter(|(n, _)| *n == node)
                .map(|(_, r)| r.clone())
                .collect();
            assert_eq!(
                theirs.pop(),
                Some(StorageRequest::Flush {
                    inos: Vec::new(),
                    parts: Vec::new(),
                    data: Vec::new()
                })
            );
            assert_eq!(theirs.len(), 3);
            let mut freed = Vec::new();
            for request in theirs {
                let StorageRequest::Free { ranges } = request else {
                    panic!("{request:?}")
                };
                assert!(ranges.len() <= MOST_RANGES);
                freed.extend(ranges);
            }
            let all: Vec<BlockRange> = inos.iter().map(|&ino| BlockRange::all(ino)).collect();
            assert_eq!(freed, all);
        }
        assert_eq!(freeing.inodes(), 0);
        let left = cluster.store.scan(b"F", b"G", usize::MAX).unwrap();
        assert!(left.is_empty(), "{left:?}");
    }

    /// A storage node that is away has all asked of it once more, and no number is used again before.
    #[test]
    fn what_a_storage_node_has_not_freed_is_asked_again() {
        let cluster = Cluster::new(1);
        let mut inos = removed(&cluster, MOST_RANGES + 1);
        let freeing = &cluster.service.namespace.freeing;
        cluster.storage.away.lock().insert(1);
        assert!(freeing.free(&mut inos).is_err());
        let left = cluster.store.scan(b"F", b"G", usize::MAX).unwrap();
        assert_eq!((inos.len(), left.len()), (MOST_RANGES + 1, MOST_RANGES + 1));
        cluster.storage.away.lock().clear();
        freeing.free(&mut inos).unwrap();
        assert!(inos.is_empty() && freeing.inodes() == 0);
        let frees = cluster
            .storage
            .asked(|r| matches!(r, StorageRequest::Free { .. }));
        assert_eq!(frees, [0, 0, 0, 0, 1, 1]);
    }
}
