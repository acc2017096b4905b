//! The storage node's daemon: start, stop, background flushing, cleaning of freed frames.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use parking_lot::Mutex;
use rdma_transport::{Access, ConnId, Connection, Fabric, RegionKey};

use super::alloc::{Allocator, class_for};
use super::flush::errno;
use super::index::Index;
use super::label::read_label;
use super::leases::LeaseTable;
use super::pool::Pool;
use super::{BLOCK, StorageError};
use crate::config::Config;
use crate::endpoint::Endpoint;
use crate::rpc::{Errno, Responder, Service};
use crate::store::{FjallStore, Store};
use crate::wire::{Frame, Hello, PoolSpace, Role, StorageReply};

pub(super) struct Space {
    pub(super) alloc: Allocator,
    pub(super) index: Index,
    /// Reservations by connection, returned when it ends.
    pub(super) reserved: HashMap<ConnId, u64>,
    /// Value of each slab's dirty counter when all of the slab was last stored.
    pub(super) stored: HashMap<u64, u64>,
}

impl Space {
    /// Uses up to `bytes` of a connection's reservation; returns how much it was.
    pub(super) fn use_reservation(&mut self, conn: ConnId, bytes: u64) -> u64 {
        let have = self.reserved.entry(conn).or_default();
        let used = bytes.min(*have);
        *have -= used;
        self.alloc.unreserve(used);
        used
    }

    pub(super) fn figures(&self) -> PoolSpace {
        PoolSpace {
            total: self.alloc.bytes(),
            free: self.alloc.free_bytes().saturating_sub(self.alloc.reserved()),
        }
    }

    pub(super) fn give_back(&mut self, frame: Frame) {
        if let Some(class) = class_for(frame.size) {
            self.alloc.free(frame.offset, class);
        }
    }
}

pub(super) enum Work {
    Flush(Vec<u64>, Responder),
    Reset(Responder),
    Status(Responder),
}

pub(super) struct Inner {
    pub(super) id: u16,
    pub(super) pool: Pool,
    pub(super) leases: LeaseTable,
    pub(super) space: Mutex<Space>,
    pub(super) store: Arc<dyn Store>,
    pub(super) pool_key: RegionKey,
    pub(super) dirty_key: RegionKey,
    pub(super) fabric: Mutex<Option<Arc<dyn Fabric>>>,
    pub(super) own: Mutex<Option<Arc<dyn Connection>>>,
    pub(super) work: Sender<Work>,
    pub(super) clean: Sender<Frame>,
    pub(super) cleaning: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) connections: AtomicU64,
    lives: Mutex<HashSet<u64>>,
    pub(super) stopping: AtomicBool,
}

/// A running storage node.
pub struct StorageNode {
    inner: Arc<Inner>,
    fabric: Arc<dyn Fabric>,
    threads: Vec<JoinHandle<()>>,
    stop: Sender<()>,
}

/// The role's service before the regions are registered (the fabric must exist first).
struct Front {
    inner: std::sync::OnceLock<Arc<Inner>>,
}

