//! The mount's connections: to the metadata server, the storage nodes, and the other mounts.
//!
//! A connection that breaks is made again in the background; requests wait for that up to their time
//! limit and are then repeated (the servers carry repeated transactions out only once).

mod clock;
mod log;
mod meta;
mod peers;
mod reach;
mod storage;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lockmgr::NodeId;
use rdma_transport::{Buffer, Connection, Fabric, TransportError};
use rt::sync::{Mutex, RwLock};
use rt::time::Instant;

use super::workers::Workers;
use fsd_node::endpoint::Endpoint;
use fsd_proto::ask;
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::{Calls, Errno, RpcError};
use fsd_proto::wire::{Hello, JoinReply, LockSpec, MetaRequest, Role};
use peers::Peer;
use storage::StorageLink;

pub use storage::StorageSession;

/// Pause between attempts to reach a server again.
const RETRY: Duration = Duration::from_millis(50);

/// Longest wait for an answer of a mount that leaves with nothing left to lose.
const HURRY: Duration = Duration::from_secs(1);

/// How much longer than for an answer a mount waits for those of a former life to come back or be given up.
const JOIN_GRACE: Duration = Duration::from_secs(15);

/// What the connections need to know of the mount.
pub trait Owner: Send + Sync {
    /// File locks held, to be told to a metadata server that has restarted.
    fn held_locks(&self) -> Vec<LockSpec>;
    /// The connection to a storage node broke.
    fn storage_lost(&self, shard: u16);
    /// A metadata server that has lost a transaction, which it had answered, cannot carry it out again.
    fn transaction_lost(&self, request: &MetaRequest, error: Errno);
    /// There is a new connection to a storage node.
    fn storage_back(&self, shard: u16);
    /// A storage node came back without its leases: ours on it are worth nothing.
    fn leases_lost(&self, shard: u16);
    /// Another mount cannot be reached.
    fn peer_gone(&self, node: NodeId);
    /// Another mount can be reached (again).
    fn peer_back(&self, node: NodeId);
}

/// Why the cluster does not take a mount.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// The clocks are too far apart.
    #[error("the clock of this host is {0} the metadata server's")]
    Clocks(Skew),
    /// Anything else.
    #[error(transparent)]
    Rpc(#[from] RpcError),
}

/// All connections of a mount.
pub struct Net {
    me: Weak<Self>,
    calls: Arc<Calls>,
    fabric: Arc<dyn Fabric>,
    cluster: String,
    meta_addr: String,
    timeout: Duration,
    /// Nobody is waited for who is not there.
    hurried: AtomicBool,
    life: u64,
    name: String,
    meta: RwLock<Option<Arc<dyn Connection>>>,
    meta_connecting: Mutex<()>,
    log: log::Log,
    clock: clock::Clock,
    joined: OnceLock<JoinReply>,
    storage: OnceLock<Vec<StorageLink>>,
    record_bytes: AtomicU64,
    peers: Mutex<HashMap<NodeId, Peer>>,
    workers: Workers,
    owner: OnceLock<Weak<dyn Owner>>,
    stopping: AtomicBool,
}

/// What [`Net::new`] needs.
pub struct NetConfig {
    /// Cluster name.
    pub cluster: String,
    /// Address of the metadata server.
    pub meta_addr: String,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Host and mount point.
    pub name: String,
}

