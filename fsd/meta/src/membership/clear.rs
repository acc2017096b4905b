//! What is done when every mount is dead.

use std::sync::Arc;

use super::members::Members;
use crate::error::{MetaError, Refusal};
use crate::journal::Journal;
use crate::nodes::Nodes;
use crate::rules::{Flaw, Rules};
use fsd_proto::ask;
use fsd_proto::rpc::Errno;

/// Clears away what dead mounts left.
pub struct Clearing {
    pub journal: Journal,
    pub nodes: Nodes,
    pub members: Arc<Members>,
    pub rules: Rules,
}

impl Clearing {
    /// Nobody alive holds anything: clear all leases, reap all orphans, forget the dead.
    pub fn clear(&self) -> Result<(), MetaError> {
        for node in self.nodes.ids() {
            self.nodes.ask(node, ask::storage::ResetLeases {})?;
        }
        if !self.rules.lack(Flaw::EndsNotCut) {
            // What the store says of sizes must not be undone once blocks are gone for it.
            self.journal.order.sync()?;
            self.cut_ends()?;
        }
        if self.members.forget_dead()? {
            tracing::info!("every mount was dead: all leases have been reset");
        }
        Ok(())
    }

    /// Gives what mounts left beyond the ends of files, and the blocks of inodes that are no more, back: what they wrote and
    /// had not told anybody about before they died, and what a power cut of a storage node brought back after it had been
    /// freed. Only while no mount is alive, for else a file may be longer than the store knows.
    fn cut_ends(&self) -> Result<(), MetaError> {
        let mut bytes = 0;
        for node in self.nodes.ids() {
            let mut after = 0;
            loop {
                let inos = self.nodes.ask(node, ask::storage::Inodes { after })?;
                let Some(&last) = inos.last() else { break };
                after = last;
                let mut ends = Vec::with_capacity(inos.len());
                for ino in inos {
                    match self.journal.txn().inode(ino) {
                        Ok(inode) => ends.push((ino, Some(inode.attr.size))),
                        Err(Refusal::Errno(Errno(libc::ENOENT))) => ends.push((ino, None)),
                        // An inode that cannot be read: nothing of it is touched.
                        Err(Refusal::Errno(_)) => {}
                        Err(Refusal::Store(error)) => return Err(error.into()),
                    }
                }
                bytes += self.nodes.ask(node, ask::storage::Cut { ends })?;
            }
        }
        if bytes > 0 {
            tracing::info!("{bytes} bytes beyond the ends of files, or of no file at all, have been freed");
        }
        Ok(())
    }
}
