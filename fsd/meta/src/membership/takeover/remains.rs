//! What the dead leave at the storage nodes: lease records, bytes beyond the ends of files, files without a name.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use crate::error::{MetaError, Refusal};
use crate::journal::Journal;
use crate::journal::records::key;
use crate::namespace::transactions::Transactions;
use crate::nodes::Nodes;
use crate::rules::{Flaw, Rules};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::DeadMount;
use fsd_proto::{ask, ino};

/// Most lease records that are asked about at once.
const RECORDS: usize = 4096;

/// Clears away what dead mounts left.
pub struct Remains {
    pub journal: Journal,
    pub nodes: Nodes,
    pub transactions: Arc<Transactions>,
    pub rules: Rules,
}

impl Remains {
    /// Nobody alive holds anything: clear all leases, cut all files, reap all orphans.
    pub fn reset(&self) -> Result<(), MetaError> {
        for node in self.nodes.ids() {
            self.nodes.ask(node, ask::storage::ResetLeases {})?;
        }
        self.clear()
    }

    /// Nobody alive has leased anything: cut all files, reap all orphans.
    pub fn clear(&self) -> Result<(), MetaError> {
        self.cut(|_| true)?;
        Ok(self.transactions.reap(|_| true)?)
    }

    /// Cuts the files that the dead owned. As long as the lease records name the dead nobody else changes them, and whoever looks
    /// for them again, because it was interrupted, finds the same ones.
    pub fn cut_owned(&self, dead: &[DeadMount]) -> Result<(), MetaError> {
        let mut owned: HashSet<(u16, u64)> = HashSet::new();
        for node in self.nodes.ids() {
            let mut from = Some(0);
            while let Some(first) = from {
                let request = ask::storage::Owned {
                    dead: dead.to_vec(),
                    from: first,
                };
                let records = self.nodes.ask(node, request)?;
                owned.extend(records.found.into_iter().map(|index| (node, index)));
                from = records.next.filter(|next| *next > first);
            }
        }
        // What they had made and not told anybody about.
        let mut reserved: HashSet<u64> = HashSet::new();
        for dead in dead {
            let prefix = &key::reserved(dead.node, 0)[..9];
            let numbers = self.journal.txn().scan_stored(prefix, usize::MAX)?;
            reserved.extend(numbers.iter().map(|(k, _)| key::second(k)));
        }
        if owned.is_empty() && reserved.is_empty() {
            return Ok(());
        }
        self.cut(|number| {
            reserved.contains(&number) || owned.contains(&(ino::shard(number), ino::index(number)))
        })
    }

    /// Gives what mounts left beyond the ends of files, and the blocks of inodes that are no more, back: what they wrote and
    /// had not told anybody about before they died, and what a power cut of a storage node brought back after it had been
    /// freed. Only of inodes that nobody alive can change, for else a file may be longer than the store knows.
    fn cut(&self, concerns: impl Fn(u64) -> bool) -> Result<(), MetaError> {
        if self.rules.lack(Flaw::EndsNotCut) {
            return Ok(());
        }
        // What the store says of sizes must not be undone once blocks are gone for it.
        self.journal.order.sync()?;
        let mut bytes = 0;
        for node in self.nodes.ids() {
            let mut after = 0;
            loop {
                let inos = self.nodes.ask(node, ask::storage::Inodes { after })?;
                let Some(&last) = inos.last() else { break };
                after = last;
                let mut ends = Vec::with_capacity(inos.len());
                for ino in inos.into_iter().filter(|ino| concerns(*ino)) {
                    match self.journal.txn().inode(ino) {
                        Ok(inode) => ends.push((ino, Some(inode.attr.size))),
                        Err(Refusal::Errno(Errno(libc::ENOENT))) => ends.push((ino, None)),
                        // An inode that cannot be read: nothing of it is touched.
                        Err(Refusal::Errno(_)) => {}
                        Err(Refusal::Store(error)) => return Err(error.into()),
                    }
                }
                if !ends.is_empty() {
                    bytes += self.nodes.ask(node, ask::storage::Cut { ends })?;
                }
            }
        }
        if bytes > 0 {
            tracing::info!("{bytes} bytes beyond the ends of files, or of no file at all, have been freed");
        }
        Ok(())
    }

    /// Removes the files without a name that nobody has open or keeps, as the lease records say. Not those whose records are lost: others
    /// may have them open, and write to their frames, who have not found that out. False: there are such.
    pub fn reap_unused(&self) -> Result<bool, MetaError> {
        let mut known = true;
        let mut orphans: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
        for number in self.transactions.orphan_numbers()? {
            orphans.entry(ino::shard(number)).or_default().push(number);
        }
        let mut unused: HashSet<u64> = HashSet::new();
        for (shard, inos) in orphans {
            let mut found_here: Vec<u64> = Vec::new();
            for inos in inos.chunks(RECORDS) {
                let inos = inos.to_vec();
                found_here.extend(self.nodes.ask(shard, ask::storage::Unused { inos })?);
            }
            // Asked last: it was the same table all the while, if it still is.
            let table = || Ok::<_, MetaError>(self.nodes.ask(shard, ask::storage::Attach {})?.table);
            if self.journal.eras.has_tables() && !self.journal.eras.is_known(shard, table()?) {
                known = false;
                continue;
            }
            unused.extend(found_here);
        }
        if !unused.is_empty() {
            tracing::info!(
                "{} files without a name, which the dead had open, are removed",
                unused.len()
            );
            self.transactions.reap(|number| unused.contains(&number))?;
        }
        Ok(known)
    }
}
