//! Starting and stopping a mount.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lockmgr::msg::LeaseMsg;
use lockmgr::{Directory, LeaseError, LeaseManager, ManagerConfig, NodeId, RecordId};
use rdma_transport::{Connection, Fabric, RemoteAddr};
use rt::channel::RecvTimeoutError;
use rt::thread::JoinHandle;
use rt::time::Instant;
use rustix::mount::MountFlags;

use super::extension::{self, Extension};
use super::fuse::FsdFs;
use super::kernel_mount::{self, Mounted};
use super::lazy::Lazy;
use super::listen::open_endpoint;
use super::mountpoint::{check_point, set_read_ahead};
use super::net::{JoinError, Net, NetConfig, Owner};
use super::revoke::Revoker;
use super::workers::Workers;
use super::{Client, Counters};
use fsd_node::config::{CacheMode, Config, FabricChoice};
use fsd_node::endpoint::{Endpoint, Network};
use fsd_node::ports::Ports;
use fsd_proto::ask;
use fsd_proto::clock::Skew;
use fsd_proto::rpc::{Errno, Responder, RpcError, Service};
use fsd_proto::wire::{Hello, LockSpec, MetaRequest, MountRequest, Role};

/// Event loops that never wait.
const SPARE_LOOPS: usize = 1;
/// Longest wait for requests under way when leaving.
const CLOSE_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for the leases to be given up when leaving.
const LEAVE_WAIT: Duration = Duration::from_secs(20);
/// As [`LEAVE_WAIT`], while neither the metadata server nor a storage node is there: they may just be starting again.
const ALONE_WAIT: Duration = Duration::from_secs(1);
/// How long late questions of other mounts are still answered after leaving.
const LINGER: Duration = Duration::from_millis(100);
/// Longest wait for open files to be closed when leaving.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// Why a mount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no FUSE here.
    #[error(
        "/dev/fuse cannot be opened ({0}): load the fuse module (modprobe fuse) or run where the device is available"
    )]
    NoFuse(std::io::Error),
    /// The mount point is unusable.
    #[error("{path}: {detail}")]
    MountPoint {
        /// The mount point.
        path: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The cluster does not take us.
    #[error("cannot join the cluster: {0}")]
    Join(RpcError),
    /// The clocks differ too much.
    #[error(
        "the clock of this host differs: it is {0} the metadata server's, and two seconds are the most; synchronise the clocks (for example with chrony)"
    )]
    Clocks(Skew),
    /// A server has a store that is not what it was.
    #[error(
        "the metadata server refuses this cluster's stores: one of them is an older copy, or another's; the server's log says which"
    )]
    Stores,
    /// No node number is free.
    #[error("the cluster has no room for another mount: format it with a larger lease.record_bytes")]
    Full,
    /// The fabric refused.
    #[error(transparent)]
    Transport(#[from] rdma_transport::TransportError),
    /// The leases cannot be set up.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Options that are not known.
    #[error("{detail}")]
    Options {
        /// Which.
        detail: String,
    },
    /// The kernel refused the mount.
    #[error("the kernel refuses to mount on {path}: {error}")]
    Kernel {
        /// The mount point.
        path: PathBuf,
        /// Its answer.
        error: std::io::Error,
    },
    /// No port is left for it.
    #[error(
        "all ports that mounts may listen at (mount.ports = \"{0}\") are taken on this host: end a mount, or allow more ports there and in the firewalls"
    )]
    Ports(Ports),
    /// The kernel extension cannot be used.
    #[error("{0}; or mount with --cache writethrough")]
    Extension(#[from] distfuse_abi::Error),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// What the user can choose for one mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Where.
    pub point: PathBuf,
    /// Kernel caching.
    pub cache: CacheMode,
    /// In mode `writethrough`: shared files through the page cache too.
    pub cache_shared: bool,
    /// Where other mounts reach this one; `None`: chosen from the configuration.
    pub listen: Option<String>,
    /// As mount(8) has them, separated by commas.
    pub options: Vec<String>,
    /// Use a directory that is not empty.
    pub allow_nonempty: bool,
    /// Have fusermount3 unmount when this process dies, however it dies.
    pub auto_unmount: bool,
}

