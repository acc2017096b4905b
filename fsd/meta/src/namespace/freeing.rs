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
                for &ino in some {
                    let (first, last) = (0, u64::MAX);
                    self.nodes.ask(node, ask::storage::Free { ino, first, last })?;
                }
                // A crash of the storage node that undid this would leave it blocks that nobody frees any more: the record
                // of what is to be freed stays until it cannot.
                if !self.rules.lack(Flaw::FreedForgotten) {
                    self.nodes.ask(node, ask::storage::Flush { inos: Vec::new() })?;
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
