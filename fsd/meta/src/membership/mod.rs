//! Which mounts there are, what becomes of what they held, and whether the servers' stores are what they were.

pub mod copies;
pub mod locks;
pub mod members;
pub mod missed;
pub mod pulse;
pub mod recovery;
pub mod sessions;
pub mod takeover;
pub mod window;

use std::sync::Arc;

use rt::channel::{Receiver, unbounded};
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
use pulse::Pulse;
use recovery::Recovery;
use sessions::Sessions;
use takeover::Takeover;
use takeover::remains::Remains;

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
    /// What becomes of what the dead had.
    pub takeover: Arc<Takeover>,
}

/// What the threads are told that look after membership.
pub struct Woken {
    /// A connection is lost.
    pub lost: Receiver<()>,
    /// There may be something to take over.
    pub takeover: Receiver<()>,
}

impl Membership {
    /// As it is stored; `lost`: transactions may be missing.
    pub fn load(
        journal: &Journal,
        (config, superblock): (&Config, &Superblock),
        nodes: &Nodes,
        namespace: &Namespace,
        (lost, rules): (bool, Rules),
    ) -> Result<(Self, Woken), MetaError> {
        let sessions = Sessions::load(journal.store.as_ref())?;
        let alive = sessions.alive();
        let mounts = alive.iter().copied().filter(|_| lost);
        let recovery = Arc::new(Recovery::open(journal, &namespace.transactions, mounts, rules)?);
        let copies = Arc::new(Copies::new(journal, nodes, &config.meta.dir));
        // The dead as well: their locks are theirs until they are shut out.
        let locks = Arc::new(FileLocks::new(sessions.nodes.keys().copied()));
        let terms = Terms {
            term_ms: config.membership.term_ms,
            margin_ms: config.membership.margin_ms,
            heartbeat_ms: config.membership.heartbeat_ms,
        };
        let ((tell_lost, hear_lost), (wake, woken)) = (unbounded(), unbounded());
        let members = Arc::new(Members {
            sessions: Mutex::new(sessions),
            record_bytes: superblock.record_bytes,
            terms,
            journal: journal.clone(),
            stores: Arc::clone(&nodes.stores),
            transactions: Arc::clone(&namespace.transactions),
            locks: Arc::clone(&locks),
            recovery: Arc::clone(&recovery),
            copies: Arc::clone(&copies),
            pulse: Mutex::new(Pulse::new(terms)),
            lost: tell_lost,
            rules,
        });
        let remains = Remains {
            journal: journal.clone(),
            nodes: nodes.clone(),
            transactions: Arc::clone(&namespace.transactions),
            rules,
        };
        let membership = Self {
            locks,
            recovery,
            copies,
            takeover: Takeover::new(&members, nodes, remains, wake),
            members,
        };
        let told = Woken {
            lost: hear_lost,
            takeover: woken,
        };
        Ok((membership, told))
    }
}
