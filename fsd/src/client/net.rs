//! The mount's connections: to the metadata server, the storage nodes, and the other mounts.
//!
//! A connection that breaks is made again in the background; requests wait for that up to their time
//! limit and are then repeated (the servers carry repeated transactions out only once).

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use lockmgr::{LeaseError, NodeId, RecordId};
use parking_lot::{Mutex, RwLock};
use rdma_transport::{Connection, Fabric, RegionKey, RemoteAddr, TransportError};

use super::workers::Workers;
use crate::ino;
use crate::rpc::{Calls, Errno, RpcError};
use crate::wire::{
    self, Attached, FrameKind, Hello, JoinReply, LockSpec, MetaReply, MetaRequest, PeerState, Role,
    StorageReply, StorageRequest, Time,
};

/// Pause between attempts to reach a server again.
const RETRY: Duration = Duration::from_millis(50);

/// How much longer than for an answer a mount waits for those of a former life to come back or be given up.
const JOIN_GRACE: Duration = Duration::from_secs(15);

/// What the connections need to know of the mount.
pub trait Owner: Send + Sync {
    /// File locks held, to be told to a metadata server that has restarted.
    fn held_locks(&self) -> Vec<LockSpec>;
    /// The connection to a storage node broke.
    fn storage_lost(&self, shard: u16);
    /// There is a new connection to a storage node.
    fn storage_back(&self, shard: u16);
    /// A storage node came back without its leases: ours on it are worth nothing.
    fn leases_lost(&self, shard: u16);
    /// Another mount cannot be reached.
    fn peer_gone(&self, node: NodeId);
    /// Another mount can be reached (again).
    fn peer_back(&self, node: NodeId);
}

/// A connection to a storage node, with the keys of its regions.
pub struct StorageSession {
    /// The connection.
    pub conn: Arc<dyn Connection>,
    /// Pool and dirty counters.
    pub attached: Attached,
    segments: RwLock<HashMap<u32, RegionKey>>,
}

impl StorageSession {
    /// Address in the pool.
    #[must_use]
    pub fn pool(&self, offset: u64) -> RemoteAddr {
        RemoteAddr {
            key: RegionKey(self.attached.pool_key),
            offset,
        }
    }

    /// Address of the dirty counter of the slab that holds `offset`.
    #[must_use]
    pub fn dirty(&self, offset: u64) -> RemoteAddr {
        RemoteAddr {
            key: RegionKey(self.attached.dirty_key),
            offset: offset / crate::storage::BLOCK * 8,
        }
    }
}

struct StorageLink {
    id: u16,
    addr: String,
    session: RwLock<Option<Arc<StorageSession>>>,
    connecting: Mutex<()>,
}

#[derive(Default)]
struct Peer {
    conn: Option<Arc<dyn Connection>>,
    /// Messages that wait for a connection; while not empty, new ones queue behind.
    queue: VecDeque<Vec<u8>>,
    connecting: bool,
}

/// All connections of a mount.
pub struct Net {
    me: Weak<Self>,
    calls: Arc<Calls>,
    fabric: Arc<dyn Fabric>,
    cluster: String,
    meta_addr: String,
    timeout: Duration,
    life: u64,
    name: String,
    meta: RwLock<Option<Arc<dyn Connection>>>,
    meta_connecting: Mutex<()>,
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
    /// Random number of this process.
    pub life: u64,
    /// Host and mount point.
    pub name: String,
}

impl Net {
    /// Connections that are not made yet.
    #[must_use]
    pub fn new(config: NetConfig, calls: Arc<Calls>, fabric: Arc<dyn Fabric>, workers: Workers) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            calls,
            fabric,
            cluster: config.cluster,
            meta_addr: config.meta_addr,
            timeout: config.timeout,
            life: config.life,
            name: config.name,
            meta: RwLock::new(None),
            meta_connecting: Mutex::new(()),
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
    pub fn join(&self) -> Result<JoinReply, RpcError> {
        let conn = self.connect_meta(Instant::now() + self.timeout)?;
        let patience = Instant::now() + self.timeout + JOIN_GRACE;
        let reply = loop {
            match self.join_on(&conn, None) {
                Err(RpcError::Errno(Errno(libc::EAGAIN))) if Instant::now() < patience => {
                    std::thread::sleep(RETRY);
                }
                other => break other?,
            }
        };
        self.fabric.set_identity(self.hello(Some(reply.node)).encode());
        self.record_bytes
            .store(u64::from(reply.record_bytes), Ordering::Relaxed);
        let links = reply
            .storage
            .iter()
            .map(|s| StorageLink {
                id: s.id,
                addr: s.listen.clone(),
                session: RwLock::new(None),
                connecting: Mutex::new(()),
            })
            .collect();
        let _ = self.storage.set(links);
        let _ = self.joined.set(reply.clone());
        *self.meta.write() = Some(conn);
        let mut ids = Vec::with_capacity(reply.storage.len());
        for storage in &reply.storage {
            ids.push(self.storage(storage.id)?.attached.table);
        }
        self.meta(&MetaRequest::Tables { ids })?;
        Ok(reply)
    }

