//! The storage node's daemon: start and stop.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{Access, Fabric};
use rt::channel::{Sender, unbounded};
use rt::sync::Mutex;
use rt::thread::JoinHandle;

use super::blocks::Blocks;
use super::disk::{Disk, FileDisk};
use super::error::StorageError;
use super::fence::Fence;
use super::label::{self, Label};
use super::leases::LeaseTable;
use super::load::Parts;
use super::requests::{Front, Requests};
use super::status::Status;
use super::storing::Storing;
use super::words::Words;
use super::work::{self, Worker};
use fsd_node::config::{Config, FabricChoice, Size, StorageConfig};
use fsd_node::endpoint::{Endpoint, Network, Place};
use fsd_node::memory::{Claim, Note};
use fsd_node::store::Store;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Service;
use fsd_proto::wire::Role;

/// The kind of memory files that say who may still be changing the others.
const SEATS: &str = "seats";

/// A running storage node.
pub struct StorageNode {
    blocks: Arc<Blocks>,
    words: Arc<Words>,
    fabric: Arc<dyn Fabric>,
    threads: Vec<JoinHandle<()>>,
    /// One for each thread that sleeps.
    stop: [Sender<()>; 4],
    /// How the names of the seats of connections begin.
    seats: PathBuf,
    claim: Claim,
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
        let front = Arc::new(Front::default());
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let seats = memory_file(section, &note(section, &label), SEATS);
        let place = Place {
            listen: section.listen.clone(),
            keep: Some(seats.clone()),
        };
        let role = Role::Storage(id);
        let fabric = Endpoint::open_in(network, config, role, place, key, service)?.fabric;
        let table = LeaseTable::open(
            memory_file(section, &note(section, &label), "leases"),
            config.lease.record_bytes,
            Arc::clone(&blocks.media.store),
        )?;
        table.adopt(fabric.as_ref())?;
        let keys = [
            fabric.register(&blocks.media.pool.mem, Access::ALL)?,
            fabric.register(&blocks.media.pool.dirty, Access::ALL)?,
        ];
        let (work, work_in) = unbounded();
        let (funerals, funerals_in) = unbounded();
        let (stop_work, work_end) = unbounded();
        let (stop_dead, dead_end) = unbounded();
        let (stop_flush, flush_end) = unbounded();
        let (stop_scrub, scrub_end) = unbounded();
        let blocks = Arc::new(blocks);
        let words = Arc::new(Words {
            id,
            table,
            fence: Fence::load(Arc::clone(&blocks.media.store), fabric.left_behind())?,
            fabric: Mutex::new(Some(Arc::clone(&fabric))),
            own: Mutex::new(None),
        });
        let storing = Arc::new(Storing {
            blocks: Arc::clone(&blocks),
            failing: Mutex::default(),
        });
        let status = Status {
            storing: Arc::clone(&storing),
            words: Arc::clone(&words),
            counts: Arc::default(),
        };
        let set = front.0.set(Requests {
            uuid: label.uuid,
            keys,
            blocks: Arc::clone(&blocks),
            words: Arc::clone(&words),
            counts: Arc::clone(&status.counts),
            work,
            funerals,
        });
        debug_assert!(set.is_ok());
        *words.own.lock() = Some(fabric.connect(&fabric.local_addr())?);
        let worker = Worker {
            storing: Arc::clone(&storing),
            words: Arc::clone(&words),
            status,
        };
        let (cleaner, scrubber) = (Arc::clone(&blocks.cleaner), Arc::clone(&blocks));
        let buried = Arc::clone(&words);
        let (rate, pause) = (section.scrub.0, Duration::from_secs(section.scrub_pause_s));
        let threads = vec![
            spawn("storage-work", move || worker.run(&work_in, &work_end))?,
            spawn("storage-dead", move || {
                work::bury(&buried, &funerals_in, &dead_end)
            })?,
            spawn("storage-clean", move || cleaner.run())?,
            spawn("storage-flush", move || storing.run(&flush_end))?,
            spawn("storage-scrub", move || {
                scrubber.scrubber.run(rate, pause, &scrub_end);
            })?,
        ];
        Ok(Self {
            blocks,
            words,
            fabric,
            threads,
            stop: [stop_work, stop_dead, stop_flush, stop_scrub],
            seats,
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
        self.blocks.cleaner.stop();
        for stop in &self.stop {
            let _ = stop.send(());
        }
        let mut result = self.blocks.flusher.flush_all();
        self.fabric.shutdown();
        self.words.own.lock().take();
        self.words.fabric.lock().take();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        result = result.and_then(|()| self.blocks.flusher.flush_all());
        if forget && result.is_ok() {
            self.blocks.media.pool.remove_memory();
            self.words.table.remove_files();
            // Who is still executing something does so on memory that is nobody's by now.
            if let Err(error) = fsd_node::files::remove_numbered(&self.seats) {
                tracing::warn!("cannot remove {}.*: {error}", self.seats.display());
            }
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
        label.renew(dir)?;
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
