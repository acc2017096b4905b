//! Which storage node's store is which. A store has a number of its own; the metadata server keeps those it has first met
//! at the addresses of its storage nodes, tells them to mounts that join, and talks to no others: a store that is not the
//! one whose blocks the inodes mean would answer every question with "nothing there".

use super::Refusal;
use super::records::{Txn, decode, encode, key};
use super::server::Inner;
use fsd_node::store::Store;
use fsd_proto::rpc::Errno;
use fsd_proto::stores::other_store;

/// The stores by storage node; none before the first mount has told.
pub(super) fn known_stores(store: &dyn Store) -> Result<Vec<String>, Refusal> {
    match store.get(&key::stores())? {
        Some(bytes) => decode(&bytes),
        None => Ok(Vec::new()),
    }
}

impl Inner {
    /// A mount tells which stores it has found.
    pub(super) fn check_stores(&self, found: &[String]) -> Result<(), Refusal> {
        let known = known_stores(self.store.as_ref())?;
        if known.is_empty() {
            let mut txn = Txn::new(self.store.as_ref());
            txn.put(key::stores(), encode(&found.to_vec()));
            txn.commit()?;
            return Ok(self.store.sync()?);
        }
        for ((section, found), expected) in self.config.storage.iter().zip(found).zip(&known) {
            if found != expected {
                tracing::error!("{}", other_store(section.id, &section.listen, found, expected));
                return Err(Errno(libc::ESTALE).into());
            }
        }
        Ok(())
    }
}
