//! Joining a cluster and leaving it: everything of a mount but the kernel.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lockmgr::{LeaseManager, ManagerConfig, NodeId};
use rdma_transport::Fabric;
use rt::channel::RecvTimeoutError;
use rt::thread::JoinHandle;
use rt::time::Instant;
use rustix::mount::MountFlags;

use super::error::MountError;
use super::service::{Front, Places};
use crate::cache::pages::PAGE;
use crate::cache::{Base, Cache};
use crate::client::Client;
use crate::revoke::revoker::Revoker;
use crate::session::ctx::Permits;
use crate::session::heartbeat::Heartbeat;
use crate::session::net::{JoinError, Joined, Net, NetConfig, Owner, Patience};
use crate::session::term::Term;
use crate::session::workers::Workers;
use crate::session::{Counters, Fate, Session, Threads};
use fsd_node::config::{CacheMode, Config, FabricChoice};
use fsd_node::endpoint::{Endpoint, Network};
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError, Service};
use fsd_proto::wire::Role;

/// Event loops that never wait.
pub(super) const SPARE_LOOPS: usize = 1;
/// Longest wait for requests under way when leaving.
const CLOSE_WAIT: Duration = Duration::from_secs(10);
/// Longest wait for the leases to be given up when leaving.
const LEAVE_WAIT: Duration = Duration::from_secs(20);
/// As [`LEAVE_WAIT`], while neither the metadata server nor a storage node is there: they may just be starting again.
const ALONE_WAIT: Duration = Duration::from_secs(1);
/// Longest wait for other mounts to hear the last message when leaving.
const HEARD_WAIT: Duration = Duration::from_secs(5);
/// How long late questions of other mounts are still answered when everything has been given up.
const LINGER: Duration = Duration::from_millis(100);

