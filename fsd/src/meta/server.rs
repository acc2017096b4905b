//! The metadata server's daemon: start, housekeeping, stop.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use parking_lot::Mutex;
use rdma_transport::{Connection, Fabric};

use super::copies::{self, Copies};
use super::locks::{LockTable, Ticket};
use super::names::{Change, Effects};
use super::order::Order;
use super::records::{LAYOUT, Member, Superblock, Txn, decode, encode, key, new_root};
use super::sessions::{Session, Sessions};
use super::window::Window;
use super::{MetaError, Refusal};
use crate::config::Config;
use crate::endpoint::Endpoint;
use crate::ino;
use crate::memory::{Claim, Note};
use crate::rpc::{Calls, Responder, RpcError, Service};
use crate::store::{FjallStore, Store, prefix_end};
use crate::wire::{Hello, MetaReply, Role, StorageReply, StorageRequest, Time};

/// How often membership and freed inodes are looked after while there is something to do.
const TICK: Duration = Duration::from_secs(1);

/// Transactions that nobody asks to be durable are so after this long, as with local file systems.
const SYNC_AFTER: Duration = Duration::from_secs(5);

/// What changes while the server runs, besides the store.
pub(super) struct State {
    pub(super) sessions: Sessions,
    pub(super) locks: LockTable,
    pub(super) lock_waiters: HashMap<Ticket, Responder>,
    pub(super) next_ticket: Ticket,
    pub(super) answers: HashMap<u16, BTreeMap<u64, Vec<u8>>>,
    pub(super) next_index: Vec<u64>,
    pub(super) next_shard: u16,
    pub(super) inodes: u64,
    pub(super) orphans: u64,
    pub(super) early_reaps: Vec<u64>,
    pub(super) tables: Vec<u64>,
    /// Open while the mounts of the last life tell what may be missing.
    pub(super) window: Option<Window>,
}

/// An answer that is given when everything so far is durable.
pub(super) type OnceDurable = (Responder, MetaReply);

/// What the thread for housekeeping is told.
pub(super) enum House {
    /// An inode is gone, and its blocks are to be freed.
    Freed(u64),
    /// Somebody waits for what has been told so far.
    Settle(Responder),
}

/// The server behind its fabric endpoint.
pub(super) struct Inner {
    pub(super) config: Config,
    pub(super) superblock: Superblock,
    era: AtomicU32,
    pub(super) store: Arc<dyn Store>,
    pub(super) state: Mutex<State>,
    pub(super) requests: AtomicU64,
    pub(super) sync: Sender<OnceDurable>,
    pub(super) order: Order,
    /// One request after the other, whichever thread brings it.
    pub(super) serial: Mutex<()>,
    pub(super) freed: Sender<House>,
    /// Inodes told to be freed, and not freed yet.
    pub(super) freeing: AtomicU64,
    pub(super) calls: Arc<Calls>,
    pub(super) copies: Copies,
    fabric: OnceLock<Arc<dyn Fabric>>,
    storage: Mutex<HashMap<u16, Arc<dyn Connection>>>,
    stopping: AtomicBool,
}

/// A running metadata server.
pub struct MetaServer {
    inner: Arc<Inner>,
    fabric: Arc<dyn Fabric>,
    threads: Vec<JoinHandle<()>>,
    /// One for each thread that sleeps.
    stop: [Sender<()>; 3],
    claim: Claim,
}

fn load<T>(result: Result<T, Refusal>) -> Result<T, MetaError> {
    result.map_err(|refusal| match refusal {
        Refusal::Store(error) => MetaError::Store(error),
        Refusal::Errno(e) => MetaError::Io {
            what: "the metadata store is damaged".into(),
            error: std::io::Error::from_raw_os_error(e.0),
        },
    })
}

fn formatted_already(dir: &Path) -> MetaError {
    MetaError::Format {
        path: dir.to_owned(),
        detail: "is formatted already: remove it first if its contents are not wanted".into(),
    }
}

/// Is there no store in a directory yet?
///
/// # Errors
/// There is one, or it cannot be opened.
pub fn check_unformatted(dir: &Path) -> Result<(), MetaError> {
    // An empty directory is not made a store of by looking at it.
    if std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none()) {
        return Ok(());
    }
    match FjallStore::open(dir)?.get(&key::superblock())? {
        Some(_) => Err(formatted_already(dir)),
        None => Ok(()),
    }
}

