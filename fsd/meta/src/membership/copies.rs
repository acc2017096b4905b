//! Stores that were put back from an older copy, and must not be taken for what they were.
//!
//! This server keeps the *generation* of every storage node's store, and the storage nodes keep how far this server's order
//! has got; both are told only what no power cut undoes. A store that is behind what the others know of it is an older copy:
//! files would read as they were, or not be there, and nobody would be told. Mounts compare, too: those that join bring what
//! the storage nodes know, those that come back what they have been answered.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rt::channel::{Receiver, RecvTimeoutError};
use rt::sync::Mutex;

use crate::error::Refusal;
use crate::journal::Journal;
use crate::journal::order::Order;
use crate::nodes::Nodes;
use fsd_proto::ask;
use fsd_proto::rpc::Errno;

/// How often the storage nodes are asked, and told: a copy made so shortly before its store was last used is not told from it.
const EVERY: Duration = Duration::from_secs(2);

/// Compares what the servers know of each other's stores.
pub struct Copies {
    order: Arc<Order>,
    nodes: Nodes,
    /// Where this server's own store is.
    dir: PathBuf,
    /// Storage nodes whose leases are still those of mounts that an accepted older store does not know: nobody is let in before.
    foreign_leases: Mutex<BTreeSet<u16>>,
    /// This server's own store is an older copy: why that is believed.
    older: Mutex<Option<String>>,
    /// Who is told of that.
    once_older: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Copies {
    /// Of the store in `dir`.
    pub fn new(journal: &Journal, nodes: &Nodes, dir: &Path) -> Self {
        let foreign = nodes.ids().filter(|_| nodes.stores.accept_older);
        Self {
            foreign_leases: Mutex::new(foreign.collect()),
            order: Arc::clone(&journal.order),
            nodes: nodes.clone(),
            dir: dir.to_owned(),
            older: Mutex::default(),
            once_older: OnceLock::new(),
        }
    }

    /// Must mounts wait, because leases are still to be cleared?
    pub fn holds_up(&self) -> bool {
        !self.foreign_leases.lock().is_empty()
    }

    /// Somebody knows that this server's order has got to a place.
    pub fn check_place(&self, who: &str, known: u64) -> Result<(), Refusal> {
        let own = self.order.executed();
        if known <= own || self.nodes.stores.accept_older {
            return Ok(());
        }
        let what = format!(
            "the metadata store in {} is an older copy: it ends with transaction {own}, and {who} knows of transaction {known}; \
             put the newest one back, or take it as it is with fsd meta --accept-older (see docs/operations.md)",
            self.dir.display()
        );
        self.older.lock().get_or_insert(what);
        self.once_older.get().inspect(|tell| tell());
        Err(Errno(libc::ESTALE).into())
    }

    /// Why this server must not go on, if so.
    pub fn is_older(&self) -> Option<String> {
        self.older.lock().clone()
    }

    /// Calls this when it is found out that this server must not go on.
    pub fn tell_once_older(&self, tell: Box<dyn Fn() + Send + Sync>) {
        let first = self.once_older.set(tell).is_ok();
        debug_assert!(first);
    }

    /// Tells a storage node how far this server has got, and learns its store's generation.
    fn compare(&self, id: u16, addr: &str) -> Result<(), Refusal> {
        let request = ask::storage::Compare {
            place: self.order.durable(),
            accept: self.nodes.stores.accept_older,
        };
        if self.foreign_leases.lock().contains(&id) {
            match self.nodes.asks.asked(id, ask::storage::ResetLeases {}) {
                Ok(_) => self.foreign_leases.lock().remove(&id),
                Err(error) => {
                    tracing::warn!(
                        "nobody is let in before the leases of storage node {id} are cleared: {error}"
                    );
                    return Ok(());
                }
            };
        }
        let (generation, place) = match self.nodes.asks.asked(id, request) {
            Ok(known) => known,
            Err(error) => {
                tracing::debug!("storage node {id} is not asked for its generation: {error}");
                return Ok(());
            }
        };
        self.check_place(&format!("storage node {id}"), place)?;
        let stores = &self.nodes.stores;
        if stores.check_generation(id, addr, generation).is_err() {
            return Ok(());
        }
        stores.note_generation(id, generation)
    }

    /// Compares with all storage nodes, every now and then.
    pub fn run(&self, stop: &Receiver<()>) {
        loop {
            for section in self.nodes.stores.sections() {
                if let Err(refusal) = self.compare(section.id, &section.listen)
                    && self.is_older().is_none()
                {
                    tracing::error!("generations cannot be noted: {}", refusal.errno());
                }
            }
            match stop.recv_timeout(EVERY) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => return,
            }
        }
    }
}
