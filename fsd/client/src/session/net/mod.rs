//! The mount's connections: to the metadata server, the storage nodes, and the other mounts.
//!
//! A connection that breaks is made again in the background; requests wait for that up to their time
//! limit and are then repeated (the servers carry repeated transactions out only once).

mod alarm;
mod changes;
mod clock;
mod log;
mod meta;
mod outbox;
mod patience;
mod peer;
mod peers;
mod storage;
mod stream;
mod ways;

pub use patience::Patience;
pub use storage::StorageSession;
pub use ways::{NetConfig, Owner};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use meta::MetaLink;
use patience::JOIN_GRACE;
use peers::Peers;
use rdma_transport::Connection;
use rt::channel::{RecvTimeoutError, Sender};
use rt::time::Instant;
use storage::{StorageLink, StorageLinks};
use ways::{RETRY, Ways};

use super::workers::Workers;
use fsd_node::endpoint::Endpoint;
use fsd_node::probe::{self, Probe};
use fsd_proto::ask;
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::JoinReply;

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

/// What a mount learns when it joins.
pub struct Joined {
    /// From the metadata server.
    pub reply: JoinReply,
    /// When the last sign of life was sent that has been answered, since the host was started.
    pub alive: Duration,
}

/// Tells the metadata server that a mount lives which is still joining; until it is dropped.
struct Beating(Sender<()>);

impl Beating {
    fn start(meta: &Arc<MetaLink>, alive: &Arc<AtomicU64>, every_ms: u64) -> Result<Self, RpcError> {
        let (stop, stopped) = rt::channel::bounded(1);
        let (meta, alive) = (Arc::clone(meta), Arc::clone(alive));
        let every = Duration::from_millis(every_ms.max(1));
        let beat = move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
                let (sent, alive) = (rt::time::since_boot(), Arc::clone(&alive));
                meta.ask_now(ask::meta::Heartbeat {}, move |answer| {
                    if answer.is_ok() {
                        alive.fetch_max(sent.as_nanos() as u64, Ordering::AcqRel);
                    }
                });
            }
        };
        let thread = rt::thread::Builder::new().name("fsd-joining".into());
        let started = thread.spawn(beat);
        started.map_err(|error| RpcError::Errno(Errno(error.raw_os_error().unwrap_or(libc::EAGAIN))))?;
        Ok(Self(stop))
    }
}

impl Drop for Beating {
    fn drop(&mut self) {
        let _ = self.0.try_send(());
    }
}

/// All connections of a mount.
pub struct Net {
    me: Weak<Self>,
    /// What they have in common.
    pub ways: Arc<Ways>,
    /// To the metadata server.
    pub meta: Arc<MetaLink>,
    /// To the storage nodes.
    pub storage: Arc<StorageLinks>,
    /// To the other mounts.
    pub peers: Arc<Peers>,
}

