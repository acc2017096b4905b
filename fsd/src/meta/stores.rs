//! Which storage node's store is which. A store has a number of its own; the metadata server keeps those it has first met
//! at the addresses of its storage nodes, tells them to mounts that join, and talks to no others: a store that is not the
//! one whose blocks the inodes mean would answer every question with "nothing there".

use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{Connection, TransportError};

use super::Refusal;
use super::records::{Txn, decode, encode, key};
use super::server::Inner;
use crate::rpc::{Errno, RpcError};
use crate::wire::{StorageReply, StorageRequest};

/// What to say where a storage node has another store than it had.
#[must_use]
pub fn other_store(node: u16, addr: &str, found: &str, expected: &str) -> String {
    format!(
        "storage node {node} at {addr} has the store {found}, but this cluster's files are in {expected}: \
         start the node with the right directory, or put its address right"
    )
}

impl Inner {
    /// The stores by storage node; none before the first mount has told.
    pub(super) fn known_stores(&self) -> Result<Vec<String>, Refusal> {
        match self.store.get(&key::stores())? {
            Some(bytes) => decode(&bytes),
            None => Ok(Vec::new()),
        }
    }

    /// A mount tells which stores it has found.
    pub(super) fn check_stores(&self, found: &[String]) -> Result<(), Refusal> {
        let known = self.known_stores()?;
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

    /// Refuses a storage node that has another store.
    pub(super) fn check_store(
        &self,
        id: u16,
        addr: &str,
        conn: &Arc<dyn Connection>,
    ) -> Result<(), RpcError> {
        let known = self.known_stores().map_err(|r| RpcError::Errno(r.errno()))?;
        let Some(expected) = known.get(usize::from(id)) else {
            return Ok(());
        };
        let limit = Duration::from_millis(self.config.timeout_ms);
        match self.calls.call(conn, &StorageRequest::Attach, limit)? {
            StorageReply::Attached(attached) if attached.store != *expected => {
                let what = other_store(id, addr, &attached.store, expected);
                tracing::error!("{what}");
                conn.close();
                Err(TransportError::Invalid(what).into())
            }
            StorageReply::Attached(attached) => self
                .check_generation(id, addr, attached.generation)
                .inspect_err(|_| conn.close()),
            _ => Ok(()),
        }
    }
}