pub(super) fn thread(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, MountError> {
    rt::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(MountError::Thread)
}

/// How a mount caches, and what it keeps of access times.
pub(super) struct How {
    pub(super) mode: CacheMode,
    pub(super) cache_shared: bool,
    pub(super) flags: MountFlags,
    /// Rules of the lease manager to break, one bit each; tests only.
    #[cfg(feature = "flaws")]
    pub(super) flaws: u32,
}

/// Why a mount cannot join.
fn refused(error: RpcError) -> MountError {
    match error {
        RpcError::Errno(Errno(libc::EUSERS)) => MountError::Full,
        RpcError::Errno(Errno(libc::ESTALE)) => MountError::Stores,
        other => MountError::Join(other),
    }
}

/// Joins the cluster: everything of a mount but the kernel. `name` is shown to who asks for the mounts there are.
pub(super) fn join(
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
        patience: Patience::new(
            Duration::from_millis(config.timeout_ms),
            config.mount.hard_ms.map(Duration::from_millis),
        ),
        name,
    };
    let net = Net::new(net_config, endpoint, workers.clone());
    let Joined { reply: joined, alive } = net.join().map_err(|error| match error {
        JoinError::Clocks(skew) => MountError::Clocks(skew),
        JoinError::Rpc(error) => refused(error),
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
    leases.join_epoch(joined.epoch);
    let loops = config.mount.loops.max(SPARE_LOOPS + 1);
    let (wake_writeback, wake) = rt::channel::bounded(1);
    let session = Arc::new(Session {
        node,
        layout,
        net: Arc::clone(&net),
        leases,
        lease_wait: Duration::from_millis(config.lease.wait_ms),
        began: rt::time::Instant::now(),
        cache_reads: config.fabric != FabricChoice::Shm,
        threads: Threads {
            workers,
            revokers: Workers::new("fsd-revoke", 128),
            invalidators: Workers::new("fsd-inval", 256),
            permits: Permits::new(loops, SPARE_LOOPS),
            waiting: Arc::default(),
            busy: Default::default(),
            heartbeat: OnceLock::new(),
        },
        term: Arc::new(Term::new(
            Duration::from_millis(joined.terms.term_ms),
            alive,
            config.mount.hard_ms.map(Duration::from_millis),
        )),
        fate: Fate::default(),
        counters: Counters::default(),
    });
    let cache = Arc::new(Cache {
        inodes: Arc::default(),
        dirty: Default::default(),
        wake_writeback,
        writeback_sleeps: AtomicBool::new(false),
        hurry: crate::cache::hurry::Hurry::default(),
        cached_pages: AtomicUsize::new(0),
        max_pages: (config.mount.buffer_cache.0 / PAGE) as usize,
        session: Arc::clone(&session),
    });
    let client = Arc::new(Client::new(
        &Base { session, cache },
        config,
        (how.mode, how.cache_shared, how.flags),
    ));
    revoker.set(&client.revoke.revocations);
    let _ = front.client.set(Arc::downgrade(&client));
    let owner: Arc<dyn Owner> = Arc::clone(&client) as Arc<dyn Owner>;
    net.ways.set_owner(Arc::downgrade(&owner));

    let writer = Arc::clone(&client);
    let mut threads = vec![thread("fsd-writeback", move || {
        writer.storing.writeback.writeback_loop(&wake)
    })?];
    let leases = Arc::clone(&client.session.leases);
    threads.push(thread("fsd-leases", move || leases.run_timers())?);
    let meta = Arc::clone(&net.meta);
    threads.push(thread("fsd-names", move || meta.tell_changes())?);
    threads.push(thread("fsd-peers", net.peers.attending())?);
    let heartbeat = Heartbeat {
        net: Arc::clone(&net),
        term: Arc::clone(&client.session.term),
        every: Duration::from_millis(joined.terms.heartbeat_ms.max(1)),
    };
    let (stop_beating, beating) = rt::channel::bounded(1);
    let _ = client.session.threads.heartbeat.set(stop_beating);
    let kernel = Arc::downgrade(&client);
    threads.push(thread("fsd-heartbeat", move || {
        heartbeat.run(&beating, || {
            if let Some(client) = kernel.upgrade() {
                client.freeze();
            }
        });
    })?);
    if let Err(error) = net.tell_tables() {
        // It has nothing yet.
        leave(&client, threads, endpoint.fabric.as_ref());
        return Err(refused(error));
    }
    net.ways.patience.serve();
    Ok((client, threads))
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

/// Waits until other mounts have heard what they were granted last: nobody can be asked for that any more when this one has left.
fn await_heard(client: &Client) {
    let (tx, rx) = rt::channel::bounded(1);
    client.session.net.peers.once_heard(Box::new(move || {
        let _ = tx.send(());
    }));
    if rx.recv_timeout(HEARD_WAIT).is_err() {
        tracing::warn!("another mount has not heard the last message of this one");
    }
}

/// Writes everything back, gives up all leases and leaves.
pub(super) fn leave(client: &Client, threads: Vec<JoinHandle<()>>, fabric: &dyn Fabric) {
    client.session.fate.leaving.store(true, Ordering::SeqCst);
    client.session.net.ways.patience.leave();
    if !client.session.net.is_alone() {
        client.opens.open_files.close_all();
    }
    client.storing.writeback.write_all();
    if client.cache.dirty.lock().is_empty() {
        // Nothing is lost any more, whoever is not there.
        client.session.net.ways.patience.hurry();
    }
    client.data.space.return_space();
    let (tx, rx) = rt::channel::bounded(1);
    client.session.leases.leave(Box::new(move || {
        let _ = tx.send(());
    }));
    // Without its servers it cannot give anything up, and with nothing left to store nobody gains by its waiting.
    let alone = || client.cache.dirty.lock().is_empty() && client.session.net.is_alone();
    if !left(&rx, &alone) {
        if alone() {
            tracing::info!(
                "the servers are gone: what this mount has leased is free when they have started again"
            );
        } else {
            tracing::error!("not all leases could be given up: this mount will be taken for dead");
        }
    } else {
        // Once more: a revocation that began before this mount was leaving may have pinned something.
        client.opens.pinning.drop_pins(true);
        client.session.fate.left.store(true, Ordering::SeqCst);
        // Others may have read our name in a lease record just before it was freed, and ask us. They must still be told where we are: of one
        // that has left they get no answer, and wait for it until they give up.
        rt::thread::sleep(LINGER);
        await_heard(client);
        if let Err(error) = client.session.net.meta.ask(ask::meta::Leave {}) {
            tracing::warn!("leaving: {error}");
        }
    }
    client.session.fate.stopping.store(true, Ordering::Release);
    let _ = client.cache.wake_writeback.try_send(());
    client.session.leases.stop_timers();
    client.session.net.peers.stop();
    client.session.net.meta.end_changes();
    client.session.threads.stop_heartbeat();
    for thread in threads {
        let _ = thread.join();
    }
    client.session.net.ways.stop();
    client.session.threads.waiting.close(CLOSE_WAIT);
    client.session.threads.workers.close(CLOSE_WAIT);
    client.membership.close(CLOSE_WAIT);
    client.session.threads.revokers.close(CLOSE_WAIT);
    client.session.threads.invalidators.close(CLOSE_WAIT);
    fabric.shutdown();
    let dirty = client.cache.dirty.lock().len();
    if dirty > 0 {
        tracing::error!("{dirty} files could not be written back completely");
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
        let endpoint = Endpoint::open_in(network, config, Role::Client(None), listen.into(), key, service)?;
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
