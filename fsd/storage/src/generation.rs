//! The generation of a store: how often its index was made durable. It tells an older copy of the store, put back after a
//! disk was replaced for example, from the store as it was last known.
//!
//! Who knows it: the store itself, with the index; a *witness* beside the pool's memory, because memory that is newer than
//! the index holds other blocks than that says; and the metadata server, which asks every few seconds. They are told only
//! what is durable, so no power cut makes a store older than what is known of it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rt::sync::Mutex;

use super::error::StorageError;
use fsd_node::files;
use fsd_node::store::{Batch, Store};

/// Key of the generation in the store.
const GENERATION: &[u8] = b"g";
/// Key of the last place of the metadata server's order that this node was told.
const PLACE: &[u8] = b"p";

/// The generation of one store.
pub struct Generation {
    store: Arc<dyn Store>,
    /// Written to the store, though perhaps not durable.
    written: Mutex<u64>,
    durable: AtomicU64,
    witness: File,
}

fn number(store: &dyn Store, key: &[u8]) -> Result<u64, StorageError> {
    let bytes = store.get(key)?;
    Ok(bytes
        .and_then(|b| Some(u64::from_le_bytes(b.try_into().ok()?)))
        .unwrap_or(0))
}

fn witness_path(memory: &Path) -> PathBuf {
    memory.with_extension("generation")
}

/// What the memory of this boot of the machine says, if there is any.
fn said(memory: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(witness_path(memory)).ok()?;
    let (generation, boot) = text.trim().split_once(' ')?;
    (boot == files::boot()).then(|| generation.parse().ok())?
}

/// Is the store at least as new as the memory that the last life of its node has left?
///
/// # Errors
/// It is an older copy; the store's.
pub fn check(store: &dyn Store, memory: &Path, dir: &Path) -> Result<(), StorageError> {
    let own = number(store, GENERATION)?;
    match said(memory) {
        Some(newer) if newer > own => Err(StorageError::Format {
            path: dir.to_owned(),
            detail: format!(
                "is an older copy of this store (generation {own}, and it was at {newer} on this host): put the newest one back, \
                 or take it as it is with fsd storage --accept-older, once, and fsd meta --accept-older (see docs/operations.md)"
            ),
        }),
        _ => Ok(()),
    }
}

impl Generation {
    /// Goes on where the store is.
    ///
    /// # Errors
    /// The store's, or the memory file system refuses.
    pub fn open(store: Arc<dyn Store>, memory: &Path) -> Result<Self, StorageError> {
        let now = number(store.as_ref(), GENERATION)?;
        let path = witness_path(memory);
        let io = |error| StorageError::Io {
            what: "cannot write",
            path: path.clone(),
            error,
        };
        let witness = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(io)?;
        let generation = Self {
            store,
            written: Mutex::new(now),
            // What an earlier life has written is made durable before anybody is told.
            durable: AtomicU64::new(0),
            witness,
        };
        generation.store.sync()?;
        generation.durable.store(now, Ordering::Release);
        generation.say(now);
        Ok(generation)
    }

    fn say(&self, generation: u64) {
        let text = format!("{generation:020} {}\n", files::boot());
        if let Err(error) = self.witness.write_all_at(text.as_bytes(), 0) {
            // An older copy may then be taken for right, if the metadata server does not know better.
            tracing::warn!("the generation of the store cannot be noted in memory: {error}");
        }
    }

    /// Makes the index durable under a new generation.
    ///
    /// # Errors
    /// The store's.
    pub fn sync(&self) -> Result<(), StorageError> {
        let now = {
            let mut written = self.written.lock();
            let now = *written + 1;
            let mut batch = Batch::default();
            batch.put(GENERATION.to_vec(), now.to_le_bytes().to_vec());
            self.store.apply(batch)?;
            *written = now;
            self.say(now);
            now
        };
        self.store.sync()?;
        self.durable.fetch_max(now, Ordering::AcqRel);
        Ok(())
    }

    /// The generation that no power cut undoes.
    #[must_use]
    pub fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// The last place of the metadata server's order that was told.
    ///
    /// # Errors
    /// The store's.
    pub fn place(&self) -> Result<u64, StorageError> {
        number(self.store.as_ref(), PLACE)
    }

    /// Notes a place; it becomes durable with the index. An earlier one only if that is to be `accepted`.
    ///
    /// # Errors
    /// The store's.
    pub fn note_place(&self, place: u64, accepted: bool) -> Result<(), StorageError> {
        let before = self.place()?;
        if place > before || (accepted && place < before) {
            let mut batch = Batch::default();
            batch.put(PLACE.to_vec(), place.to_le_bytes().to_vec());
            self.store.apply(batch)?;
        }
        Ok(())
    }

    /// Removes what memory says.
    pub fn forget(memory: &Path) -> std::io::Result<()> {
        match std::fs::remove_file(witness_path(memory)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::fake_disk::FakeStore;

    #[test]
    fn an_older_copy_is_told_by_the_memory_of_this_boot() {
        let dir = tempfile::tempdir().unwrap();
        let memory = dir.path().join("x.pool");
        let store: Arc<dyn Store> = Arc::new(FakeStore::default());
        let own = Path::new("/store");
        check(store.as_ref(), &memory, own).unwrap();
        let generation = Generation::open(Arc::clone(&store), &memory).unwrap();
        assert_eq!(generation.durable(), 0);
        generation.sync().unwrap();
        generation.sync().unwrap();
        assert_eq!(generation.durable(), 2);
        drop(generation);
        // The process died.
        check(store.as_ref(), &memory, own).unwrap();
        assert_eq!(
            Generation::open(Arc::clone(&store), &memory).unwrap().durable(),
            2
        );
        // Another copy, which is older.
        let old: Arc<dyn Store> = Arc::new(FakeStore::default());
        let told = check(old.as_ref(), &memory, own).unwrap_err().to_string();
        assert!(
            told.contains("older copy") && told.contains("--accept-older"),
            "{told}"
        );
        // After a restart of the machine memory says nothing.
        let text = std::fs::read_to_string(witness_path(&memory)).unwrap();
        std::fs::write(witness_path(&memory), text.replace(&files::boot(), "other")).unwrap();
        check(old.as_ref(), &memory, own).unwrap();
    }

    #[test]
    fn places_go_back_only_when_that_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(FakeStore::default());
        let generation = Generation::open(store, &dir.path().join("x.pool")).unwrap();
        let noted = |place, accepted| {
            generation.note_place(place, accepted).unwrap();
            generation.place().unwrap()
        };
        assert_eq!(noted(7, false), 7);
        assert_eq!(noted(5, false), 7);
        assert_eq!(noted(5, true), 5);
        assert_eq!(noted(6, true), 6);
    }
}
