//! The storage nodes as the metadata server sees them: behind a trait, so that tests can lose what they have not synced.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{Connection, Fabric, TransportError};
use rt::sync::Mutex;

use super::copies::Copies;
use super::stores::known_stores;
use fsd_node::config::Config;
use fsd_node::store::Store;
use fsd_proto::ask;
use fsd_proto::rpc::{Calls, RpcError};
use fsd_proto::stores::other_store;
use fsd_proto::wire::{StorageReply, StorageRequest};

/// What the server asks of storage nodes.
pub(super) trait StorageNodes: Send + Sync {
    /// Asks one, and waits for the answer.
    ///
    /// # Errors
    /// It cannot be reached, refuses, or has another store than it had.
    fn ask(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError>;
    /// Ends the connections.
    fn close(&self);
}

impl dyn StorageNodes {
    /// Asks one; an answer to something else is an error.
    ///
    /// # Errors
    /// As [`StorageNodes::ask`].
    pub(super) fn asked<R>(&self, id: u16, request: R) -> Result<R::Reply, RpcError>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply>,
    {
        ask::answer_to::<R>(self.ask(id, &request.message())?)
    }
}

/// Those of the configuration, by the fabric.
pub(super) struct FabricNodes {
    config: Config,
    store: Arc<dyn Store>,
    fabric: Arc<dyn Fabric>,
    calls: Arc<Calls>,
    copies: Arc<Copies>,
    conns: Mutex<HashMap<u16, Arc<dyn Connection>>>,
}

impl FabricNodes {
    pub fn new(
        config: &Config,
        store: &Arc<dyn Store>,
        fabric: &Arc<dyn Fabric>,
        calls: Arc<Calls>,
        copies: &Arc<Copies>,
    ) -> Self {
        Self {
            config: config.clone(),
            store: Arc::clone(store),
            fabric: Arc::clone(fabric),
            calls,
            copies: Arc::clone(copies),
            conns: Mutex::default(),
        }
    }

    fn patience(&self) -> Duration {
        Duration::from_millis(self.config.timeout_ms)
    }

    /// A connection to a storage node, made if need be.
    fn conn(&self, id: u16) -> Result<Arc<dyn Connection>, RpcError> {
        if let Some(conn) = self.conns.lock().get(&id).filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let section = self.config.storage.iter().find(|s| s.id == id);
        let section = section.ok_or(TransportError::Shutdown)?;
        let conn = self.fabric.connect(&section.listen)?;
        self.check_store(id, &section.listen, &conn)?;
        self.conns.lock().insert(id, Arc::clone(&conn));
        Ok(conn)
    }

    /// Refuses a storage node that has another store.
    fn check_store(&self, id: u16, addr: &str, conn: &Arc<dyn Connection>) -> Result<(), RpcError> {
        let known = known_stores(self.store.as_ref()).map_err(|r| RpcError::Errno(r.errno()))?;
        let Some(expected) = known.get(usize::from(id)) else {
            return Ok(());
        };
        match self.calls.call(conn, &StorageRequest::Attach, self.patience())? {
            StorageReply::Attached(attached) if attached.store != *expected => {
                let what = other_store(id, addr, &attached.store, expected);
                tracing::error!("{what}");
                conn.close();
                Err(TransportError::Invalid(what).into())
            }
            StorageReply::Attached(attached) => self
                .copies
                .check_generation(id, addr, attached.generation)
                .inspect_err(|_| conn.close()),
            _ => Ok(()),
        }
    }
}

impl StorageNodes for FabricNodes {
    fn ask(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError> {
        self.calls.call(&self.conn(id)?, request, self.patience())
    }

    fn close(&self) {
        self.conns.lock().clear();
    }
}
