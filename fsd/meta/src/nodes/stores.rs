//! Which storage node's store is which, and how new it must be. A store has a number of its own; the metadata server keeps
//! those it has first met at the addresses of its storage nodes, tells them to mounts that join, and talks to no others: a
//! store that is not the one whose blocks the inodes mean would answer every question with "nothing there".

use std::sync::Arc;

use rdma_transport::TransportError;
use rt::sync::Mutex;

use crate::error::{MetaError, Refusal};
use crate::journal::records::{Txn, decode, encode, key};
use fsd_node::config::StorageConfig;
use fsd_node::store::Store;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::stores::{older_store, other_store};
use fsd_proto::wire::StorageInfo;

/// What is known of the storage nodes' stores.
pub struct Stores {
    store: Arc<dyn Store>,
    sections: Vec<StorageConfig>,
    /// Take all stores as they are.
    pub accept_older: bool,
    /// By storage node; zero where nothing is known.
    generations: Mutex<Vec<u64>>,
    /// What was said last of a storage node's store: not at every attempt.
    said: Mutex<String>,
}

impl Stores {
    /// As the metadata server's own store says.
    pub fn load(
        store: Arc<dyn Store>,
        sections: &[StorageConfig],
        accept_older: bool,
    ) -> Result<Self, MetaError> {
        let generations = store.get(&key::generations())?;
        let generations = generations.map_or_else(|| Ok(Vec::new()), |bytes| decode(&bytes))?;
        Ok(Self {
            store,
            sections: sections.to_vec(),
            accept_older,
            generations: Mutex::new(generations),
            said: Mutex::default(),
        })
    }

    /// The storage nodes of the configuration.
    pub fn sections(&self) -> &[StorageConfig] {
        &self.sections
    }

    /// The stores by storage node; none before the first mount has told.
    pub fn known(&self) -> Result<Vec<String>, Refusal> {
        let stored = self.store.get(&key::stores())?;
        stored.map_or_else(|| Ok(Vec::new()), |bytes| decode(&bytes))
    }

    /// A mount tells which stores it has found.
    pub fn check(&self, found: &[String]) -> Result<(), Refusal> {
        let known = self.known()?;
        if known.is_empty() {
            let mut txn = Txn::new(self.store.as_ref());
            txn.put(key::stores(), encode(&found.to_vec()));
            txn.commit()?;
            return Ok(self.store.sync()?);
        }
        for ((section, found), expected) in self.sections.iter().zip(found).zip(&known) {
            if found != expected {
                tracing::error!("{}", other_store(section.id, &section.listen, found, expected));
                return Err(Errno(libc::ESTALE).into());
            }
        }
        Ok(())
    }

    /// What mounts are told of the storage nodes.
    pub fn infos(&self) -> Vec<StorageInfo> {
        // Where they cannot be read nothing can, and whoever asks for more is told.
        let stores = self.known().unwrap_or_default();
        let info = |s: &StorageConfig| StorageInfo {
            id: s.id,
            listen: s.listen.clone(),
            store: stores.get(usize::from(s.id)).cloned(),
            generation: self.generation(s.id),
        };
        self.sections.iter().map(info).collect()
    }

    /// The generations that are known.
    pub fn generations(&self) -> Vec<u64> {
        self.generations.lock().clone()
    }

    /// The generation that a storage node's store has at least; zero: any.
    fn generation(&self, id: u16) -> u64 {
        let known = self.generations.lock().get(usize::from(id)).copied();
        known.filter(|_| !self.accept_older).unwrap_or(0)
    }

    /// Is a store's generation what is known, or later?
    pub fn check_generation(&self, id: u16, addr: &str, found: u64) -> Result<(), RpcError> {
        let known = self.generation(id);
        if found >= known {
            return Ok(());
        }
        let what = older_store(id, addr, found, known);
        let mut said = self.said.lock();
        if *said != what {
            tracing::error!("{what}");
            said.clone_from(&what);
        }
        Err(TransportError::Invalid(what).into())
    }

    /// A storage node's store has this generation.
    pub fn note_generation(&self, id: u16, generation: u64) -> Result<(), Refusal> {
        let mut known = self.generations.lock();
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
}
