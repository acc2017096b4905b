//! Lease managers over a real fabric: one storage endpoint and some nodes, all endpoints of this process.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anyhow::Context;
use lockmgr::{
    Directory, LeaseError, LeaseManager, LeaseUser, ManagerConfig, Mode, NodeId, RecordId, RecordLayout,
    Relinquish,
};
use parking_lot::Mutex;
use rdma_transport::mem::SharedMem;
use rdma_transport::{
    Access, Connection, Fabric, FabricStats, Handler, RegionKey, RemoteAddr, TransportError,
};

use super::PATIENCE;
use super::contend::Lock;
use crate::transport::peer::{Hosts, endpoint};

/// Records of a store.
pub const RECORDS: u64 = 1024;

/// Takes no messages.
pub struct Silent;

impl Handler for Silent {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, _conn: &Arc<dyn Connection>) {}
    fn message(&self, _conn: &Arc<dyn Connection>, _message: &[u8]) {}
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {}
}

/// A storage endpoint with zeroed memory.
pub struct Store {
    /// The endpoint.
    pub fabric: Arc<dyn Fabric>,
    /// Its memory.
    pub key: RegionKey,
    /// Where sockets are.
    pub dir: tempfile::TempDir,
}

impl Store {
    /// Opens it.
    ///
    /// # Errors
    /// The provider does not work here.
    pub fn open(
        provider: &str,
        hosts: &Hosts,
        spin: Duration,
        handler: Arc<dyn Handler>,
    ) -> anyhow::Result<Self> {
        let dir = tempfile::tempdir()?;
        let fabric = endpoint(provider, hosts, (dir.path(), 0, STORE), spin, handler)?;
        let bytes = RECORDS as usize * 64;
        let memory = Arc::new(SharedMem::anonymous(bytes)?);
        memory.zero(0, bytes)?;
        let key = fabric.register(&memory, Access::ALL)?;
        Ok(Self { fabric, key, dir })
    }
}

/// One of those that want leases.
pub struct Node {
    number: u16,
    /// Of the storage endpoint's memory, once it is known.
    key: OnceLock<RegionKey>,
    storage: OnceLock<Arc<dyn Connection>>,
    peers: Mutex<HashMap<u16, Arc<dyn Connection>>>,
    manager: OnceLock<Weak<LeaseManager>>,
}

impl Node {
    /// One that knows nobody yet.
    pub fn new(number: u16) -> Arc<Self> {
        Arc::new(Self {
            number,
            key: OnceLock::new(),
            storage: OnceLock::new(),
            peers: Mutex::default(),
            manager: OnceLock::new(),
        })
    }

    /// Its manager, which it from now on passes messages to.
    ///
    /// # Errors
    /// The manager refuses its settings.
    pub fn manage(self: &Arc<Self>) -> anyhow::Result<Arc<LeaseManager>> {
        let cfg = ManagerConfig::new(NodeId(self.number), 1, RecordLayout::new(64)?);
        let manager = LeaseManager::new(cfg, Arc::clone(self) as _, Arc::clone(self) as _)?;
        let _ = self.manager.set(Arc::downgrade(&manager));
        Ok(manager)
    }

    /// How the records are reached.
    pub fn set_storage(&self, conn: Arc<dyn Connection>) {
        let _ = self.storage.set(conn);
    }

    /// How another node is reached.
    pub fn add_peer(&self, number: u16, conn: Arc<dyn Connection>) {
        self.peers.lock().insert(number, conn);
    }

    /// The key of the records' memory: set here, or told by an endpoint called [`STORE`].
    pub fn key(&self) -> Option<RegionKey> {
        self.key.get().copied()
    }

    fn manager(&self) -> Option<Arc<LeaseManager>> {
        self.manager.get().and_then(Weak::upgrade)
    }
}

/// What the storage endpoint is called.
pub const STORE: &str = "store";

/// What a node is called.
pub fn name(node: u16) -> String {
    format!("node{node}")
}

/// The number of the node at the other end.
fn number(conn: &Arc<dyn Connection>) -> Option<u16> {
    let name = std::str::from_utf8(conn.peer_identity()).ok()?;
    name.strip_prefix("node")?.parse().ok()
}

impl Handler for Node {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, conn: &Arc<dyn Connection>) {
        if let Some(from) = number(conn) {
            self.peers.lock().entry(from).or_insert_with(|| Arc::clone(conn));
        }
    }
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        if conn.peer_identity() == STORE.as_bytes() {
            if let Ok(key) = message.try_into() {
                let _ = self.key.set(RegionKey(u64::from_le_bytes(key)));
            }
            return;
        }
        if let (Some(from), Some(manager)) = (number(conn), self.manager())
            && let Err(error) = manager.message(NodeId(from), message)
        {
            eprintln!("bench: {error}");
        }
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {}
}