/// A running mount.
pub struct Mount {
    client: Arc<Client>,
    fabric: Arc<dyn Fabric>,
    session: Option<fuser::BackgroundSession>,
    threads: Vec<JoinHandle<()>>,
    point: PathBuf,
    mounted: Option<Mounted>,
}

/// Connects the router to the client, which is made later.
struct Front {
    client: OnceLock<Weak<Client>>,
}

impl Service for Front {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        match hello.role {
            Role::Client(Some(_)) | Role::Tool => Ok(()),
            other => Err(format!("a mount accepts no connection from a {other}")),
        }
    }

    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        let refuse = |responder: Responder, errno| responder.reply::<()>(&Err(Errno(errno)));
        let Some(client) = self.client.get().and_then(Weak::upgrade) else {
            return refuse(responder, libc::EAGAIN);
        };
        match (fsd_proto::wire::decode::<MountRequest>(body), hello.role) {
            (Ok(MountRequest::Status), _) => {
                // It waits for answers that this thread brings.
                let asking = rt::thread::Builder::new()
                    .name("fsd-status".into())
                    .spawn(move || responder.reply(&Ok(client.status())));
                if let Err(error) = asking {
                    tracing::warn!("no thread can be started for the status: {error}");
                }
            }
            (Ok(MountRequest::Visit { ino, offset, act }), Role::Client(Some(node))) => {
                client.receive(node, ino, offset, act, responder);
            }
            _ => refuse(responder, libc::EPROTO),
        }
    }

    fn lease(&self, hello: &Hello, body: &[u8]) {
        let (Role::Client(Some(node)), Some(client)) =
            (hello.role, self.client.get().and_then(Weak::upgrade))
        else {
            return;
        };
        if let Some(inode) = LeaseMsg::record_of(body).and_then(|record| client.inodes.by_record(record)) {
            inode.heard_of(node);
        }
        if let Err(error) = client.leases.message(NodeId(node), body) {
            tracing::error!("lease message from mount {node}: {error}");
        }
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, _hello: Option<&Hello>) {
        if let Some(client) = self.client.get().and_then(Weak::upgrade) {
            client.net.disconnected(conn);
        }
    }
}

struct Places(Arc<Net>);

impl Directory for Places {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        self.0.record(id)
    }

    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        self.0.send_lease(to, msg);
        Ok(())
    }
}

impl Owner for Client {
    fn held_locks(&self) -> Vec<LockSpec> {
        self.file_locks.all()
    }
    fn storage_lost(&self, shard: u16) {
        self.space.forget(shard);
        self.leases.storage_lost(u32::from(shard));
    }
    fn transaction_lost(&self, request: &MetaRequest, error: Errno) {
        let inos: Vec<u64> = match request {
            MetaRequest::Namespace { touched, .. } => touched.iter().map(|t| t.ino).collect(),
            MetaRequest::Update { updates } => updates.iter().map(|u| u.ino).collect(),
            _ => Vec::new(),
        };
        for inode in inos.into_iter().filter_map(|ino| self.inodes.find(ino)) {
            tracing::error!(
                "a change of {:#x} that was acknowledged is lost: {error}",
                inode.ino
            );
            inode.errors.set(Errno(libc::EIO));
            // What is known of its names came of that change, too.
            inode.lock_raw().dir = Lazy::default();
        }
    }
    fn storage_back(&self, shard: u16) {
        self.leases.storage_reconnected(u32::from(shard));
    }
    fn leases_lost(&self, shard: u16) {
        tracing::error!(
            "storage node {shard} came back without its leases (its host was restarted): this mount cannot know what others have changed, and ends; mount again"
        );
        self.doomed.store(true, Ordering::SeqCst);
    }
    fn peer_gone(&self, node: NodeId) {
        self.leases.peer_gone(node);
    }
    fn peer_back(&self, node: NodeId) {
        self.leases.peer_back(node);
    }
}