/// Makes a metadata store with an empty root directory.
///
/// # Errors
/// It is formatted already, or the disk refuses.
pub fn format(config: &Config, uuid: &str) -> Result<(), MetaError> {
    let dir = &config.meta.dir;
    // Its owner's alone, whatever the umask.
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::create_dir_all(dir)
        .and_then(|()| std::fs::set_permissions(dir, private))
        .map_err(|error| MetaError::Io {
            what: format!("cannot make {}", dir.display()),
            error,
        })?;
    let store = FjallStore::open(dir)?;
    if store.get(&key::superblock())?.is_some() {
        return Err(formatted_already(dir));
    }
    let superblock = Superblock {
        layout: LAYOUT,
        cluster: config.cluster.clone(),
        uuid: uuid.to_owned(),
        record_bytes: config.lease.record_bytes,
        shards: config.storage.len() as u16,
        era: 0,
        tables: Vec::new(),
    };
    let mut txn = Txn::new(&store);
    txn.put(key::superblock(), encode(&superblock));
    txn.set_inode(&new_root(
        Time::now(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
    ));
    txn.commit()?;
    Ok(store.sync()?)
}

fn read_superblock(store: &dyn Store, config: &Config, dir: &Path) -> Result<Superblock, MetaError> {
    let format = |detail: String| MetaError::Format {
        path: dir.to_owned(),
        detail,
    };
    let bytes = store
        .get(&key::superblock())?
        .ok_or_else(|| format("is not a formatted metadata directory: run fsd format first".into()))?;
    let superblock: Superblock = load(decode(&bytes))?;
    if superblock.layout != LAYOUT {
        return Err(format(format!(
            "has layout version {}, this build reads {LAYOUT}: use the release that made it",
            superblock.layout
        )));
    }
    if superblock.cluster != config.cluster {
        return Err(format(format!(
            "belongs to cluster '{}', not '{}'",
            superblock.cluster, config.cluster
        )));
    }
    if usize::from(superblock.shards) != config.storage.len() {
        return Err(format(format!(
            "was formatted for {} storage nodes, the configuration has {}",
            superblock.shards,
            config.storage.len()
        )));
    }
    if superblock.record_bytes != config.lease.record_bytes {
        return Err(format(format!(
            "was formatted with lease.record_bytes = {}, the configuration says {}",
            superblock.record_bytes, config.lease.record_bytes
        )));
    }
    Ok(superblock)
}

fn count(store: &dyn Store, tag: u8) -> Result<u64, MetaError> {
    let (mut from, mut n) = (vec![tag], 0);
    loop {
        let pairs = store.scan(&from, &[tag + 1], 4096)?;
        let Some((last, _)) = pairs.last() else {
            return Ok(n);
        };
        from.clone_from(last);
        from.push(0);
        n += pairs.len() as u64;
    }
}

fn load_state(store: &dyn Store, superblock: &Superblock) -> Result<State, MetaError> {
    let mut sessions = Sessions::default();
    for (k, v) in store.scan(b"C", b"D", usize::MAX)? {
        let node = key::number(&k) as u16;
        let member: Member = load(decode(&v))?;
        if member.life == 0 {
            sessions.incarnations.insert(node, member.incarnation);
        } else {
            // It may still run and come back; until then it counts as lost.
            let lost = Some(Instant::now());
            sessions.nodes.insert(
                node,
                Session {
                    member,
                    conn: None,
                    lost,
                    gone: false,
                    dead: false,
                },
            );
        }
    }
    let mut answers: HashMap<u16, BTreeMap<u64, Vec<u8>>> = HashMap::new();
    for (k, v) in store.scan(b"L", b"M", usize::MAX)? {
        answers
            .entry(key::number(&k) as u16)
            .or_default()
            .insert(key::second(&k), v);
    }
    let mut next_index = Vec::new();
    for shard in 0..superblock.shards {
        let stored = store.get(&key::next_index(shard))?;
        let first = if shard == 0 { ino::ROOT + 1 } else { 1 };
        next_index.push(
            stored
                .map(|v| load(decode::<u64>(&v)))
                .transpose()?
                .unwrap_or(first),
        );
    }
    Ok(State {
        sessions,
        locks: LockTable::default(),
        lock_waiters: HashMap::new(),
        next_ticket: 0,
        answers,
        next_index,
        next_shard: 0,
        inodes: count(store, b'I')?,
        orphans: count(store, b'O')?,
        early_reaps: Vec::new(),
        tables: superblock.tables.clone(),
        window: None,
    })
}

/// The service before the server is complete (the fabric must exist first).
struct Front(OnceLock<Arc<Inner>>);

impl Service for Front {
    fn admit(&self, _hello: &Hello) -> Result<(), String> {
        self.0
            .get()
            .map(|_| ())
            .ok_or_else(|| crate::rpc::not_yet("the metadata server is still starting"))
    }
    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        if let Some(inner) = self.0.get() {
            inner.request(hello, body, responder);
        }
    }
    fn disconnected(&self, conn: &Arc<dyn Connection>, hello: Option<&Hello>) {
        if let Some(inner) = self.0.get() {
            inner.disconnected(conn, hello);
        }
    }
}