    fn hello(&self, node: Option<u16>) -> Hello {
        Hello {
            protocol: wire::PROTOCOL,
            cluster: self.cluster.clone(),
            role: Role::Client(node),
            life: self.life,
        }
    }

    /// Connects to the metadata server, trying until the deadline: it may just be starting again.
    fn connect_meta(&self, deadline: Instant) -> Result<Arc<dyn Connection>, RpcError> {
        loop {
            match self.fabric.connect(&self.meta_addr) {
                Ok(conn) => return Ok(conn),
                Err(error) => self.pause(deadline, error)?,
            }
        }
    }

    /// Waits a little before another attempt, if the error may pass and there is time.
    fn pause(&self, deadline: Instant, error: TransportError) -> Result<(), RpcError> {
        let passing = match &error {
            TransportError::Unreachable { .. }
            | TransportError::Disconnected { .. }
            | TransportError::Timeout { .. } => true,
            TransportError::Refused { reason, .. } => reason.contains("still starting"),
            _ => false,
        };
        if !passing || Instant::now() + RETRY > deadline || self.stopping.load(Ordering::Acquire) {
            return Err(error.into());
        }
        std::thread::sleep(RETRY);
        Ok(())
    }

    fn join_on(&self, conn: &Arc<dyn Connection>, again: Option<(u16, u8)>) -> Result<JoinReply, RpcError> {
        let locks = self.owner().map(|o| o.held_locks()).unwrap_or_default();
        let request = MetaRequest::Join {
            again,
            life: self.life,
            listen: self.fabric.local_addr(),
            name: self.name.clone(),
            now: Time::now(),
            locks,
        };
        match self.calls.call(conn, &request, self.timeout)? {
            MetaReply::Joined(reply) => Ok(reply),
            _ => Err(RpcError::Errno(Errno(libc::EPROTO))),
        }
    }

    fn meta_conn(&self, deadline: Instant) -> Result<Arc<dyn Connection>, RpcError> {
        if let Some(conn) = self.meta.read().as_ref().filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let _one = self.meta_connecting.lock();
        if let Some(conn) = self.meta.read().as_ref().filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let joined = self.joined.get().ok_or(RpcError::Errno(Errno(libc::ENOTCONN)))?;
        let conn = self.connect_meta(deadline)?;
        self.join_on(&conn, Some((joined.node, joined.incarnation)))?;
        tracing::info!("connected to the metadata server again");
        *self.meta.write() = Some(Arc::clone(&conn));
        Ok(conn)
    }

