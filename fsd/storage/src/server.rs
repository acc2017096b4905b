//! The storage node's daemon: start, stop, background flushing, cleaning of freed frames.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rdma_transport::{Access, Connection, Fabric, RegionKey};
use rt::channel::{Receiver, RecvTimeoutError, Sender, unbounded};
use rt::sync::Mutex;
use rt::thread::JoinHandle;

use super::blocks::Blocks;
use super::cut::{End, cut};
use super::disk::{Disk, FileDisk};
use super::error::{StorageError, errno};
use super::fence::Fence;
use super::label::{self, Label};
use super::leases::LeaseTable;
use super::load::Parts;
use fsd_node::config::{Config, FabricChoice, Size, StorageConfig};
use fsd_node::endpoint::{Endpoint, Network};
use fsd_node::memory::{Claim, Note};
use fsd_node::store::Store;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::{Errno, Responder, Service};
use fsd_proto::wire::{Hello, Role, StorageReply};

/// How often the background flusher looks for unstored data.
const FLUSH_EVERY: Duration = Duration::from_secs(2);

pub(super) enum Work {
    Flush(Vec<u64>, Responder),
    Reset(Responder),
    Status(Responder),
    Cut(Vec<End>, Responder),
}

pub(super) struct Inner {
    pub(super) id: u16,
    /// Random number of the store, as in its label.
    pub(super) uuid: String,
    pub(super) blocks: Blocks,
    pub(super) leases: LeaseTable,
    pub(super) pool_key: RegionKey,
    pub(super) dirty_key: RegionKey,
    pub(super) fabric: Mutex<Option<Arc<dyn Fabric>>>,
    pub(super) own: Mutex<Option<Arc<dyn Connection>>>,
    pub(super) work: Sender<Work>,
    pub(super) requests: AtomicU64,
    pub(super) connections: AtomicU64,
    pub(super) fence: Fence,
    /// Why what was to be stored last could not be.
    pub(super) failing: Mutex<Option<String>>,
    pub(super) stopping: AtomicBool,
}

/// A running storage node.
pub struct StorageNode {
    inner: Arc<Inner>,
    fabric: Arc<dyn Fabric>,
    threads: Vec<JoinHandle<()>>,
    /// One for each thread that sleeps.
    stop: [Sender<()>; 2],
    claim: Claim,
}

/// The role's service before the regions are registered (the fabric must exist first).
struct Front {
    inner: std::sync::OnceLock<Arc<Inner>>,
}

