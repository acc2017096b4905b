//! The storage nodes as the metadata server sees them: behind a trait, so that tests can lose what they have not synced.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rdma_transport::{Connection, Fabric, TransportError};
use rt::sync::Mutex;

use super::stores::Stores;
use fsd_proto::ask;
use fsd_proto::rpc::{Calls, RpcError};
use fsd_proto::stores::other_store;
use fsd_proto::wire::{StorageReply, StorageRequest};

/// What the server asks of storage nodes.
pub trait StorageNodes: Send + Sync {
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
    pub fn asked<R>(&self, id: u16, request: R) -> Result<R::Reply, RpcError>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply>,
    {
        ask::answer_to::<R>(self.ask(id, &request.message())?)
    }
}

/// The fabric, and the calls made over it.
type Link = (Arc<dyn Fabric>, Arc<Calls>);

/// Those of the configuration, by the fabric.
pub struct FabricNodes {
    stores: Arc<Stores>,
    timeout: Duration,
    /// Only there when the server, which it calls, is complete.
    link: OnceLock<Link>,
    conns: Mutex<HashMap<u16, Arc<dyn Connection>>>,
}

impl FabricNodes {
    pub fn new(stores: &Arc<Stores>, timeout_ms: u64) -> Self {
        Self {
            stores: Arc::clone(stores),
            timeout: Duration::from_millis(timeout_ms),
            link: OnceLock::new(),
            conns: Mutex::default(),
        }
    }

    /// They can be reached from now on.
    pub fn attach(&self, fabric: &Arc<dyn Fabric>, calls: Arc<Calls>) {
        let _ = self.link.set((Arc::clone(fabric), calls));
    }

    fn link(&self) -> Result<&Link, TransportError> {
        self.link.get().ok_or(TransportError::Shutdown)
    }

    /// A connection to a storage node, made if need be.
    fn conn(&self, id: u16) -> Result<Arc<dyn Connection>, RpcError> {
        if let Some(conn) = self.conns.lock().get(&id).filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let section = self.stores.sections().iter().find(|s| s.id == id);
        let section = section.ok_or(TransportError::Shutdown)?;
        let conn = self.link()?.0.connect(&section.listen)?;
        self.check_store(id, &section.listen, &conn)?;
        self.conns.lock().insert(id, Arc::clone(&conn));
        Ok(conn)
    }

    /// Refuses a storage node that has another store.
    fn check_store(&self, id: u16, addr: &str, conn: &Arc<dyn Connection>) -> Result<(), RpcError> {
        let known = self.stores.known().map_err(|r| RpcError::Errno(r.errno()))?;
        let Some(expected) = known.get(usize::from(id)) else {
            return Ok(());
        };
        match self.link()?.1.call(conn, &StorageRequest::Attach, self.timeout)? {
            StorageReply::Attached(attached) if attached.store != *expected => {
                let what = other_store(id, addr, &attached.store, expected);
                tracing::error!("{what}");
                conn.close();
                Err(TransportError::Invalid(what).into())
            }
            StorageReply::Attached(attached) => self
                .stores
                .check_generation(id, addr, attached.generation)
                .inspect_err(|_| conn.close()),
            _ => Ok(()),
        }
    }
}

impl StorageNodes for FabricNodes {
    fn ask(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError> {
        self.link()?.1.call(&self.conn(id)?, request, self.timeout)
    }

    fn close(&self) {
        self.conns.lock().clear();
    }
}
