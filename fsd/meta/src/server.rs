//! The metadata server's daemon: start and stop. What it does by itself is in `house`, its requests in `service`.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use rdma_transport::{Connection, Fabric};
use rt::channel::{Receiver, Sender, unbounded};
use rt::sync::Mutex;
use rt::thread::JoinHandle;

pub use super::opening::{check_unformatted, format, make};

use super::MetaError;
use super::copies::{self, Copies};
use super::nodes::{FabricNodes, StorageNodes};
use super::opening::{load, load_state, read_superblock};
use super::order::Order;
use super::records::{Superblock, key};
use super::sessions::Sessions;
use super::window::Window;
use fsd_node::config::Config;
use fsd_node::endpoint::{Endpoint, Network};
use fsd_node::memory::{Claim, Note};
use fsd_node::store::{FjallStore, Store, is_begun};
use fsd_proto::locks::{LockTable, Ticket};
use fsd_proto::rpc::{Responder, Service};
use fsd_proto::wire::{Hello, MetaReply, Role};

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
    pub(super) era: AtomicU32,
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
    pub(super) nodes: Arc<dyn StorageNodes>,
    pub(super) copies: Arc<Copies>,
    pub(super) stopping: AtomicBool,
    #[cfg(any(test, feature = "flaws"))]
    pub(super) flaw: Option<Flaw>,
}

/// A rule left out, so that tests can show what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// Inode numbers are given out before that is durable.
    NumbersEarly,
    /// Blocks of a removed file are freed before the removal is durable.
    FreedEarly,
    /// That blocks are freed is forgotten before it is durable on the storage nodes.
    FreedForgotten,
    /// What mounts tell a server that has lost its end is carried out as it comes.
    ReplayedAnyhow,
    /// A mount leaves before what it has done is durable.
    LeftEarly,
    /// A server that dies in its recovery window forgets that it had one.
    WindowForgotten,
    /// After the window, places are given again that mounts know as those of what could not be carried out.
    PlacesAgain,
    /// What dead mounts left beyond the ends of files stays.
    EndsNotCut,
}

/// What the server's threads are told.
pub(super) struct Told {
    pub(super) sync: Receiver<OnceDurable>,
    pub(super) house: Receiver<House>,
}

/// What a metadata server stands on.
pub struct Base<'a> {
    /// Where everything is kept.
    pub store: Arc<dyn Store>,
    /// Where its endpoint is made.
    pub network: &'a dyn Network,
    /// A rule to leave out; tests only.
    #[cfg(any(test, feature = "flaws"))]
    pub flaw: Option<Flaw>,
}

impl<'a> Base<'a> {
    /// This store, and this network.
    pub fn new(store: Arc<dyn Store>, network: &'a dyn Network) -> Self {
        Self {
            store,
            network,
            #[cfg(any(test, feature = "flaws"))]
            flaw: None,
        }
    }

