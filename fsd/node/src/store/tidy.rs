//! Giving back what a store took for what has been removed since.
//!
//! The engine keeps removed keys until it happens to merge the tables that have them, and its journal until that is 64 MB
//! long. Where much was removed and nothing happens any more, neither would ever come: then the tables are merged, and a new
//! journal is begun, after which the engine removes the old one by itself.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fjall::Keyspace;
use rt::sync::Mutex;
use rt::thread::JoinHandle;
use rt::time::Instant;

use super::engine::Engine;
use super::kinds::StoreError;
use super::slot::EngineSlot;
use super::tail;
use crate::files;

/// Fewer removed keys are not worth it …
const REMOVED: u64 = 10_000;
/// … nor is less than a part of what is there.
const SHARE: u64 = 4;
/// Longest wait for the engine to write its memory to tables, while others use it, and while nobody can.
const PATIENCE: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_secs(2);
/// A key that is written so that the engine looks which journals it still needs.
const LOOK: &[u8] = b"~";

/// What is to be known for that.
#[derive(Default)]
pub struct Upkeep {
    removed: AtomicU64,
    applied: AtomicU64,
    /// What `applied` was when somebody last looked.
    seen: AtomicU64,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Upkeep {
    /// A batch has been applied that removed so many keys.
    pub fn applied(&self, removed: u64) {
        self.applied.fetch_add(1, Ordering::Relaxed);
        self.removed.fetch_add(removed, Ordering::Relaxed);
    }

    /// Has much been removed, and nothing happened since this was last asked?
    fn is_due(&self) -> bool {
        let applied = self.applied.load(Ordering::Relaxed);
        self.seen.swap(applied, Ordering::Relaxed) == applied
            && self.removed.load(Ordering::Relaxed) >= REMOVED
    }

    /// Waits for the thread. A process that ends does not: it may end at any time.
    #[cfg(test)]
    pub fn join(&self) {
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    /// Gives back what is not needed, on a thread of its own, if it is time for that.
    pub fn tidy(self: &Arc<Self>, engine: &Arc<EngineSlot>) {
        let mut thread = self.thread.lock();
        if thread.as_ref().is_some_and(|t| !t.is_finished()) || !self.is_due() {
            return;
        }
        let (me, engine) = (Arc::clone(self), Arc::clone(engine));
        let body = move || match me.give_back(&engine) {
            Ok(()) => {}
            Err(error) => tracing::warn!("{error}"),
        };
        match rt::thread::Builder::new().name("store-tidy".into()).spawn(body) {
            Ok(started) => *thread = Some(started),
            Err(error) => tracing::debug!("no thread to tidy up: {error}"),
        }
    }

    fn give_back(&self, slot: &EngineSlot) -> Result<(), StoreError> {
        let removed = self.removed.load(Ordering::Relaxed);
        let merged = slot.with(|engine| {
            // Merging writes all that is there once more.
            let (entries, bytes) = (engine.keys.approximate_len() as u64, engine.keys.disk_space());
            let room = slot.disk().is_ok_and(|(_, free)| free / 2 > bytes);
            if !room || removed * SHARE < entries || !write_out(&engine.keys, PATIENCE)? {
                return Ok(false);
            }
            engine.keys.major_compact().map(|()| true)
        })?;
        if merged {
            // Else it is tried again: a busy disk may not have let it.
            if begin_journal(slot)? {
                self.removed.fetch_sub(removed, Ordering::Relaxed);
            }
            trim_memory();
        }
        Ok(())
    }
}

/// Has the engine write its memory to tables; false if that takes too long, or the disk does not let it.
fn write_out(keys: &Keyspace, patience: Duration) -> Result<bool, fjall::Error> {
    keys.rotate_memtable()?;
    let start = Instant::now();
    while keys.sealed_memtable_count() > 0 {
        if start.elapsed() > patience {
            return Ok(false);
        }
        rt::thread::sleep(Duration::from_millis(5));
    }
    Ok(true)
}

/// Begins a new journal. Nobody uses the engine meanwhile; the old journal stays until the engine finds that its tables
/// have all of it; whether it had the time to.
fn begin_journal(slot: &EngineSlot) -> Result<bool, StoreError> {
    let mut gone = false;
    let ready = |engine: &Engine| write_out(&engine.keys, SHORT).unwrap_or(false);
    let begin = || {
        let begun = tail::next_journal(slot.path())
            .and_then(|path| path.map_or(Ok(()), |path| File::create_new(path)?.sync_all()))
            .and_then(|()| files::sync_dir(slot.path()));
        if let Err(error) = begun {
            tracing::debug!("no new journal in {}: {error}", slot.path().display());
        }
    };
    let look = |engine: &Engine| {
        let looked = engine.keys.insert(LOOK, []);
        match looked.and_then(|()| write_out(&engine.keys, SHORT)) {
            Ok(written) => gone = written,
            Err(error) => tracing::debug!("{error}"),
        }
    };
    slot.reopen(ready, begin, look)?;
    Ok(gone)
}

/// Memory that was freed goes back to the system; the allocator keeps it for later.
fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no memory from anybody who uses it, and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use super::*;
    use crate::store::{Batch, FjallStore, Store};

    fn bytes(dir: &Path) -> u64 {
        let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
        entries
            .map(|e| match e.file_type().unwrap().is_dir() {
                true => bytes(&e.path()),
                false => e.metadata().unwrap().blocks() * 512,
            })
            .sum()
    }

    fn key(n: u64) -> Vec<u8> {
        format!("k{n:06}").into_bytes()
    }

    #[test]
    fn what_was_removed_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let store = FjallStore::open(dir.path()).unwrap();
        for part in 0..120u64 {
            let mut batch = Batch::default();
            for n in part * 100..(part + 1) * 100 {
                batch.put(key(n), [n.to_le_bytes(); 30].concat());
            }
            store.apply(batch).unwrap();
        }
        for n in (0..12_000).filter(|n| n % 1000 != 7) {
            let mut batch = Batch::default();
            batch.delete(key(n));
            store.apply(batch).unwrap();
        }
        store.sync().unwrap();
        let full = bytes(dir.path());
        let twelve = |store: &FjallStore| {
            let left = store.scan(b"k", b"l", 100).unwrap();
            assert_eq!(left.len(), 12);
            for (n, (k, v)) in (0u64..).map(|n| n * 1000 + 7).zip(left) {
                assert_eq!((k, v), (key(n), [n.to_le_bytes(); 30].concat()));
            }
        };
        // Something has happened since; then nothing.
        for _ in 0..20 {
            store.tidy();
            store.tidy();
            store.upkeep.join();
            // A busy disk may take longer than nobody may use the engine: then it is tried again.
            if store.upkeep.removed.load(Ordering::Relaxed) == 0 {
                break;
            }
        }
        assert!(bytes(dir.path()) < full / 10, "{} of {full}", bytes(dir.path()));
        twelve(&store);
        // It goes on, and does it once.
        store.tidy();
        assert!(store.upkeep.thread.lock().is_none());
        let mut batch = Batch::default();
        batch.put(b"new".to_vec(), vec![1]);
        store.apply(batch).unwrap();
        drop(store);
        let store = FjallStore::open_existing(dir.path()).unwrap();
        twelve(&store);
        assert_eq!(store.get(b"new").unwrap(), Some(vec![1]));
        // The process dies where the new journal is there and the old one is, too.
        drop(store);
        let next = tail::next_journal(dir.path()).unwrap().unwrap();
        File::create_new(next).unwrap();
        let store = FjallStore::open_existing(dir.path()).unwrap();
        twelve(&store);
        assert_eq!(store.get(b"new").unwrap(), Some(vec![1]));
    }
}
