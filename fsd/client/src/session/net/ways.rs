//! What all connections of a mount have in common: the endpoint, how long is waited, who is told.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lockmgr::NodeId;
use rdma_transport::{Buffer, Fabric, TransportError};
use rt::sync::Mutex;
use rt::time::Instant;

use super::patience::Patience;
use crate::session::workers::Workers;
use fsd_node::endpoint::Endpoint;
use fsd_proto::rpc::{Calls, Errno, RpcError};
use fsd_proto::wire::{AttrUpdate, Carried, Hello, LockSpec, MetaRequest, Role};

/// Pause between attempts to reach a server again.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// What the connections need to know of the mount.
pub trait Owner: Send + Sync {
    /// File locks held, to be told to a metadata server that has restarted.
    fn held_locks(&self) -> Vec<LockSpec>;
    /// The attributes that this mount has under shared leases, as far as they can be looked at now: who has told them to the metadata
    /// server may be gone, with a host of that which has forgotten them.
    fn shared_attrs(&self) -> Vec<AttrUpdate>;
    /// The connection to a storage node broke.
    fn storage_lost(&self, shard: u16);
    /// A metadata server that has lost a transaction, which it had answered, cannot carry it out again.
    fn transaction_lost(&self, request: &MetaRequest, error: Errno);
    /// The metadata server has carried out, at this place, what this mount had carried out itself.
    fn carried_out(&self, change: &Carried, place: u64);
    /// There is a new connection to a storage node.
    fn storage_back(&self, shard: u16);
    /// A storage node came back without its leases: ours on it are worth nothing.
    fn leases_lost(&self, shard: u16);
    /// The metadata server has taken something that was sent at this time since the host was started for a sign of life.
    fn alive(&self, sent: Duration);
    /// This life of the mount has been declared dead.
    fn declared_dead(&self);
    /// Another mount cannot be reached just now.
    fn peer_unreachable(&self, node: NodeId);
    /// Another mount does not answer over a connection that is up; messages go another way.
    fn peer_silent(&self, node: NodeId);
    /// Another mount has left or ended: nothing that it was asked will be answered.
    fn peer_gone(&self, node: NodeId);
    /// Another mount can be reached (again).
    fn peer_back(&self, node: NodeId);
}

/// What [`Net::new`](super::Net::new) needs.
pub struct NetConfig {
    /// Cluster name.
    pub cluster: String,
    /// Address of the metadata server.
    pub meta_addr: String,
    /// How long servers are waited for.
    pub patience: Patience,
    /// Host and mount point.
    pub name: String,
}

/// An endpoint, and how it is used.
pub struct Ways {
    pub(super) calls: Arc<Calls>,
    pub(super) fabric: Arc<dyn Fabric>,
    pub(super) cluster: String,
    pub(super) name: String,
    /// How long servers are waited for.
    pub patience: Patience,
    /// When a server was last found away or came back.
    outage: Mutex<Option<Instant>>,
    pub(super) life: u64,
    pub(super) workers: Workers,
    owner: OnceLock<Weak<dyn Owner>>,
    pub(super) stopping: AtomicBool,
}

impl Ways {
    pub(super) fn new(config: NetConfig, endpoint: &Endpoint, workers: Workers) -> Self {
        Self {
            calls: Arc::clone(&endpoint.calls),
            fabric: Arc::clone(&endpoint.fabric),
            cluster: config.cluster,
            name: config.name,
            patience: config.patience,
            outage: Mutex::default(),
            life: endpoint.life,
            workers,
            owner: OnceLock::new(),
            stopping: AtomicBool::new(false),
        }
    }

    /// Who is told of lost and regained connections.
    pub fn set_owner(&self, owner: Weak<dyn Owner>) {
        let _ = self.owner.set(owner);
    }

    pub(super) fn owner(&self) -> Option<Arc<dyn Owner>> {
        self.owner.get().and_then(Weak::upgrade)
    }

    /// The metadata server says that this life of the mount is over.
    pub fn declared_dead(&self) {
        if let Some(owner) = self.owner() {
            owner.declared_dead();
        }
    }

    /// Messages and batches of one-sided operations so far.
    #[must_use]
    pub fn messages(&self) -> u64 {
        let stats = self.fabric.stats();
        stats.messages_sent + stats.batches
    }

    pub(super) fn hello(&self, node: Option<u16>) -> Hello {
        Hello::new(&self.cluster, Role::Client(node), self.life)
    }

    /// A server has just been found away, or has come back.
    pub(super) fn note_outage(&self) {
        *self.outage.lock() = Some(Instant::now());
    }

    /// Was a server found away, or did it come back, since then?
    pub(super) fn outage_since(&self, since: Instant) -> bool {
        self.outage.lock().is_some_and(|at| at >= since)
    }

    /// Waits a little before another attempt to reach a server that is needed since `began`, if the error may pass and there is time.
    pub(super) fn pause(&self, began: Instant, error: TransportError) -> Result<(), RpcError> {
        self.note_outage();
        let passing = match &error {
            TransportError::Unreachable { .. }
            | TransportError::Disconnected { .. }
            | TransportError::Timeout { .. } => true,
            TransportError::Refused { reason, .. } => fsd_proto::rpc::is_not_yet(reason),
            _ => false,
        };
        if !passing || self.patience.is_over(began) || self.stopping.load(Ordering::Acquire) {
            return Err(error.into());
        }
        rt::thread::sleep(RETRY);
        Ok(())
    }

    /// Memory that the fabric reads and writes in place.
    ///
    /// # Errors
    /// The system refuses.
    pub fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.fabric.buffer(len)
    }

    /// No more attempts to reach anybody again.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }
}