/// The kernel extension if it is there, else what a stock kernel can do.
fn best_mode() -> CacheMode {
    match distfuse_abi::kernel_version(Path::new(distfuse_abi::DEVICE)) {
        Ok(distfuse_abi::ABI_VERSION) => CacheMode::Writeback,
        Ok(kernel) => {
            let error = distfuse_abi::Error::Version { kernel };
            tracing::warn!("{error}; until then writes go through to the daemon");
            CacheMode::Writethrough
        }
        Err(distfuse_abi::Error::NotLoaded(_)) => CacheMode::Writethrough,
        Err(error) => {
            tracing::warn!("{error}; writes go through to the daemon");
            CacheMode::Writethrough
        }
    }
}

fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, MountError> {
    rt::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(MountError::Thread)
}

/// How a mount caches, and what it keeps of access times.
struct How {
    mode: CacheMode,
    cache_shared: bool,
    flags: MountFlags,
    /// Rules of the lease manager to break, one bit each; tests only.
    #[cfg(feature = "flaws")]
    flaws: u32,
}

/// Joins the cluster: everything of a mount but the kernel. `name` is shown to who asks for the mounts there are.
fn join(
    config: &Config,
    name: String,
    how: &How,
    endpoint: &Endpoint,
    front: &Arc<Front>,
) -> Result<(Arc<Client>, Vec<JoinHandle<()>>), MountError> {
    let workers = Workers::new("fsd-worker", 256);
    let net_config = NetConfig {
        cluster: config.cluster.clone(),
        meta_addr: config.meta.listen.clone(),
        timeout: Duration::from_millis(config.timeout_ms),
        name,
    };
    let net = Net::new(net_config, endpoint, workers.clone());
    let joined = net.join().map_err(|error| match error {
        JoinError::Clocks(skew) => MountError::Clocks(skew),
        JoinError::Rpc(RpcError::Errno(Errno(libc::EUSERS))) => MountError::Full,
        JoinError::Rpc(RpcError::Errno(Errno(libc::ESTALE))) => MountError::Stores,
        JoinError::Rpc(other) => MountError::Join(other),
    })?;
    let node = NodeId(joined.node);
    let layout = lockmgr::RecordLayout::new(joined.record_bytes)?;
    let revoker = Arc::new(Revoker::default());
    let mut manager = ManagerConfig::new(node, joined.incarnation, layout);
    manager.min_hold = Duration::from_micros(config.lease.min_hold_us);
    manager.keep_word = Duration::from_millis(config.lease.keep_ms);
    #[cfg(feature = "flaws")]
    {
        manager.flaws = how.flaws;
    }
    let leases = LeaseManager::new(
        manager,
        Arc::new(Places(Arc::clone(&net))),
        Arc::clone(&revoker) as Arc<dyn lockmgr::LeaseUser>,
    )?;
    let loops = config.mount.loops.max(SPARE_LOOPS + 1);
    let (wake_writeback, wake) = rt::channel::bounded(1);
    let client = Arc::new(Client {
        node,
        mode: how.mode,
        cache_shared: how.cache_shared,
        shared_mappings: config.mount.shared_mappings,
        leases,
        net: Arc::clone(&net),
        inodes: Arc::default(),
        workers,
        revokers: Workers::new("fsd-revoke", 128),
        invalidators: Workers::new("fsd-inval", 256),
        permits: super::ctx::Permits::new(loops, SPARE_LOOPS),
        lease_wait: Duration::from_millis(config.lease.wait_ms),
        cache_reads: config.fabric != FabricChoice::Shm,
        layout,
        notifier: OnceLock::new(),
        extension: OnceLock::new(),
        dirty: Default::default(),
        attr_push: Default::default(),
        cached_pages: AtomicUsize::new(0),
        max_pages: (config.mount.buffer_cache.0 / super::pages::PAGE) as usize,
        new_inos: Arc::default(),
        handles: Default::default(),
        file_locks: Default::default(),
        pins: Default::default(),
        space: Default::default(),
        access_times: super::atime::AccessTimes::of(how.flags),
        closes_awaited: Default::default(),
        seqs: Default::default(),
        writeback_after: Duration::from_millis(config.mount.writeback_ms),
        counters: Counters::default(),
        trim: super::trim::Trim::new(config.mount.max_inodes),
        wake_writeback,
        writeback_sleeps: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
        leaving: AtomicBool::new(false),
        began: rt::time::Instant::now(),
        doomed: AtomicBool::new(false),
    });
    revoker.set_client(&client);
    let _ = front.client.set(Arc::downgrade(&client));
    let owner: Arc<dyn Owner> = Arc::clone(&client) as Arc<dyn Owner>;
    net.set_owner(Arc::downgrade(&owner));

    let writer = Arc::clone(&client);
    let mut threads = vec![thread("fsd-writeback", move || writer.writeback_loop(&wake))?];
    let leases = Arc::clone(&client.leases);
    threads.push(thread("fsd-leases", move || leases.run_timers())?);
    Ok((client, threads))
}

