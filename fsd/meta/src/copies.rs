//! Stores that were put back from an older copy, and must not be taken for what they were.
//!
//! This server keeps the *generation* of every storage node's store, and the storage nodes keep how far this server's order
//! has got; both are told only what no power cut undoes. A store that is behind what the others know of it is an older copy:
//! files would read as they were, or not be there, and nobody would be told. Mounts compare, too: those that join bring what
//! the storage nodes know, those that come back what they have been answered.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::TransportError;
use rt::channel::{Receiver, RecvTimeoutError};
use rt::sync::Mutex;

use super::Refusal;
use super::records::{Txn, decode, encode, key};
use super::server::Inner;
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::stores::older_store;

/// How often the storage nodes are asked, and told: a copy made so shortly before its store was last used is not told from it.
const EVERY: Duration = Duration::from_secs(2);

/// What is known of the other servers' stores.
#[derive(Default)]
pub(super) struct Copies {
    /// Take all stores as they are.
    pub(super) accept: bool,
    /// Storage nodes whose leases are still those of mounts that an accepted older store does not know: nobody is let in before.
    foreign_leases: Mutex<BTreeSet<u16>>,
    /// By storage node; zero where nothing is known.
    generations: Mutex<Vec<u64>>,
    /// What was said last of a storage node's store: not at every attempt.
    told: Mutex<String>,
    /// This server's own store is an older copy: why that is believed.
    older: Mutex<Option<String>>,
}

impl Copies {
    pub(super) fn new(accept: bool, storage: impl Iterator<Item = u16>, generations: Vec<u64>) -> Self {
        Self {
            accept,
            foreign_leases: Mutex::new(storage.filter(|_| accept).collect()),
            generations: Mutex::new(generations),
            told: Mutex::default(),
            older: Mutex::default(),
        }
    }

    /// Must mounts wait, because leases are still to be cleared?
    pub(super) fn holds_up(&self) -> bool {
        !self.foreign_leases.lock().is_empty()
    }

    /// The generations that are known.
    pub(super) fn known(&self) -> Vec<u64> {
        self.generations.lock().clone()
    }

    /// The generation that a storage node's store has at least; zero: any.
    pub(super) fn generation(&self, id: u16) -> u64 {
        let known = self.generations.lock().get(usize::from(id)).copied();
        known.filter(|_| !self.accept).unwrap_or(0)
    }

    /// Is a store's generation what is known, or later?
    pub(super) fn check_generation(&self, id: u16, addr: &str, found: u64) -> Result<(), RpcError> {
        let known = self.generation(id);
        if found >= known {
            return Ok(());
        }
        let what = older_store(id, addr, found, known);
        let mut told = self.told.lock();
        if *told != what {
            tracing::error!("{what}");
            told.clone_from(&what);
        }
        Err(TransportError::Invalid(what).into())
    }
}

impl Inner {
    /// Somebody knows that this server's order has got to a place.
    pub(super) fn check_place(&self, who: &str, known: u64) -> Result<(), Refusal> {
        let own = self.order.executed();
        if known <= own || self.copies.accept {
            return Ok(());
        }
        let what = format!(
            "the metadata store in {} is an older copy: it ends with transaction {own}, and {who} knows of transaction {known}; \
             put the newest one back, or take it as it is with fsd meta --accept-older (see docs/operations.md)",
            self.config.meta.dir.display()
        );
        self.copies.older.lock().get_or_insert(what);
        Err(Errno(libc::ESTALE).into())
    }

    /// Why this server must not go on, if so.
    pub(super) fn is_older(&self) -> Option<String> {
        self.copies.older.lock().clone()
    }

    /// Tells a storage node how far this server has got, and learns its store's generation.
    fn compare(&self, id: u16, addr: &str) -> Result<(), Refusal> {
        let request = ask::storage::Compare {
            place: self.order.durable(),
            accept: self.copies.accept,
        };
        if self.copies.foreign_leases.lock().contains(&id) {
            match self.nodes.asked(id, ask::storage::ResetLeases {}) {
                Ok(_) => self.copies.foreign_leases.lock().remove(&id),
                Err(error) => {
                    tracing::warn!(
                        "nobody is let in before the leases of storage node {id} are cleared: {error}"
                    );
                    return Ok(());
                }
            };
        }
        let (generation, place) = match self.nodes.asked(id, request) {
            Ok(known) => known,
            Err(error) => {
                tracing::debug!("storage node {id} is not asked for its generation: {error}");
                return Ok(());
            }
        };
        self.check_place(&format!("storage node {id}"), place)?;
        if self.copies.check_generation(id, addr, generation).is_err() {
            return Ok(());
        }
        let mut known = self.copies.generations.lock();
        if known.len() <= usize::from(id) {
            known.resize(usize::from(id) + 1, 0);
        }
        if known[usize::from(id)] != generation {
            known[usize::from(id)] = generation;
            // It becomes durable with the next sync: what is forgotten is only how new a store must be.
            let mut txn = Txn::new(self.store.as_ref());
            txn.put(key::generations(), encode(&*known));
            txn.commit()?;
        }
        Ok(())
    }

    pub(super) fn copies_loop(self: &Arc<Self>, stop: &Receiver<()>) {
        loop {
            for section in &self.config.storage {
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

/// The generations that a store knows.
pub(super) fn stored(store: &dyn fsd_node::store::Store) -> Result<Vec<u64>, Refusal> {
    match store.get(&key::generations())? {
        Some(bytes) => decode(&bytes),
        None => Ok(Vec::new()),
    }
}