impl Service for Front {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        if let Some(inner) = self.inner.get() {
            inner.fence.admit(hello.life)?;
        }
        match hello.role {
            Role::Storage(_) | Role::Client(_) | Role::Tool | Role::Meta if self.inner.get().is_none() => {
                Err(fsd_proto::rpc::not_yet("the storage node is still starting"))
            }
            _ => Ok(()),
        }
    }

    fn connected(&self, hello: &Hello, conn: &Arc<dyn Connection>) {
        if let Some(inner) = self.inner.get() {
            inner.connections.fetch_add(1, Ordering::Relaxed);
            if let Role::Client(_) = hello.role {
                inner.fence.connected(hello.life, conn);
            }
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
            inner.blocks.frames.disconnected(conn.id());
            inner.fence.disconnected(conn.id());
            if hello.is_some() {
                inner.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

impl StorageNode {
    /// Starts storage node `id` of the configuration. With `accept_older`, a store that is older than memory knows is taken
    /// as it is.
    ///
    /// # Errors
    /// Not formatted, not enough memory, address taken…
    pub fn start(config: &Config, id: u16, key: Vec<u8>, accept_older: bool) -> Result<Self, StorageError> {
        let section = config
            .storage
            .iter()
            .find(|s| s.id == id)
            .ok_or_else(|| StorageError::Format {
                path: config.key_file.clone(),
                detail: format!("the configuration has no storage node {id}"),
            })?;
        let base = Base::of_directory(config, section)?;
        Self::start_on(base, config, section, key, accept_older)
    }

    /// As [`StorageNode::start`], on a disk and in a network of the caller's choice.
    ///
    /// # Errors
    /// As [`StorageNode::start`].
    pub fn start_on(
        base: Base<'_>,
        config: &Config,
        section: &StorageConfig,
        key: Vec<u8>,
        accept_older: bool,
    ) -> Result<Self, StorageError> {
        let (id, network) = (section.id, base.network);
        let (label, claim, blocks) = open_blocks(base, config, section, accept_older)?;
        let front = Arc::new(Front {
            inner: std::sync::OnceLock::new(),
        });
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let listen = section.listen.clone();
        let role = Role::Storage(id);
        let fabric = Endpoint::open_in(network, config, role, listen, key, service)?.fabric;
        let leases = LeaseTable::open(
            memory_file(section, &note(section, &label), "leases"),
            config.lease.record_bytes,
            Arc::clone(&blocks.media.store),
        )?;
        leases.adopt(fabric.as_ref())?;
        let pool_key = fabric.register(&blocks.media.pool.mem, Access::ALL)?;
        let dirty_key = fabric.register(&blocks.media.pool.dirty, Access::ALL)?;
        let (work, work_in) = unbounded();
        let (stop_flush, flush_in) = unbounded();
        let (stop_scrub, scrub_in) = unbounded();
        let inner = Arc::new(Inner {
            id,
            uuid: label.uuid,
            blocks,
            leases,
            pool_key,
            dirty_key,
            fabric: Mutex::new(Some(Arc::clone(&fabric))),
            own: Mutex::new(None),
            work,
            requests: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            fence: Fence::default(),
            failing: Mutex::default(),
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
                move || i.blocks.cleaner.run(&i.stopping)
            })?,
            spawn("storage-flush", {
                let i = Arc::clone(&inner);
                move || i.flush_loop(&flush_in)
            })?,
            spawn("storage-scrub", {
                let (i, rate) = (Arc::clone(&inner), section.scrub.0);
                let pause = Duration::from_secs(section.scrub_pause_s);
                move || i.blocks.scrubber.run(rate, pause, &scrub_in)
            })?,
        ];
        Ok(Self {
            inner,
            fabric,
            threads,
            stop: [stop_flush, stop_scrub],
            claim,
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
        for stop in &self.stop {
            let _ = stop.send(());
        }
        let mut result = self.inner.blocks.flusher.flush_all();
        self.fabric.shutdown();
        self.inner.own.lock().take();
        self.inner.fabric.lock().take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        result = result.and_then(|()| self.inner.blocks.flusher.flush_all());
        if forget && result.is_ok() {
            self.inner.blocks.media.pool.remove_memory();
            self.inner.leases.remove_files();
            self.claim.remove();
        }
        result
    }
}

/// Says whose the memory of a node is.
fn note(section: &StorageConfig, label: &Label) -> Note {
    Note {
        cluster: label.cluster.clone(),
        storage: Some(section.id),
        store: section.dir.clone(),
        uuid: label.uuid.clone(),
    }
}

/// A file of a node in its memory file system.
fn memory_file(section: &StorageConfig, note: &Note, kind: &str) -> PathBuf {
    section.memory_dir.join(format!("{}.{kind}", note.stem()))
}

/// What a storage node stands on.
pub struct Base<'a> {
    /// Whose the store is.
    pub label: Label,
    /// Where blocks are kept …
    pub disk: Arc<dyn Disk>,
    /// … by which name.
    pub disk_path: PathBuf,
    /// Where the index is kept.
    pub store: Arc<dyn Store>,
    /// Where its endpoint is made.
    pub network: &'a dyn Network,
    /// A rule to leave out; tests only.
    #[cfg(any(test, feature = "flaws"))]
    pub flaw: Option<super::blocks::Flaw>,
}

impl<'a> Base<'a> {
    /// Checks the label of a directory against the configuration, and opens what the directory has.
    fn of_directory(config: &'a Config, section: &StorageConfig) -> Result<Self, StorageError> {
        let (id, dir) = (section.id, &section.dir);
        let bytes = section.pool.0 / BLOCK * BLOCK;
        let mut label = Label::check(dir, &config.cluster, id, bytes, config.lease.record_bytes)?;
        label::make_private(dir)?;
        let disk_path = dir.join(label::BACKING);
        if !disk_path.exists() {
            return Err(StorageError::Format {
                path: disk_path,
                detail: "the backing file is missing: put it back where it was".into(),
            });
        }
        let store = label::open_index(dir, &mut label)?;
        let disk = FileDisk::open(&disk_path).map_err(|error| StorageError::Io {
            what: "cannot open the backing file",
            path: disk_path.clone(),
            error,
        })?;
        if label.pool < bytes {
            // Before anything is in the part that is new.
            tracing::info!(
                "storage node {id}: the pool grows from {} to {}",
                Size(label.pool),
                Size(bytes)
            );
            label.pool = bytes;
            label.write(dir)?;
        }
        Ok(Self {
            label,
            disk: Arc::new(disk),
            disk_path,
            store,
            network: config,
            #[cfg(any(test, feature = "flaws"))]
            flaw: None,
        })
    }
}

/// Brings the pool's memory up.
fn open_blocks(
    base: Base<'_>,
    config: &Config,
    section: &StorageConfig,
    accept_older: bool,
) -> Result<(Label, Claim, Blocks), StorageError> {
    let (id, label) = (section.id, base.label);
    let bytes = section.pool.0 / BLOCK * BLOCK;
    let note = note(section, &label);
    let claim = Claim::take(&section.memory_dir, &note).map_err(|error| StorageError::Io {
        what: "cannot keep memory in",
        path: section.memory_dir.clone(),
        error,
    })?;
    let pinned = config.fabric == FabricChoice::Verbs;
    let blocks = Blocks::open(Parts {
        memory: memory_file(section, &note, "pool"),
        uuid: label.uuid.clone(),
        bytes,
        disk: base.disk,
        disk_path: base.disk_path,
        store: base.store,
        pinned,
        accept_older,
        #[cfg(any(test, feature = "flaws"))]
        flaw: base.flaw,
    })?;
    let free = Size(blocks.media.pool.mem.file_system_free()? >> 20 << 20);
    tracing::info!(
        "storage node {id}: {}; the pool takes up to {} of {} ({}), which has {free} left",
        if blocks.media.pool.inherited {
            "contents found in memory"
        } else {
            "contents loaded from the backing file"
        },
        Size(bytes),
        section.memory_dir.display(),
        if pinned { "all of it now" } else { "as data come" }
    );
    let rest = blocks.media.space.lock().alloc.cold_bytes();
    if rest > free.0 {
        tracing::warn!(
            "storage node {id}: {} has less room than the pool may need: beyond that, writing fails with \"no space left\"",
            section.memory_dir.display()
        );
    }
    Ok((label, claim, blocks))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, StorageError> {
    rt::thread::Builder::new()
        .name(name.into())
        .spawn(body)
        .map_err(|error| StorageError::Io {
            what: "cannot start a thread in",
            path: name.into(),
            error,
        })
}

impl Inner {
    /// Bounds how long data that nobody fsyncs stays in memory only.
    fn flush_loop(&self, stop: &Receiver<()>) {
        let mut seen = self.blocks.media.dirty_sum();
        let mut pending = true;
        while let Err(RecvTimeoutError::Timeout) = stop.recv_timeout(FLUSH_EVERY) {
            let now = self.blocks.media.dirty_sum();
            let moved = now != seen;
            seen = now;
            if moved || pending || self.blocks.flusher.is_unsettled() {
                pending = false;
                if let Err(error) = self.noted(self.blocks.flusher.flush_all()) {
                    pending = true;
                    tracing::error!("background flush: {error}");
                }
            }
            self.blocks.cleaner.give_surplus_back();
            self.blocks.media.store.tidy();
        }
    }

    /// Remembers why something could not be stored, until something can be again.
    fn noted(&self, result: Result<(), StorageError>) -> Result<(), StorageError> {
        *self.failing.lock() = result.as_ref().err().map(ToString::to_string);
        result
    }

    fn reset_leases(&self) -> Result<StorageReply, StorageError> {
        let own = self.own.lock().clone();
        let mounts = self.fence.close();
        if mounts > 0 {
            tracing::warn!(
                "storage node {}: {mounts} mounts that are taken for dead are still connected: they are not served any more",
                self.id
            );
        }
        if let Some(own) = own {
            let cleared = self.leases.reset(own.as_ref())?;
            tracing::info!("storage node {}: {cleared} lease records reset", self.id);
        }
        Ok(StorageReply::Done)
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
                    Work::Cut(ends, responder) => {
                        let freed = cut(&self.blocks, &ends).map(StorageReply::Freed);
                        responder.reply(&freed.map_err(|e| errno(&e)));
                    }
                    Work::Status(responder) => {
                        responder.reply(&self.status().map(StorageReply::Status).map_err(|e| errno(&e)));
                    }
                }
            }
            if !flushes.is_empty() {
                let result = self
                    .noted(self.blocks.flusher.flush(&inos))
                    .map(|()| StorageReply::Done)
                    .map_err(|e| errno(&e));
                for responder in flushes {
                    responder.reply(&result);
                }
            }
        }
    }
}