/// Mounts in the kernel, and shakes hands with it.
fn open_session(
    config: &Config,
    options: &MountOptions,
    loops: usize,
    client: &Arc<Client>,
    (point, flags): (&Path, MountFlags),
) -> Result<(fuser::Session<FsdFs>, Option<Mounted>), MountError> {
    let refused = |error| MountError::Kernel {
        path: point.to_owned(),
        error,
    };
    let root = rustix::process::geteuid().is_root();
    let mut fuse = fuser::Config::default();
    fuse.n_threads = Some(loops);
    fuse.clone_fd = true;
    fuse.acl = if root {
        fuser::SessionACL::All
    } else {
        fuser::SessionACL::Owner
    };
    let files = FsdFs::new(Arc::clone(client));
    let session = if root && !options.auto_unmount {
        let device = kernel_mount::mount(point, &config.cluster, flags).map_err(refused)?;
        let mounted = Mounted::at(point);
        fuser::Session::from_fd(files, device.into(), fuse.acl, fuse)
            .inspect_err(|_| mounted.iter().for_each(Mounted::unmount))
    } else {
        fuse.mount_options = vec![
            fuser::MountOption::FSName(config.cluster.clone()),
            fuser::MountOption::Subtype("distfuse".into()),
            fuser::MountOption::DefaultPermissions,
        ];
        let words = kernel_mount::words_of(flags);
        fuse.mount_options.extend(
            words
                .iter()
                .map(|word| fuser::MountOption::CUSTOM((*word).into())),
        );
        if root {
            for (word, option) in [
                ("nosuid", fuser::MountOption::Suid),
                ("nodev", fuser::MountOption::Dev),
            ] {
                if !words.contains(&word) {
                    fuse.mount_options.push(option);
                }
            }
        }
        if options.auto_unmount {
            fuse.mount_options.push(fuser::MountOption::AutoUnmount);
        }
        fuser::Session::new(files, point, &fuse)
    };
    Ok((session.map_err(refused)?, Mounted::at(point)))
}

/// Waits until all leases have been given up; not for long where `alone` says that this cannot be.
fn left(done: &rt::channel::Receiver<()>, alone: &impl Fn() -> bool) -> bool {
    let (begun, mut since) = (Instant::now(), None);
    while begun.elapsed() < LEAVE_WAIT {
        match done.recv_timeout(Duration::from_millis(20)) {
            Err(RecvTimeoutError::Timeout) if alone() => {
                if since.get_or_insert_with(Instant::now).elapsed() > ALONE_WAIT {
                    return false;
                }
            }
            Err(RecvTimeoutError::Timeout) => since = None,
            told => return told.is_ok(),
        }
    }
    false
}