impl Directory for Node {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        match self.storage.get().zip(self.key()) {
            Some((conn, key)) if id.index() < RECORDS => Ok((
                Arc::clone(conn),
                RemoteAddr {
                    key,
                    offset: id.index() * 64,
                },
            )),
            _ => Err(LeaseError::NoSuchRecord { record: id }),
        }
    }
    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        let conn = self.peers.lock().get(&to.0).cloned();
        match conn.map(|c| c.send(msg)) {
            Some(Ok(())) => Ok(()),
            _ => Err(LeaseError::BadMessage {
                why: "the peer cannot be reached",
            }),
        }
    }
}

impl LeaseUser for Node {
    fn revoke(&self, id: RecordId, from: Mode, _to: Option<Mode>) {
        let Some(manager) = self.manager() else { return };
        let again = Arc::clone(&manager);
        let modified = from == Mode::Exclusive;
        manager.close_gate(
            id,
            Box::new(move || {
                let how = Relinquish {
                    modified,
                    ..Relinquish::default()
                };
                if let Err(error) = again.relinquished(id, how) {
                    eprintln!("bench: {error}");
                }
            }),
        );
    }
    fn granted(&self, _id: RecordId, _mode: Mode, _version: u64, _payload: Option<&[u8]>) {}
    fn confirm(&self, _id: RecordId, _version: u64) {}
}

/// A node that takes leases.
pub struct Member {
    node: Arc<Node>,
    fabric: Arc<dyn Fabric>,
    manager: Arc<LeaseManager>,
}

impl Member {
    /// Opens its endpoint with `open`, given its name and handler. `records` is the region of the lease records at
    /// `storage`.
    ///
    /// # Errors
    /// The provider does not work here, nobody listens there.
    pub fn open(
        number: u16,
        records: RegionKey,
        storage: &str,
        open: impl FnOnce(&str, Arc<dyn Handler>) -> anyhow::Result<Arc<dyn Fabric>>,
    ) -> anyhow::Result<Self> {
        let node = Node::new(number);
        let _ = node.key.set(records);
        let fabric = open(&name(number), Arc::clone(&node) as _)?;
        let manager = node.manage()?;
        node.set_storage(fabric.connect(storage).context("storage")?);
        Ok(Self {
            node,
            fabric,
            manager,
        })
    }

    /// Where others find it.
    pub fn addr(&self) -> String {
        self.fabric.local_addr()
    }

    /// Its leases.
    pub fn manager(&self) -> &Arc<LeaseManager> {
        &self.manager
    }

    /// Connects to another node.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn meet(&self, number: u16, addr: &str) -> anyhow::Result<()> {
        self.node
            .add_peer(number, self.fabric.connect(addr).context("peer")?);
        Ok(())
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.fabric.shutdown();
    }
}

/// The nodes and their store.
pub struct LeaseCluster {
    members: Vec<Member>,
    store: Store,
}

impl LeaseCluster {
    /// Starts them.
    ///
    /// # Errors
    /// The provider does not work here.
    pub fn start(provider: &str, hosts: &Hosts, nodes: usize, spin: Duration) -> anyhow::Result<Self> {
        let store = Store::open(provider, hosts, spin, Arc::new(Silent))?;
        let mut members = Vec::new();
        for number in 0..u16::try_from(nodes)? {
            let place = usize::from(number) + 1;
            let open = |name: &str, handler| {
                endpoint(provider, hosts, (store.dir.path(), place, name), spin, handler)
            };
            members.push(Member::open(number, store.key, &store.fabric.local_addr(), open)?);
        }
        for (from, member) in members.iter().enumerate() {
            for (to, other) in members.iter().enumerate() {
                if to != from {
                    member.meet(u16::try_from(to)?, &other.addr())?;
                }
            }
        }
        Ok(Self { members, store })
    }

    /// A node's manager.
    pub fn manager(&self, node: usize) -> &Arc<LeaseManager> {
        self.members[node].manager()
    }

    /// What a node's endpoint has done.
    pub fn fabric_stats(&self, node: usize) -> FabricStats {
        self.members[node].fabric.stats()
    }
}

impl Drop for LeaseCluster {
    fn drop(&mut self) {
        self.members.clear();
        self.store.fabric.shutdown();
    }
}

impl Lock for LeaseCluster {
    fn with(&self, node: usize, inside: &mut dyn FnMut()) -> anyhow::Result<()> {
        let guard = self
            .manager(node)
            .enter(RecordId::new(0, 7), Mode::Exclusive, PATIENCE)?;
        inside();
        drop(guard);
        Ok(())
    }
}