    /// Asks the metadata server; repeats the request on a new connection where the old one broke.
    ///
    /// # Errors
    /// Its refusal, or no answer within the time limit.
    pub fn meta(&self, request: &MetaRequest) -> Result<MetaReply, RpcError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let conn = self.meta_conn(deadline)?;
            match self.calls.call(&conn, request, self.timeout) {
                Err(RpcError::Transport(error)) => self.pause(deadline, error)?,
                other => return other,
            }
        }
    }

    /// Sends a request to the metadata server; `done` gets the answer on some thread. A connection that
    /// breaks meanwhile makes it a background request.
    pub fn meta_async(
        &self,
        request: MetaRequest,
        done: impl FnOnce(Result<MetaReply, RpcError>) + Send + 'static,
    ) {
        let conn = self.meta.read().as_ref().filter(|c| c.is_alive()).cloned();
        let (me, workers) = (Weak::clone(&self.me), self.workers.clone());
        let later = move |request: MetaRequest, done: Box<dyn FnOnce(Result<MetaReply, RpcError>) + Send>| {
            workers.run(move || {
                if let Some(net) = me.upgrade() {
                    done(net.meta(&request));
                }
            });
        };
        let done: Box<dyn FnOnce(Result<MetaReply, RpcError>) + Send> = Box::new(done);
        match conn {
            None => later(request, done),
            Some(conn) => {
                let again = request.clone();
                self.calls
                    .call_async(&conn, &request, move |result| match result {
                        Err(RpcError::Transport(_)) => later(again, done),
                        other => done(other),
                    });
            }
        }
    }

    /// A request whose answer may take for ever (waiting for a file lock).
    ///
    /// # Errors
    /// The connection failed at once.
    pub fn meta_slow(
        &self,
        request: &MetaRequest,
        done: impl FnOnce(Result<MetaReply, RpcError>) + Send + 'static,
    ) -> Result<(), RpcError> {
        let conn = self.meta_conn(Instant::now() + self.timeout)?;
        self.calls.call_async(&conn, request, done);
        Ok(())
    }

    fn link(&self, id: u16) -> Result<&StorageLink, RpcError> {
        self.storage
            .get()
            .and_then(|links| links.iter().find(|l| l.id == id))
            .ok_or(RpcError::Errno(Errno(libc::ENOTCONN)))
    }

    /// Number of storage nodes.
    #[must_use]
    pub fn storage_count(&self) -> u16 {
        self.storage.get().map_or(1, |links| links.len() as u16)
    }

    /// The session with a storage node, if it is up.
    #[must_use]
    pub fn storage_now(&self, id: u16) -> Option<Arc<StorageSession>> {
        let link = self.link(id).ok()?;
        link.session
            .read()
            .as_ref()
            .filter(|s| s.conn.is_alive())
            .cloned()
    }

    /// The session with a storage node; connects if need be.
    ///
    /// # Errors
    /// It cannot be reached within the time limit.
    pub fn storage(&self, id: u16) -> Result<Arc<StorageSession>, RpcError> {
        if let Some(session) = self.storage_now(id) {
            return Ok(session);
        }
        let link = self.link(id)?;
        let _one = link.connecting.lock();
        if let Some(session) = self.storage_now(id) {
            return Ok(session);
        }
        let deadline = Instant::now() + self.timeout;
        let again = link.session.read().is_some();
        loop {
            match self.attach(link) {
                Ok(session) => {
                    let session = Arc::new(session);
                    let before = link.session.write().replace(Arc::clone(&session));
                    if let (Some(before), Some(owner)) = (before, self.owner())
                        && before.attached.table != session.attached.table
                    {
                        owner.leases_lost(id);
                        return Err(RpcError::Errno(Errno(libc::EIO)));
                    }
                    if again && let Some(owner) = self.owner() {
                        tracing::info!("connected to storage node {id} again");
                        owner.storage_back(id);
                    }
                    return Ok(session);
                }
                Err(RpcError::Transport(error)) => self.pause(deadline, error)?,
                Err(error) => return Err(error),
            }
        }
    }

    fn attach(&self, link: &StorageLink) -> Result<StorageSession, RpcError> {
        let conn = self.fabric.connect(&link.addr)?;
        let StorageReply::Attached(attached) =
            self.calls.call(&conn, &StorageRequest::Attach, self.timeout)?
        else {
            return Err(RpcError::Errno(Errno(libc::EPROTO)));
        };
        // The lease segments in use before must be known at once: messages about their records do not wait.
        let known: Vec<u32> = link
            .session
            .read()
            .as_ref()
            .map(|s| s.segments.read().keys().copied().collect())
            .unwrap_or_default();
        let session = StorageSession {
            conn,
            attached,
            segments: RwLock::default(),
        };
        for segment in known {
            self.load_segment(&session, segment)?;
        }
        Ok(session)
    }

    fn load_segment(&self, session: &StorageSession, segment: u32) -> Result<(), RpcError> {
        match self.calls.call(
            &session.conn,
            &StorageRequest::LeaseSegment { segment },
            self.timeout,
        )? {
            StorageReply::Segment(key) => {
                session.segments.write().insert(segment, RegionKey(key));
                Ok(())
            }
            _ => Err(RpcError::Errno(Errno(libc::EPROTO))),
        }
    }

    /// Asks a storage node; repeats the request on a new connection where the old one broke.
    ///
    /// # Errors
    /// Its refusal, or no answer within the time limit.
    pub fn ask_storage(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let session = self.storage(id)?;
            match self.calls.call(&session.conn, request, self.timeout) {
                Err(RpcError::Transport(error)) => self.pause(deadline, error)?,
                other => return other,
            }
        }
    }

    fn place(&self, session: &StorageSession, record: RecordId) -> Option<RemoteAddr> {
        let index = ino::record_index(record);
        let per = u64::from(session.attached.segment_records);
        let key = *session.segments.read().get(&((index / per) as u32))?;
        Some(RemoteAddr {
            key,
            offset: index % per * self.record_bytes.load(Ordering::Relaxed),
        })
    }

    /// Is the place of a lease record known?
    #[must_use]
    pub fn knows_record(&self, record: RecordId) -> bool {
        self.storage_now(ino::record_shard(record))
            .is_some_and(|s| self.place(&s, record).is_some())
    }

    /// Finds out where a lease record is.
    ///
    /// # Errors
    /// Its storage node cannot be reached or refuses.
    pub fn find_record(&self, record: RecordId) -> Result<(), RpcError> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let session = self.storage(ino::record_shard(record))?;
            if self.place(&session, record).is_some() {
                return Ok(());
            }
            let segment = (ino::record_index(record) / u64::from(session.attached.segment_records)) as u32;
            match self.load_segment(&session, segment) {
                Err(RpcError::Transport(error)) => self.pause(deadline, error)?,
                Err(error) => return Err(error),
                Ok(()) => {}
            }
        }
    }

    /// Connection and address of a lease record that has been found before.
    ///
    /// # Errors
    /// [`LeaseError::StorageLost`] while its storage node is away.
    pub fn record(&self, record: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        let shard = ino::record_shard(record);
        let lost = || LeaseError::StorageLost {
            shard: u32::from(shard),
            why: "not connected".into(),
        };
        if self.link(shard).is_err() {
            return Err(LeaseError::NoSuchRecord { record });
        }
        let session = self.storage_now(shard).ok_or_else(lost)?;
        let addr = self.place(&session, record).ok_or_else(lost)?;
        Ok((Arc::clone(&session.conn), addr))
    }

    /// Sends a lease message to another mount; messages to one mount keep their order.
    pub fn send_lease(&self, to: NodeId, message: &[u8]) {
        let frame = wire::plain(FrameKind::Lease, message);
        let mut peers = self.peers.lock();
        let peer = peers.entry(to).or_default();
        if peer.queue.is_empty()
            && let Some(conn) = peer.conn.as_ref().filter(|c| c.is_alive())
            && conn.send(&frame).is_ok()
        {
            return;
        }
        peer.queue.push_back(frame);
        if !peer.connecting {
            peer.connecting = true;
            let me = Weak::clone(&self.me);
            self.workers.run(move || {
                if let Some(net) = me.upgrade() {
                    net.reach(to);
                }
            });
        }
    }

    /// Connects to another mount and sends what waits for it; gives up when it is known to be dead.
    fn reach(&self, to: NodeId) {
        loop {
            let reached = self.connect_peer(to);
            let mut peers = self.peers.lock();
            let peer = peers.entry(to).or_default();
            match reached {
                Ok(conn) => {
                    while let Some(frame) = peer.queue.front() {
                        if conn.send(frame).is_err() {
                            break;
                        }
                        peer.queue.pop_front();
                    }
                    if peer.queue.is_empty() {
                        peer.conn = Some(conn);
                        peer.connecting = false;
                        drop(peers);
                        if let Some(owner) = self.owner() {
                            owner.peer_back(to);
                        }
                        return;
                    }
                }
                Err((error, final_)) => {
                    drop(peers);
                    if let Some(owner) = self.owner() {
                        owner.peer_gone(to);
                    }
                    if final_ || self.stopping.load(Ordering::Acquire) {
                        tracing::warn!("mount {} cannot be reached: {error}", to.0);
                        if let Some(peer) = self.peers.lock().get_mut(&to) {
                            peer.queue.clear();
                            peer.connecting = false;
                        }
                        return;
                    }
                }
            }
            std::thread::sleep(RETRY);
        }
    }

    fn connect_peer(&self, to: NodeId) -> Result<Arc<dyn Connection>, (RpcError, bool)> {
        match self.meta(&MetaRequest::Peer { node: to.0 }) {
            Ok(MetaReply::Peer {
                state: PeerState::Dead,
                ..
            }) => Err((RpcError::Errno(Errno(libc::EHOSTDOWN)), true)),
            Ok(MetaReply::Peer { listen, .. }) => self
                .fabric
                .connect(&listen)
                .map_err(|error| (error.into(), false)),
            Ok(_) => Err((RpcError::Errno(Errno(libc::EPROTO)), true)),
            Err(error @ RpcError::Errno(_)) => Err((error, true)),
            Err(error) => Err((error, false)),
        }
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
                        || net.meta_conn(Instant::now() + net.timeout).is_ok()
                    {
                        return;
                    }
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

    /// No more attempts to reach anybody again.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }
}