impl MetaServer {
    /// Starts the metadata server of a configuration. With `accept_older`, stores that are older copies are taken as they are.
    ///
    /// # Errors
    /// Not formatted, store in use, address taken…
    pub fn start(config: &Config, cluster_key: Vec<u8>, accept_older: bool) -> Result<Self, MetaError> {
        let dir = &config.meta.dir;
        if !dir.exists() {
            let detail = "does not exist: run fsd format first".into();
            return Err(MetaError::Format {
                path: dir.clone(),
                detail,
            });
        }
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(dir)?);
        let superblock = read_superblock(store.as_ref(), config, dir)?;
        let mut state = load_state(store.as_ref(), &superblock)?;
        let note = Note {
            cluster: superblock.cluster.clone(),
            storage: None,
            store: dir.clone(),
            uuid: superblock.uuid.clone(),
        };
        let memory_dir = &config.meta.memory_dir;
        let claim = Claim::take(memory_dir, &note).map_err(|error| MetaError::Io {
            what: format!(
                "cannot keep memory in {} (meta.memory_dir names a memory file system)",
                memory_dir.display()
            ),
            error,
        })?;
        let (order, lost) = Order::open(Arc::clone(&store), &config.meta.memory_dir, &superblock.uuid)?;
        if lost {
            state.window = Window::open(state.sessions.nodes.keys().copied());
        }
        if state.window.is_some() {
            tracing::warn!(
                "the last life of this server did not end in order, and its host has forgotten it: the mounts are asked for what may be missing"
            );
        }
        let copies = Copies::new(
            accept_older,
            config.storage.iter().map(|s| s.id),
            load(copies::stored(store.as_ref()))?,
        );
        let front = Arc::new(Front(OnceLock::new()));
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let listen = config.meta.listen.clone();
        let Endpoint { fabric, calls, .. } =
            Endpoint::open(config, Role::Meta, listen, cluster_key, service)?;
        let (sync, sync_in) = unbounded();
        let (freed, freed_in) = unbounded();
        let (stop, stop_in) = unbounded();
        let (stop_comparing, compare_in) = unbounded();
        let (stop_looking, look_in) = unbounded();
        let inner = Arc::new(Inner {
            config: config.clone(),
            era: AtomicU32::new(superblock.era),
            superblock,
            store,
            state: Mutex::new(state),
            requests: AtomicU64::new(0),
            sync,
            order,
            serial: Mutex::default(),
            freed,
            freeing: AtomicU64::new(0),
            calls,
            copies,
            fabric: OnceLock::new(),
            storage: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        // Nobody else sets it.
        let _ = inner.fabric.set(Arc::clone(&fabric));
        for (k, _) in inner.store.scan(b"F", b"G", usize::MAX)? {
            inner.free_later(key::number(&k));
        }
        let _ = front.0.set(Arc::clone(&inner));
        let thread = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.into())
                .spawn(body)
                .map_err(|error| MetaError::Io {
                    what: format!("cannot start thread {name}"),
                    error,
                })
        };
        let (a, b) = (Arc::clone(&inner), Arc::clone(&inner));
        let (c, d) = (Arc::clone(&inner), Arc::clone(&inner));
        let threads = vec![
            thread("meta-sync", Box::new(move || a.sync_loop(&sync_in)))?,
            thread("meta-house", Box::new(move || b.house_loop(&freed_in, &stop_in)))?,
            thread("meta-copies", Box::new(move || c.copies_loop(&compare_in)))?,
            thread("meta-members", Box::new(move || d.members_loop(&look_in)))?,
        ];
        Ok(Self {
            inner,
            fabric,
            threads,
            stop: [stop, stop_comparing, stop_looking],
            claim,
        })
    }

    /// The address it listens on.
    #[must_use]
    pub fn addr(&self) -> String {
        self.fabric.local_addr()
    }

    /// Why it must not go on, if others know of a later state of its store.
    #[must_use]
    pub fn is_older(&self) -> Option<String> {
        self.inner.is_older()
    }

    /// Makes everything durable and stops.
    ///
    /// # Errors
    /// The store failed.
    pub fn stop(mut self) -> Result<(), MetaError> {
        self.inner.stopping.store(true, Ordering::Release);
        for stop in &self.stop {
            let _ = stop.send(());
        }
        self.fabric.shutdown();
        self.inner.storage.lock().clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.inner.order.stop()?;
        // The witness is gone.
        self.claim.remove();
        Ok(())
    }
}