impl Service for Front {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        match hello.role {
            Role::Storage(_) | Role::Client(_) | Role::Tool | Role::Meta if self.inner.get().is_none() => {
                Err(crate::rpc::not_yet("the storage node is still starting"))
            }
            _ => Ok(()),
        }
    }

    fn connected(&self, hello: &Hello, _conn: &Arc<dyn Connection>) {
        if let Some(inner) = self.inner.get() {
            inner.connections.fetch_add(1, Ordering::Relaxed);
            inner.lives.lock().insert(hello.life);
        }
    }

    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        match self.inner.get() {
            Some(inner) => inner.request(hello, body, responder),
            None => responder.reply::<StorageReply>(&Err(Errno(libc::EAGAIN))),
        }
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, hello: Option<&Hello>) {
        if let Some(inner) = self.inner.get() {
            let mut space = inner.space.lock();
            if let Some(bytes) = space.reserved.remove(&conn.id()) {
                space.alloc.unreserve(bytes);
            }
            drop(space);
            if let Some(hello) = hello {
                inner.lives.lock().remove(&hello.life);
                inner.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

impl StorageNode {
    /// Starts storage node `id` of the configuration.
    ///
    /// # Errors
    /// Not formatted, not enough memory, address taken…
    pub fn start(config: &Config, id: u16, key: Vec<u8>) -> Result<Self, StorageError> {
        let section = config
            .storage
            .iter()
            .find(|s| s.id == id)
            .ok_or_else(|| StorageError::Format {
                path: config.key_file.clone(),
                detail: format!("the configuration has no storage node {id}"),
            })?;
        let label = read_label(&section.dir, &config.cluster, id)?;
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(&section.dir.join("index"))?);
        let memory = section.memory_dir.join(format!("distfuse-{label}-{id}.pool"));
        let bytes = section.pool.0 / BLOCK * BLOCK;
        let pool = Pool::open(&memory, &section.dir.join("pool.data"), bytes)?;
        let mut alloc = Allocator::new(bytes);
        let inherited = pool.inherited;
        let index = Index::load(Arc::clone(&store), |ino, block, entry| {
            let whole = inherited || entry.stored;
            let class = class_for(entry.frame.size);
            let good = whole && class.is_some_and(|c| alloc.occupy(entry.frame.offset, c));
            if whole && !good {
                tracing::error!("block {block} of inode {ino:#x} has an impossible frame and is dropped");
            }
            good
        })?;
        if !inherited {
            for (_, _, entry) in index.all() {
                pool.load(entry.frame)?;
            }
        }

        let front = Arc::new(Front {
            inner: std::sync::OnceLock::new(),
        });
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let listen = section.listen.clone();
        let fabric = Endpoint::open(config, Role::Storage(id), listen, key, service)?.fabric;
        let leases = LeaseTable::open(
            section.memory_dir.join(format!("distfuse-{label}-{id}.leases")),
            config.lease.record_bytes,
        )?;
        leases.adopt(fabric.as_ref())?;
        let pool_key = fabric.register(&pool.mem, Access::ALL)?;
        let dirty_key = fabric.register(&pool.dirty, Access::ALL)?;
        let (work, work_in) = unbounded();
        let (clean, clean_in) = unbounded();
        let (stop, stop_in) = unbounded();
        if !inherited {
            // Frames that were not stored may have left bytes of an earlier life in the backing file; new
            // memory is zero, so nothing has to be cleaned.
            tracing::info!("storage node {id}: contents loaded from the backing file");
        } else {
            clean_unused(&pool, &index);
        }
        let inner = Arc::new(Inner {
            id,
            pool,
            leases,
            space: Mutex::new(Space {
                alloc,
                index,
                reserved: HashMap::new(),
                stored: HashMap::new(),
            }),
            store,
            pool_key,
            dirty_key,
            fabric: Mutex::new(Some(Arc::clone(&fabric))),
            own: Mutex::new(None),
            work,
            clean,
            cleaning: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            lives: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        // The node reaches its own lock words through the fabric, like everybody.
        let set = front.inner.set(Arc::clone(&inner));
        debug_assert!(set.is_ok());
        *inner.own.lock() = Some(fabric.connect(&fabric.local_addr())?);
        let threads = vec![
            spawn("storage-work", {
                let i = Arc::clone(&inner);
                move || i.work_loop(&work_in)
            })?,
            spawn("storage-clean", {
                let i = Arc::clone(&inner);
                move || i.clean_loop(&clean_in)
            })?,
            spawn("storage-flush", {
                let i = Arc::clone(&inner);
                move || i.flush_loop(&stop_in)
            })?,
        ];
        Ok(Self {
            inner,
            fabric,
            threads,
            stop,
        })
    }

    /// The address it listens on.
    #[must_use]
    pub fn addr(&self) -> String {
        self.fabric.local_addr()
    }

    /// Stores everything and stops. With `forget`, the memory is released as well: the next start reads
    /// the backing file.
    ///
    /// # Errors
    /// Storing failed; the memory is then kept, so that nothing is lost.
    pub fn stop(mut self, forget: bool) -> Result<(), StorageError> {
        self.inner.stopping.store(true, Ordering::Release);
        let _ = self.stop.send(());
        let mut result = self.inner.flush_all();
        self.fabric.shutdown();
        self.inner.own.lock().take();
        self.inner.fabric.lock().take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        result = result.and_then(|()| self.inner.flush_all());
        if forget && result.is_ok() {
            self.inner.pool.remove_memory();
            self.inner.leases.remove_files();
        }
        result
    }
}

/// After the death of the process, frames it had freed but not yet cleaned may hold old bytes.
fn clean_unused(pool: &Pool, index: &Index) {
    let mut used: Vec<(u64, u64)> = index
        .all()
        .map(|(_, _, e)| (e.frame.offset, e.frame.offset + u64::from(e.frame.size)))
        .collect();
    used.sort_unstable();
    let mut from = 0;
    for (start, end) in used
        .into_iter()
        .chain([(pool.mem.len() as u64, pool.mem.len() as u64)])
    {
        if start > from
            && let Err(error) = pool.mem.zero(from as usize, (start - from) as usize)
        {
            tracing::error!("cannot clean the pool: {error}");
        }
        from = from.max(end);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StorageError> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| StorageError::Io {
            what: "cannot start a thread in",
            path: name.into(),
            error,
        })
}

impl Inner {
    fn clean_loop(&self, frames: &Receiver<Frame>) {
        while !self.stopping.load(Ordering::Acquire) {
            let frame = match frames.recv_timeout(Duration::from_secs(1)) {
                Ok(frame) => frame,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if let Err(error) = self.pool.mem.zero(frame.offset as usize, frame.size as usize) {
                tracing::error!("a freed frame cannot be cleaned and is not used again: {error}");
            } else {
                self.space.lock().give_back(frame);
            }
            self.cleaning.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn work_loop(&self, work: &Receiver<Work>) {
        while !self.stopping.load(Ordering::Acquire) {
            let first = match work.recv_timeout(Duration::from_secs(1)) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            // One pass and one sync for all flushes that have come meanwhile (group commit).
            let (mut inos, mut flushes) = (Vec::new(), Vec::new());
            for work in std::iter::once(first).chain(work.try_iter()) {
                match work {
                    Work::Flush(more, responder) => {
                        inos.extend(more);
                        flushes.push(responder);
                    }
                    Work::Reset(responder) => {
                        responder.reply(&self.reset_leases().map_err(|e| errno(&e)));
                    }
                    Work::Status(responder) => {
                        responder.reply(&self.status().map(StorageReply::Status).map_err(|e| errno(&e)));
                    }
                }
            }
            if !flushes.is_empty() {
                let result = self
                    .flush(&inos)
                    .map(|()| StorageReply::Done)
                    .map_err(|e| errno(&e));
                for responder in flushes {
                    responder.reply(&result);
                }
            }
        }
    }
}
