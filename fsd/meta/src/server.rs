//! The metadata server's daemon: start and stop. What it does by itself is in `house`, its requests in `service`.

use std::sync::Arc;

use rdma_transport::Fabric;
use rt::channel::{RecvTimeoutError, Sender, unbounded};
use rt::thread::JoinHandle;

pub use crate::journal::format::{check_unformatted, format, make};

use crate::error::MetaError;
use crate::house::House;
use crate::journal::format::read_superblock;
use crate::membership::missed;
use crate::nodes::Reach;
use crate::nodes::fabric::{FabricNodes, StorageNodes};
use crate::nodes::mounts::FabricMounts;
use crate::rules::Rules;
use crate::service::{News, Service};
use fsd_node::config::Config;
use fsd_node::endpoint::{Endpoint, Network};
use fsd_node::memory::{Claim, Note};
use fsd_node::store::{FjallStore, Store, is_begun};
use fsd_proto::rpc;
use fsd_proto::wire::Role;

/// What a metadata server stands on.
pub struct Base<'a> {
    /// Where everything is kept.
    pub store: Arc<dyn Store>,
    /// Where its endpoint is made.
    pub network: &'a dyn Network,
    /// What it keeps to.
    pub rules: Rules,
}

/// A running metadata server.
pub struct MetaServer {
    service: Arc<Service>,
    fabric: Arc<dyn Fabric>,
    threads: Vec<JoinHandle<()>>,
    /// One for each thread that sleeps.
    stop: Vec<Sender<()>>,
    claim: Claim,
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
        let base = Base {
            store,
            network: config,
            rules: Rules::default(),
        };
        Self::start_on(base, config, cluster_key, accept_older)
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
        let superblock = read_superblock(base.store.as_ref(), config)?;
        let note = Note {
            cluster: superblock.cluster.clone(),
            storage: None,
            store: config.meta.dir.clone(),
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
        let mut nodes = None;
        let options = (accept_older, base.rules);
        let mounts = Arc::<FabricMounts>::default();
        let (service, news) = Service::open(base.store, config, &superblock, options, |stores| {
            let made = nodes.insert(Arc::new(FabricNodes::new(stores, config.timeout_ms)));
            Reach {
                storage: Arc::clone(made) as Arc<dyn StorageNodes>,
                mounts: Arc::clone(&mounts) as _,
            }
        })?;
        let called = Arc::clone(&service) as Arc<dyn rpc::Service>;
        let listen = config.meta.listen.clone();
        let Endpoint { fabric, calls, .. } = Endpoint::open_in(
            base.network,
            config,
            Role::Meta,
            listen.into(),
            cluster_key,
            called,
        )?;
        mounts.attach(Arc::clone(&calls));
        if let Some(nodes) = nodes {
            nodes.attach(&fabric, calls);
        }
        let (threads, stop) = start(&service, news, &fabric)?;
        Ok(Self {
            service,
            fabric,
            threads,
            stop,
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
        self.service.membership.copies.is_older()
    }

    /// Calls this when that is found out. It may have been before.
    pub fn once_older(&self, tell: Box<dyn Fn() + Send + Sync>) {
        self.service.membership.copies.tell_once_older(tell);
    }

    /// Makes everything durable and stops.
    ///
    /// # Errors
    /// The store failed.
    pub fn stop(mut self) -> Result<(), MetaError> {
        for stop in &self.stop {
            let _ = stop.send(());
        }
        self.fabric.shutdown();
        self.service.nodes.asks.close();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        self.service.journal.order.stop()?;
        // The witness is gone.
        self.claim.remove();
        Ok(())
    }
}

/// Threads, and what stops those that sleep.
type Running = (Vec<JoinHandle<()>>, Vec<Sender<()>>);

/// Starts what runs beside the requests; what stops the threads that sleep.
fn start(service: &Arc<Service>, news: News, fabric: &Arc<dyn Fabric>) -> Result<Running, MetaError> {
    let thread = |name: &str, body: Box<dyn FnOnce() + Send>| {
        rt::thread::Builder::new()
            .name(name.into())
            .spawn(body)
            .map_err(|error| MetaError::Io {
                what: format!("cannot start thread {name}"),
                error,
            })
    };
    let (stops, mut stopped): (Vec<_>, Vec<_>) = (0..6).map(|_| unbounded::<()>()).unzip();
    let mut stopped = || stopped.pop().unwrap_or_else(|| unbounded().1);
    let membership = &service.membership;
    let (commits, commits_stop) = (Arc::clone(&service.journal.commits), stopped());
    let (house, house_stop) = (House::new(service), stopped());
    let (copies, copies_stop) = (Arc::clone(&membership.copies), stopped());
    let (takeover, takeover_stop) = (Arc::clone(&membership.takeover), stopped());
    let (judge, judge_stop) = (Arc::clone(service), stopped());
    let (looker, looker_stop) = (Arc::clone(service), stopped());
    let fabric = Arc::clone(fabric);
    let woken = news.membership;
    let lost = woken.lost;
    let threads = vec![
        thread(
            "meta-sync",
            Box::new(move || commits.run(&news.commits, &commits_stop)),
        )?,
        thread(
            "meta-house",
            Box::new(move || house.run(&news.house, &house_stop)),
        )?,
        thread("meta-copies", Box::new(move || copies.run(&copies_stop)))?,
        thread(
            "meta-takeover",
            Box::new(move || takeover.run(&woken.takeover, &takeover_stop)),
        )?,
        thread(
            "meta-members",
            Box::new(move || {
                let period = judge.membership.members.pulse.lock().period();
                while let Err(RecvTimeoutError::Timeout) = judge_stop.recv_timeout(period) {
                    judge.judge();
                }
            }),
        )?,
        thread(
            "meta-missed",
            Box::new(move || {
                let told = (&lost, &looker_stop);
                let members = &looker.membership.members;
                missed::watch(members, told, fabric.as_ref(), &|| looker.judge());
            }),
        )?,
    ];
    Ok((threads, stops))
}