/// Writes everything back, gives up all leases and leaves.
fn leave(client: &Arc<Client>, threads: Vec<JoinHandle<()>>, fabric: &dyn Fabric) {
    client.leaving.store(true, Ordering::SeqCst);
    client.write_all();
    if client.dirty.lock().is_empty() {
        // Nothing is lost any more, whoever is not there.
        client.net.hurry();
    }
    client.return_space();
    let (tx, rx) = rt::channel::bounded(1);
    client.leases.leave(Box::new(move || {
        let _ = tx.send(());
    }));
    // Without its servers it cannot give anything up, and with nothing left to store nobody gains by its waiting.
    let alone = || client.dirty.lock().is_empty() && client.net.is_alone();
    if !left(&rx, &alone) {
        if alone() {
            tracing::info!(
                "the servers are gone: what this mount has leased is free when they have started again"
            );
        } else {
            tracing::error!("not all leases could be given up: this mount will be taken for dead");
        }
    } else {
        if let Err(error) = client.net.meta(ask::meta::Leave {}) {
            tracing::warn!("leaving: {error}");
        }
        // Others may have read our name in a lease record just before it was freed, and ask us.
        rt::thread::sleep(LINGER);
    }
    client.stopping.store(true, Ordering::Release);
    let _ = client.wake_writeback.try_send(());
    client.leases.stop_timers();
    for thread in threads {
        let _ = thread.join();
    }
    client.net.stop();
    client.workers.close(CLOSE_WAIT);
    client.revokers.close(CLOSE_WAIT);
    client.invalidators.close(CLOSE_WAIT);
    fabric.shutdown();
    let dirty = client.dirty.lock().len();
    if dirty > 0 {
        tracing::error!("{dirty} files could not be written back completely");
    }
}

impl Mount {
    /// Joins the cluster and mounts.
    ///
    /// # Errors
    /// [`MountError`]; nothing is left behind.
    pub fn start(config: &Config, key: Vec<u8>, options: &MountOptions) -> Result<Self, MountError> {
        let flags =
            kernel_mount::flags_of(&options.options).map_err(|detail| MountError::Options { detail })?;
        let point = check_point(&options.point, options.allow_nonempty)?;
        let mode = match options.cache {
            CacheMode::Auto => best_mode(),
            chosen => chosen,
        };
        if options.cache_shared && mode != CacheMode::Writethrough {
            tracing::warn!("cache_shared changes nothing here: it is for mode writethrough");
        }
        if mode == CacheMode::Writeback {
            // Memory that this process asks for must not have to wait for pages that it is to write back itself. For
            // this thread and those it starts.
            if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
                tracing::warn!("this process cannot be marked as one that writes back pages: {error}");
            }
        }
        let front = Arc::new(Front {
            client: OnceLock::new(),
        });
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let endpoint = open_endpoint(config, options.listen.as_deref(), &key, &service)?;
        let started = Self::start_on(config, options, mode, (point, flags), &endpoint, &front);
        if started.is_err() {
            endpoint.fabric.shutdown();
        }
        started
    }

    fn start_on(
        config: &Config,
        options: &MountOptions,
        mode: CacheMode,
        (point, flags): (PathBuf, MountFlags),
        endpoint: &Endpoint,
        front: &Arc<Front>,
    ) -> Result<Self, MountError> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let name = format!("{host}:{}", point.display());
        let how = How {
            mode,
            cache_shared: options.cache_shared && mode == CacheMode::Writethrough,
            flags,
            #[cfg(feature = "flaws")]
            flaws: 0,
        };
        let (client, threads) = join(config, name, &how, endpoint, front)?;
        let (node, loops) = (client.node, config.mount.loops.max(SPARE_LOOPS + 1));

        let (session, mounted) = open_session(config, options, loops, &client, (&point, flags))?;
        if let Some(mounted) = &mounted {
            // The kernel has answered the handshake, which would take it back.
            set_read_ahead(mounted, config.mount.read_ahead.0);
        }
        let _ = client.notifier.set(session.notifier());
        if mode == CacheMode::Writeback {
            // Before the kernel is answered for the first time, so nobody has a file open.
            let ext = Extension::attach(
                &point,
                config.mount.lease_table,
                Duration::from_micros(config.spin_us),
            );
            let ext = Arc::new(ext.inspect_err(|_| mounted.iter().for_each(Mounted::unmount))?);
            let _ = client.extension.set(Arc::clone(&ext));
            let client = Arc::downgrade(&client);
            // Ends with the mount in the kernel, which may be later than this one.
            thread("fsd-kernel", move || extension::run(&client, &ext))?;
        }
        let session = session.spawn().map_err(MountError::Thread)?;
        tracing::info!("mount {} on {} ({mode:?})", node.0, point.display());
        Ok(Self {
            client,
            fabric: Arc::clone(&endpoint.fabric),
            session: Some(session),
            threads,
            point,
            mounted,
        })
    }

    /// The mount point.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// How the kernel caches.
    #[must_use]
    pub fn mode(&self) -> CacheMode {
        self.client.mode
    }

    /// Has somebody else unmounted it?
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.session.as_ref().is_none_or(|s| s.guard.is_finished()) || self.is_doomed()
    }

    /// Has it lost its leases?
    #[must_use]
    pub fn is_doomed(&self) -> bool {
        self.client.doomed.load(Ordering::SeqCst)
    }

    /// Unmounts, writes everything back, gives up all leases and leaves. One that has lost its leases stays where it is and
    /// answers nothing any more, until somebody unmounts it: programs would go on in the directory below, and not know.
    pub fn stop(mut self) {
        if self.is_doomed() {
            tracing::error!(
                "{} answers with errors from now on: end what uses it, unmount it (umount {}), and mount again",
                self.point.display(),
                self.point.display()
            );
            // Nothing that is cached can be trusted, nor written without a lease. The connection to the kernel ends with
            // the process.
            if let Some(session) = self.session.take() {
                std::mem::forget(session);
            }
            self.client.net.stop();
            return self.fabric.shutdown();
        }
        if let Some(session) = self.session.take() {
            if !session.guard.is_finished() {
                self.mounted.iter().for_each(Mounted::unmount);
            }
            // Where files are still open, the kernel keeps the connection until they are closed, or this
            // process ends.
            let deadline = rt::time::Instant::now() + OPEN_WAIT;
            while !session.guard.is_finished() && rt::time::Instant::now() < deadline {
                rt::thread::sleep(Duration::from_millis(5));
            }
            if session.guard.is_finished() {
                let _ = session.join();
            } else {
                tracing::warn!("files of this mount are still open: their processes will see errors");
                // Joining would wait for them; the threads end with the process.
                std::mem::forget(session);
            }
        }
        leave(&self.client, self.threads, self.fabric.as_ref());
    }
}