impl Inner {
    /// Group commit: one sync answers everybody who asked before it began. And one every now and then while anything
    /// happens, so that what the mounts have to keep is bounded.
    fn sync_loop(&self, requests: &Receiver<OnceDurable>) {
        let mut pending: Option<Instant> = None;
        while !self.stopping.load(Ordering::Acquire) {
            let first = match requests.recv_timeout(TICK) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => {
                    if self.order.executed() == self.order.durable() {
                        pending = None;
                    } else if pending.get_or_insert_with(Instant::now).elapsed() >= SYNC_AFTER {
                        pending = None;
                        if let Err(error) = self.order.sync() {
                            tracing::error!("{error}");
                        }
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let waiting: Vec<OnceDurable> = std::iter::once(first).chain(requests.try_iter()).collect();
            let result = self.order.sync().map_err(|e| Refusal::Store(e).errno());
            for (responder, reply) in waiting {
                responder.reply(&result.map(|()| self.ordered(0, reply)));
            }
        }
    }

    /// An answer with its place in the order of all.
    pub(super) fn ordered(&self, order: u64, reply: MetaReply) -> MetaReply {
        MetaReply::Ordered {
            order,
            durable: self.order.durable(),
            reply: Box::new(reply),
        }
    }

    fn house_loop(&self, told: &Receiver<House>, stop: &Receiver<()>) {
        let mut backlog: Vec<u64> = Vec::new();
        let mut freed_at = Instant::now();
        loop {
            let mut news: Vec<House> = Vec::new();
            crossbeam::channel::select! {
                recv(stop) -> _ => return,
                recv(told) -> first => news.extend(first),
                default(TICK) => {}
            }
            news.extend(told.try_iter());
            let mut waiting = Vec::new();
            for one in news {
                match one {
                    House::Freed(ino) => backlog.push(ino),
                    House::Settle(responder) => waiting.push(responder),
                }
            }
            // A crash that undid the removal would bring back the names of files whose blocks are gone.
            // Not for each of many that are removed one after the other: a sync keeps everybody waiting for a while.
            let due = !waiting.is_empty() || freed_at.elapsed() >= TICK;
            if !backlog.is_empty() && due {
                freed_at = Instant::now();
                match self.order.sync() {
                    Ok(()) => backlog.retain(|&ino| !self.free_blocks(ino)),
                    Err(error) => tracing::error!("{error}"),
                }
            }
            let orphans = self.state.lock().orphans;
            for responder in waiting {
                responder.reply(&Ok(MetaReply::Settled { orphans }));
            }
            let dead = self.state.lock().sessions.bury(Instant::now());
            for node in dead {
                tracing::warn!(
                    "mount {node} is dead: it did not come back; files it had leased stay blocked until it is recovered"
                );
                let served = self.state.lock().locks.release_node(node);
                self.answer_locks(&served, &Ok(MetaReply::Done));
                if let Some(window) = &mut self.state.lock().window {
                    window.give_up(node);
                }
            }
            self.end_window();
            if self.state.lock().sessions.only_dead()
                && let Err(error) = self.recover_all()
            {
                tracing::error!("recovery is not complete: {error}");
            }
        }
    }

    /// A connection to a storage node, made if need be.
    fn storage(&self, id: u16) -> Result<Arc<dyn Connection>, RpcError> {
        if let Some(conn) = self.storage.lock().get(&id).filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let gone = || rdma_transport::TransportError::Shutdown;
        let section = self.config.storage.iter().find(|s| s.id == id).ok_or_else(gone)?;
        let conn = self.fabric.get().ok_or_else(gone)?.connect(&section.listen)?;
        self.check_store(id, &section.listen, &conn)?;
        self.storage.lock().insert(id, Arc::clone(&conn));
        Ok(conn)
    }

    pub(super) fn ask_storage(&self, id: u16, request: &StorageRequest) -> Result<StorageReply, RpcError> {
        let conn = self.storage(id)?;
        self.calls
            .call(&conn, request, Duration::from_millis(self.config.timeout_ms))
    }

    fn free_later(&self, ino: u64) {
        self.freeing.fetch_add(1, Ordering::Relaxed);
        let _ = self.freed.send(House::Freed(ino));
    }

    /// Frees an inode's blocks everywhere, then lets its record be used again. False: try again later.
    fn free_blocks(&self, ino: u64) -> bool {
        for section in &self.config.storage {
            let request = StorageRequest::Free {
                ino,
                first: 0,
                last: u64::MAX,
            };
            if let Err(error) = self.ask_storage(section.id, &request) {
                if !self.stopping.load(Ordering::Acquire) {
                    tracing::debug!("blocks of {ino:#x} not freed yet: {error}");
                }
                return false;
            }
        }
        let mut txn = Txn::new(self.store.as_ref());
        txn.delete(key::freed(ino));
        txn.recycle(ino);
        match txn.commit() {
            Ok(()) => {
                self.freeing.fetch_sub(1, Ordering::Relaxed);
                true
            }
            Err(error) => {
                tracing::error!("{error}");
                false
            }
        }
    }

    /// Nobody alive holds anything: clear all leases, reap all orphans, forget the dead.
    fn recover_all(&self) -> Result<(), MetaError> {
        for section in &self.config.storage {
            self.ask_storage(section.id, &StorageRequest::ResetLeases)
                .map_err(|error| MetaError::Io {
                    what: format!("resetting the leases of storage node {}", section.id),
                    error: std::io::Error::other(error.to_string()),
                })?;
        }
        let mut state = self.state.lock();
        if !state.sessions.only_dead() {
            return Ok(());
        }
        for (k, _) in self.store.scan(b"O", &prefix_end(b"O"), usize::MAX)? {
            let change = Change::new(Txn::new(self.store.as_ref()), 0, Time::now(), self.era(), &[]);
            if let Some((txn, effects)) = load(change.reap(key::number(&k)))? {
                txn.commit()?;
                self.settle(&mut state, &effects);
            }
        }
        let nodes: Vec<u16> = state.sessions.nodes.keys().copied().collect();
        for node in nodes {
            load(self.forget(&mut state, node, false))?;
        }
        tracing::info!("every mount was dead: all leases have been reset");
        Ok(())
    }

    /// Era of lease versions.
    pub(super) fn era(&self) -> u32 {
        self.era.load(Ordering::Acquire)
    }

    /// A mount tells which lease tables it has found. New ones begin with version zero: a new era, or the
    /// attributes pushed under the new versions would be taken for old.
    pub(super) fn check_tables(&self, tables: &[u64]) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        if state.tables == tables {
            return Ok(());
        }
        let era = self.era() + 1;
        let superblock = Superblock {
            era,
            tables: tables.to_vec(),
            ..self.superblock.clone()
        };
        let mut txn = Txn::new(self.store.as_ref());
        txn.put(key::superblock(), encode(&superblock));
        txn.commit()?;
        self.store.sync()?;
        tracing::info!("lease tables are new: era {era}");
        state.tables = tables.to_vec();
        self.era.store(era, Ordering::Release);
        Ok(())
    }

    /// Books the effects of an applied transaction.
    pub(super) fn settle(&self, state: &mut State, effects: &Effects) {
        state.inodes = state.inodes.saturating_add_signed(effects.inodes);
        state.orphans = state.orphans.saturating_add_signed(effects.orphans);
        for &ino in &effects.freed {
            self.free_later(ino);
        }
    }
}
