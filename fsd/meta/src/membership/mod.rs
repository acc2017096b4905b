//! Which mounts there are, what becomes of what they held, and whether the servers' stores are what they were.

pub mod clear;
pub mod copies;
pub mod locks;
pub mod members;
pub mod missed;
pub mod recovery;
pub mod sessions;
pub mod window;

use std::sync::Arc;

use rt::sync::Mutex;

use crate::error::MetaError;
use crate::journal::Journal;
use crate::journal::records::Superblock;
use crate::namespace::Namespace;
use crate::nodes::Nodes;
use crate::rules::Rules;
use copies::Copies;
use fsd_node::config::Config;
use fsd_proto::wire::Terms;
use locks::FileLocks;
use members::Members;
use recovery::Recovery;
use sessions::Sessions;

/// Who takes part.
pub struct Membership {
    /// Locks of files.
    pub locks: Arc<FileLocks>,
    /// Transactions that were lost.
    pub recovery: Arc<Recovery>,
    /// Stores that were put back.
    pub copies: Arc<Copies>,
    /// The mounts.
    pub members: Arc<Members>,
}

impl Membership {
    /// As it is stored; `lost`: transactions may be missing.
    pub fn load(
        journal: &Journal,
        (config, superblock): (&Config, &Superblock),
        nodes: &Nodes,
        namespace: &Namespace,
        (lost, rules): (bool, Rules),
    ) -> Result<Self, MetaError> {
        let sessions = Sessions::load(journal.store.as_ref())?;
        let mounts = sessions.nodes.keys().copied().filter(|_| lost);
        let recovery = Arc::new(Recovery::open(journal, &namespace.transactions, mounts, rules)?);
        let copies = Arc::new(Copies::new(journal, nodes, &config.meta.dir));
        let locks = Arc::<FileLocks>::default();
        let members = Arc::new(Members {
            sessions: Mutex::new(sessions),
            record_bytes: superblock.record_bytes,
            terms: Terms {
                term_ms: config.membership.term_ms,
                margin_ms: config.membership.margin_ms,
                heartbeat_ms: config.membership.heartbeat_ms,
            },
            journal: journal.clone(),
            stores: Arc::clone(&nodes.stores),
            transactions: Arc::clone(&namespace.transactions),
            locks: Arc::clone(&locks),
            recovery: Arc::clone(&recovery),
            copies: Arc::clone(&copies),
        });
        Ok(Self {
            locks,
            recovery,
            copies,
            members,
        })
    }
}