/// A mount without a kernel: what uses it calls the client.
pub struct Detached {
    client: Arc<Client>,
    fabric: Arc<dyn Fabric>,
    threads: Vec<JoinHandle<()>>,
}

impl Detached {
    /// Joins the cluster, reached at `listen` in a network. `flaws` are rules of the lease manager to break, one bit each.
    ///
    /// # Errors
    /// [`MountError`]; nothing is left behind.
    pub fn start(
        network: &dyn Network,
        config: &Config,
        key: Vec<u8>,
        listen: String,
        mode: CacheMode,
        #[cfg(feature = "flaws")] flaws: u32,
    ) -> Result<Self, MountError> {
        let front = Arc::new(Front {
            client: OnceLock::new(),
        });
        let (service, name) = (Arc::clone(&front) as Arc<dyn Service>, listen.clone());
        let endpoint = Endpoint::open_in(network, config, Role::Client(None), listen, key, service)?;
        let how = How {
            mode,
            cache_shared: false,
            flags: MountFlags::empty(),
            #[cfg(feature = "flaws")]
            flaws,
        };
        let joined = join(config, name, &how, &endpoint, &front);
        let (client, threads) = joined.inspect_err(|_| endpoint.fabric.shutdown())?;
        Ok(Self {
            client,
            fabric: endpoint.fabric,
            threads,
        })
    }

    /// What does the work.
    #[must_use]
    pub fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Writes everything back, gives up all leases and leaves.
    pub fn stop(self) {
        leave(&self.client, self.threads, self.fabric.as_ref());
    }
}