impl Net {
    /// Connections that are not made yet.
    #[must_use]
    pub fn new(config: NetConfig, endpoint: &Endpoint, workers: Workers) -> Arc<Self> {
        let addr = config.meta_addr.clone();
        let ways = Arc::new(Ways::new(config, endpoint, workers));
        let meta = MetaLink::new(&ways, addr);
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            storage: Arc::new(StorageLinks::new(&ways, &meta)),
            peers: Peers::new(&ways, &meta),
            ways,
            meta,
        })
    }

    /// Joins the cluster and connects to every storage node.
    ///
    /// # Errors
    /// Unreachable, wrong key, clocks apart…
    pub fn join(&self) -> Result<Joined, JoinError> {
        let conn = self.meta.connect()?;
        let skew = self.meta.compare_clocks(&conn, meta::EXCHANGES)?;
        if skew.verdict() == Verdict::Unsure {
            tracing::warn!(
                "the metadata server answers too slowly to tell whether the clock of this host is right: it is {skew} the server's"
            );
        }
        let patience = Instant::now() + self.ways.patience.for_answer() + JOIN_GRACE;
        let mut sent = rt::time::since_boot();
        let reply = loop {
            sent = sent.max(rt::time::since_boot());
            match self.meta.join_on(&conn, None, skew) {
                Err(RpcError::Errno(Errno(libc::EAGAIN))) if Instant::now() < patience => {
                    rt::thread::sleep(RETRY);
                }
                Err(RpcError::Errno(Errno(libc::ETIME))) => return Err(JoinError::Clocks(skew)),
                other => break other?,
            }
        };
        self.ways
            .fabric
            .set_identity(self.ways.hello(Some(reply.node)).encode());
        self.storage
            .record_bytes
            .store(u64::from(reply.record_bytes), Ordering::Relaxed);
        let links = reply.storage.iter().map(StorageLink::new).collect();
        let _ = self.storage.links.set(links);
        let _ = self.meta.joined.set(reply.clone());
        self.meta.log.heard(reply.durable);
        *self.meta.conn.write() = Some(conn);
        // Connecting to the storage nodes may take longer than a term.
        let alive = Arc::new(AtomicU64::new(sent.as_nanos() as u64));
        let _beating = Beating::start(&self.meta, &alive, reply.terms.heartbeat_ms)?;
        self.storage.found()?;
        Ok(Joined {
            reply,
            alive: Duration::from_nanos(alive.load(Ordering::Acquire)),
        })
    }

    /// Tells which lease tables there are, until this life may lease in them: others may have to find out first that theirs are lost, and
    /// to be declared dead. Meanwhile this mount is to answer what it is told of that, as any other.
    ///
    /// # Errors
    /// It may not for longer than an answer of the metadata server is waited for; a server's refusal.
    pub fn tell_tables(&self) -> Result<(), RpcError> {
        let patience = Instant::now() + self.ways.patience.for_meta();
        loop {
            let found = self.storage.found()?;
            let ids: Vec<u64> = found.iter().map(|attached| attached.table).collect();
            let tables = ask::meta::Tables {
                ids: ids.clone(),
                stores: found.iter().map(|attached| attached.store.clone()).collect(),
                places: found.iter().map(|attached| attached.place).collect(),
            };
            match self.meta.ask(tables) {
                Ok(()) if self.storage.lease_in(&ids)? => return Ok(()),
                Ok(()) => {}
                Err(RpcError::Errno(Errno(libc::EAGAIN))) if Instant::now() < patience => {
                    rt::thread::sleep(RETRY);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A connection has ended: make it again where it is one that is always needed.
    pub fn disconnected(&self, conn: &Arc<dyn Connection>) {
        if self.ways.stopping.load(Ordering::Acquire) {
            return;
        }
        let me = Weak::clone(&self.me);
        if self
            .meta
            .conn
            .read()
            .as_ref()
            .is_some_and(|c| c.id() == conn.id())
        {
            tracing::warn!("connection to the metadata server lost");
            self.ways.workers.run(move || {
                while let Some(net) = me.upgrade() {
                    if net.ways.stopping.load(Ordering::Acquire) || net.meta.connection().is_ok() {
                        return;
                    }
                    rt::thread::sleep(RETRY);
                }
            });
            return;
        }
        let shard = self.storage.links.get().and_then(|links| {
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
            if let Some(owner) = self.ways.owner() {
                owner.storage_lost(shard);
            }
            self.ways.workers.run(move || {
                while let Some(net) = me.upgrade() {
                    if net.ways.stopping.load(Ordering::Acquire) || net.storage.session(shard).is_ok() {
                        return;
                    }
                    // It may have answered at once, with a refusal.
                    rt::thread::sleep(RETRY);
                }
            });
            return;
        }
        self.peers.disconnected(conn);
    }

    /// Is there no connection to the metadata server, and none to one of the storage nodes?
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let mut links = self.storage.links.get().into_iter().flatten();
        !self.meta.is_up() && links.any(|link| self.storage.session_now(link.id).is_none())
    }

    /// Is a server away, or was one since then?
    #[must_use]
    pub fn was_away_since(&self, since: Instant) -> bool {
        let mut links = self.storage.links.get().into_iter().flatten();
        !self.meta.is_up()
            || links.any(|link| self.storage.session_now(link.id).is_none())
            || self.ways.outage_since(since)
    }

    /// A sentence for each server that cannot be reached.
    #[must_use]
    pub fn unreachable(&self) -> Vec<String> {
        let Some(me) = self.me.upgrade() else {
            return Vec::new();
        };
        let net = std::sync::Arc::clone(&me);
        let meta = Probe {
            who: format!("the metadata server ({})", me.meta.addr),
            ask: Box::new(move || net.meta.probe().map_err(|error| error.to_string())),
        };
        let links = me.storage.links.get().into_iter().flatten();
        let storage = links.map(|link| {
            let (net, id) = (std::sync::Arc::clone(&me), link.id);
            Probe {
                who: format!("storage node {id} ({})", link.addr()),
                ask: Box::new(move || net.storage.probe(id).map_err(|error| error.to_string())),
            }
        });
        probe::unreachable([meta].into_iter().chain(storage).collect(), probe::PATIENCE)
    }
}