    #[cfg(any(test, feature = "flaws"))]
    fn flawed(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    #[cfg(not(any(test, feature = "flaws")))]
    #[allow(clippy::unused_self)]
    const fn flawed(&self, _flaw: Flaw) -> bool {
        false
    }
}

#[cfg(any(test, feature = "flaws"))]
fn flawed(mut inner: Arc<Inner>, flaw: Option<Flaw>) -> Arc<Inner> {
    if let Some(inner) = Arc::get_mut(&mut inner) {
        inner.flaw = flaw;
    }
    inner
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

/// The service before the server is complete (the fabric must exist first).
struct Front(OnceLock<Arc<Inner>>);

impl Service for Front {
    fn admit(&self, _hello: &Hello) -> Result<(), String> {
        self.0
            .get()
            .map(|_| ())
            .ok_or_else(|| fsd_proto::rpc::not_yet("the metadata server is still starting"))
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
        if !is_begun(dir) {
            let detail = "is not a formatted metadata directory: run fsd format first".into();
            return Err(MetaError::Format {
                path: dir.clone(),
                detail,
            });
        }
        let store: Arc<dyn Store> = Arc::new(FjallStore::open_existing(dir)?);
        Self::start_on(Base::new(store, config), config, cluster_key, accept_older)
    }

    /// As [`MetaServer::start`], on a store and in a network of the caller's choice.
    ///
    /// # Errors
    /// As [`MetaServer::start`].
    pub fn start_on(
        base: Base<'_>,
        config: &Config,
        cluster_key: Vec<u8>,
        accept_older: bool,
    ) -> Result<Self, MetaError> {
        let (dir, store) = (&config.meta.dir, base.store.clone());
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
        if state.window.is_none() || base.flawed(Flaw::WindowForgotten) {
            // There is nobody to ask.
            order.settle(0)?;
        } else {
            tracing::warn!(
                "the last life of this server did not end in order, and its host has forgotten it: the mounts are asked for what may be missing"
            );
        }
        let copies = Arc::new(Copies::new(
            accept_older,
            config.storage.iter().map(|s| s.id),
            load(copies::stored(store.as_ref()))?,
        ));
        let front = Arc::new(Front(OnceLock::new()));
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let listen = config.meta.listen.clone();
        let Endpoint { fabric, calls, .. } =
            Endpoint::open_in(base.network, config, Role::Meta, listen, cluster_key, service)?;
        let nodes = Arc::new(FabricNodes::new(config, &store, &fabric, calls, &copies));
        let (inner, told) = Inner::new(config, superblock, store, state, order, (nodes, copies))?;
        #[cfg(any(test, feature = "flaws"))]
        let inner = flawed(inner, base.flaw);
        let (stop, stop_in) = unbounded();
        let (stop_comparing, compare_in) = unbounded();
        let (stop_looking, look_in) = unbounded();
        let _ = front.0.set(Arc::clone(&inner));
        let thread = |name: &str, body: Box<dyn FnOnce() + Send>| {
            rt::thread::Builder::new()
                .name(name.into())
                .spawn(body)
                .map_err(|error| MetaError::Io {
                    what: format!("cannot start thread {name}"),
                    error,
                })
        };
        let (a, b) = (Arc::clone(&inner), Arc::clone(&inner));
        let (c, d) = (Arc::clone(&inner), Arc::clone(&inner));
        let looks = Arc::clone(&fabric);
        let threads = vec![
            thread("meta-sync", Box::new(move || a.sync_loop(&told.sync)))?,
            thread(
                "meta-house",
                Box::new(move || b.house_loop(&told.house, &stop_in)),
            )?,
            thread("meta-copies", Box::new(move || c.copies_loop(&compare_in)))?,
            thread(
                "meta-members",
                Box::new(move || d.members_loop(&look_in, looks.as_ref())),
            )?,
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
        self.inner.nodes.close();
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
    /// A server of a store that has been read; what its threads are told.
    ///
    /// # Errors
    /// The store failed.
    pub(super) fn new(
        config: &Config,
        superblock: Superblock,
        store: Arc<dyn Store>,
        state: State,
        order: Order,
        (nodes, copies): (Arc<dyn StorageNodes>, Arc<Copies>),
    ) -> Result<(Arc<Self>, Told), MetaError> {
        let (sync, sync_in) = unbounded();
        let (freed, freed_in) = unbounded();
        let inner = Arc::new(Self {
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
            nodes,
            copies,
            stopping: AtomicBool::new(false),
            #[cfg(any(test, feature = "flaws"))]
            flaw: None,
        });
        for (k, _) in inner.store.scan(b"F", b"G", usize::MAX)? {
            inner.free_later(key::number(&k));
        }
        let told = Told {
            sync: sync_in,
            house: freed_in,
        };
        Ok((inner, told))
    }

    #[cfg(any(test, feature = "flaws"))]
    pub(super) fn flawed(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }

    #[cfg(not(any(test, feature = "flaws")))]
    #[allow(clippy::unused_self)]
    pub(super) const fn flawed(&self, _flaw: Flaw) -> bool {
        false
    }

    /// Era of lease versions.
    pub(super) fn era(&self) -> u32 {
        self.era.load(Ordering::Acquire)
    }
}