impl Net {
    /// Connections that are not made yet.
    #[must_use]
    pub fn new(config: NetConfig, endpoint: &Endpoint, workers: Workers) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            calls: Arc::clone(&endpoint.calls),
            fabric: Arc::clone(&endpoint.fabric),
            cluster: config.cluster,
            meta_addr: config.meta_addr,
            timeout: config.timeout,
            hurried: AtomicBool::new(false),
            life: endpoint.life,
            name: config.name,
            meta: RwLock::new(None),
            meta_connecting: Mutex::new(()),
            log: log::Log::default(),
            clock: clock::Clock::default(),
            joined: OnceLock::new(),
            storage: OnceLock::new(),
            record_bytes: AtomicU64::new(64),
            peers: Mutex::default(),
            workers,
            owner: OnceLock::new(),
            stopping: AtomicBool::new(false),
        })
    }

    /// Who is told of lost and regained connections.
    pub fn set_owner(&self, owner: Weak<dyn Owner>) {
        let _ = self.owner.set(owner);
    }

    fn owner(&self) -> Option<Arc<dyn Owner>> {
        self.owner.get().and_then(Weak::upgrade)
    }

    /// Joins the cluster and connects to every storage node.
    ///
    /// # Errors
    /// Unreachable, wrong key, clocks apart…
    pub fn join(&self) -> Result<JoinReply, JoinError> {
        let conn = self.connect_meta(Instant::now() + self.timeout())?;
        let skew = self.compare_clocks(&conn, meta::EXCHANGES)?;
        if skew.verdict() == Verdict::Unsure {
            tracing::warn!(
                "the metadata server answers too slowly to tell whether the clock of this host is right: it is {skew} the server's"
            );
        }
        let patience = Instant::now() + self.timeout() + JOIN_GRACE;
        let reply = loop {
            match self.join_on(&conn, None, skew) {
                Err(RpcError::Errno(Errno(libc::EAGAIN))) if Instant::now() < patience => {
                    rt::thread::sleep(RETRY);
                }
                Err(RpcError::Errno(Errno(libc::ETIME))) => return Err(JoinError::Clocks(skew)),
                other => break other?,
            }
        };
        self.fabric.set_identity(self.hello(Some(reply.node)).encode());
        self.record_bytes
            .store(u64::from(reply.record_bytes), Ordering::Relaxed);
        let links = reply.storage.iter().map(StorageLink::new).collect();
        let _ = self.storage.set(links);
        let _ = self.joined.set(reply.clone());
        self.log.heard(reply.durable);
        *self.meta.write() = Some(conn);
        let (mut ids, mut stores, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for storage in &reply.storage {
            let session = self.storage(storage.id)?;
            ids.push(session.attached.table);
            stores.push(session.attached.store.clone());
            places.push(session.attached.place);
        }
        self.meta(ask::meta::Tables { ids, stores, places })?;
        Ok(reply)
    }

    /// Messages and one-sided operations so far.
    #[must_use]
    pub fn messages(&self) -> u64 {
        let stats = self.fabric.stats();
        stats.messages_sent + stats.ops
    }

    fn hello(&self, node: Option<u16>) -> Hello {
        Hello::new(&self.cluster, Role::Client(node), self.life)
    }

    /// Waits a little before another attempt, if the error may pass and there is time.
    fn pause(&self, deadline: Instant, error: TransportError) -> Result<(), RpcError> {
        let passing = match &error {
            TransportError::Unreachable { .. }
            | TransportError::Disconnected { .. }
            | TransportError::Timeout { .. } => true,
            TransportError::Refused { reason, .. } => fsd_proto::rpc::is_not_yet(reason),
            _ => false,
        };
        if !passing || Instant::now() + RETRY > deadline || self.stopping.load(Ordering::Acquire) {
            return Err(error.into());
        }
        rt::thread::sleep(RETRY);
        Ok(())
    }

    /// A connection has ended: make it again where it is one that is always needed.
    pub fn disconnected(&self, conn: &Arc<dyn Connection>) {
        if self.stopping.load(Ordering::Acquire) {
            return;
        }
        let me = Weak::clone(&self.me);
        if self.meta.read().as_ref().is_some_and(|c| c.id() == conn.id()) {
            tracing::warn!("connection to the metadata server lost");
            self.workers.run(move || {
                while let Some(net) = me.upgrade() {
                    if net.stopping.load(Ordering::Acquire)
                        || net.meta_conn(Instant::now() + net.timeout()).is_ok()
                    {
                        return;
                    }
                    rt::thread::sleep(RETRY);
                }
            });
            return;
        }
        let shard = self.storage.get().and_then(|links| {
            links
                .iter()
                .find(|l| {
                    l.session
                        .read()
                        .as_ref()
                        .is_some_and(|s| s.conn.id() == conn.id())
                })
                .map(|l| l.id)
        });
        if let Some(shard) = shard {
            tracing::warn!("connection to storage node {shard} lost");
            if let Some(owner) = self.owner() {
                owner.storage_lost(shard);
            }
            self.workers.run(move || {
                while let Some(net) = me.upgrade() {
                    if net.stopping.load(Ordering::Acquire) || net.storage(shard).is_ok() {
                        return;
                    }
                    // It may have answered at once, with a refusal.
                    rt::thread::sleep(RETRY);
                }
            });
            return;
        }
        let peer = self
            .peers
            .lock()
            .iter()
            .find(|(_, p)| p.conn.as_ref().is_some_and(|c| c.id() == conn.id()))
            .map(|(&node, _)| node);
        if let (Some(node), Some(owner)) = (peer, self.owner()) {
            owner.peer_gone(node);
        }
    }

    /// Memory that the fabric reads and writes in place.
    ///
    /// # Errors
    /// The system refuses.
    pub fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.fabric.buffer(len)
    }

    /// Longest wait for an answer.
    pub fn timeout(&self) -> Duration {
        if self.hurried.load(Ordering::Acquire) {
            HURRY.min(self.timeout)
        } else {
            self.timeout
        }
    }

    /// Longest wait for the metadata server: one that has restarted may wait for other mounts before it answers.
    pub(super) fn patience(&self) -> Duration {
        if self.hurried.load(Ordering::Acquire) {
            self.timeout()
        } else {
            self.timeout + JOIN_GRACE
        }
    }

    /// The mount leaves and has nothing left to lose.
    pub fn hurry(&self) {
        self.hurried.store(true, Ordering::Release);
    }

    /// No more attempts to reach anybody again.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }
}
