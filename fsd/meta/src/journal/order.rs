//! The order of transactions, and up to which of them a crash of the machine undoes nothing.
//!
//! Every transaction of a mount gets the next place in the order of all and stores it with itself. Mounts keep what they
//! were answered until it is durable, and tell it again to a server whose host has crashed (`recovery`). Whether anything can
//! have been lost, a server that starts finds out by a *witness*: a file in a memory file system that says how far the last
//! life had got. The death of the process leaves it, so it says the same as the store; the death of the host takes it along.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rt::sync::Mutex;
use twox_hash::XxHash3_64;

use super::records::{Txn, decode, encode, key};
use crate::error::MetaError;
use fsd_node::files;
use fsd_node::store::{Batch, Store, StoreError};

/// The order of transactions of one store.
pub struct Order {
    store: Arc<dyn Store>,
    /// Place of the last one; held while one is applied, so that the store never has one without those before.
    executed: Mutex<u64>,
    durable: AtomicU64,
    /// Whatever the last life may have lost has been carried out again, or been given up. Until then this life leaves
    /// nothing behind that says it has not lost anything.
    settled: AtomicBool,
    witness: Witness,
}

/// What the last life of the server has got to, as far as this host remembers.
struct Witness {
    file: File,
    path: PathBuf,
    /// Stands for this boot of the host: what is left of another one, where the memory file system is none, says nothing.
    boot: [u8; 8],
}

impl Witness {
    /// Opens it, and reads what it says.
    fn open(dir: &Path, uuid: &str) -> Result<(Self, Option<u64>), MetaError> {
        let path = dir.join(format!("distfuse-meta-{uuid}"));
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|error| MetaError::Io {
                what: format!(
                    "cannot open {} (meta.memory_dir names a memory file system)",
                    path.display()
                ),
                error,
            })?;
        let boot = XxHash3_64::oneshot(files::boot().as_bytes()).to_le_bytes();
        let (mut place, mut then) = ([0; 8], [0; 8]);
        let said = file.read_exact_at(&mut place, 0).is_ok()
            && file.read_exact_at(&mut then, 8).is_ok()
            && then == boot;
        let said = said.then(|| u64::from_le_bytes(place));
        Ok((Self { file, path, boot }, said))
    }

    /// Says nothing any more, so that whoever reads it believes that something was lost.
    fn forget(&self) -> Result<(), MetaError> {
        self.file.set_len(0).map_err(|error| MetaError::Io {
            what: format!("cannot empty {}", self.path.display()),
            error,
        })
    }

    fn saying(&self, place: u64) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&place.to_le_bytes());
        bytes[8..].copy_from_slice(&self.boot);
        bytes
    }

    fn say(&self, place: u64) {
        if let Err(error) = self.file.write_all_at(&self.saying(place), 0) {
            // A server that starts then believes that something was lost, and asks the mounts.
            tracing::warn!("{}: {error}", self.path.display());
        }
    }
}

impl Order {
    /// Goes on where the store ends, which is made durable. Whether transactions may have been lost with the last life.
    pub fn open(store: Arc<dyn Store>, memory_dir: &Path, uuid: &str) -> Result<(Self, bool), MetaError> {
        let executed = store.get(&key::executed())?;
        let executed: u64 = executed.map_or(Ok(0), |bytes| decode(&bytes))?;
        let in_order = store.get(&key::stopped())?.is_some();
        let (witness, said) = Witness::open(memory_dir, uuid)?;
        // What the store has it keeps from here on; and that it stopped in order is over.
        let mut batch = Batch::default();
        batch.delete(key::stopped());
        store.apply(batch)?;
        store.sync()?;
        let lost = !in_order && said != Some(executed);
        if lost {
            witness.forget()?;
        } else {
            witness.say(executed);
        }
        let order = Self {
            store,
            executed: Mutex::new(executed),
            durable: AtomicU64::new(executed),
            settled: AtomicBool::new(!lost),
            witness,
        };
        Ok((order, lost))
    }

    /// Nothing is missing, or will be told, of what the last life has lost. `last` is the last place known to anybody: later
    /// transactions come behind it, so that none gets the place of one that could not be carried out again.
    pub fn settle(&self, last: u64) -> Result<(), StoreError> {
        let mut executed = self.executed.lock();
        self.settled.store(true, Ordering::Release);
        let place = last.max(*executed);
        self.apply(Txn::new(self.store.as_ref()), &mut executed, place)
    }

    /// Applies a transaction; its place in the order.
    pub fn commit(&self, txn: Txn<'_>) -> Result<u64, StoreError> {
        let mut executed = self.executed.lock();
        let place = *executed + 1;
        self.apply(txn, &mut executed, place)?;
        Ok(place)
    }

    /// Applies a transaction again at the place that it had before.
    pub fn commit_again(&self, txn: Txn<'_>, place: u64) -> Result<(), StoreError> {
        let mut executed = self.executed.lock();
        let place = place.max(*executed);
        self.apply(txn, &mut executed, place)
    }

    fn apply(&self, mut txn: Txn<'_>, executed: &mut u64, place: u64) -> Result<(), StoreError> {
        txn.put(key::executed(), encode(&place));
        txn.commit()?;
        *executed = place;
        if self.settled.load(Ordering::Acquire) {
            self.witness.say(place);
        }
        Ok(())
    }

    /// Place of the last transaction.
    pub fn executed(&self) -> u64 {
        *self.executed.lock()
    }

    /// A crash of the machine undoes nothing up to here.
    pub fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Makes everything so far durable.
    pub fn sync(&self) -> Result<(), StoreError> {
        let executed = self.executed();
        self.store.sync()?;
        self.durable.fetch_max(executed, Ordering::AcqRel);
        Ok(())
    }

    /// The server stops in order: everything is durable, and a life that follows finds that out.
    pub fn stop(&self) -> Result<(), StoreError> {
        if !self.settled.load(Ordering::Acquire) {
            // The next life has to ask as this one did.
            return self.sync();
        }
        let mut batch = Batch::default();
        batch.put(key::stopped(), Vec::new());
        self.store.apply(batch)?;
        self.store.sync()?;
        // Whether or not it can be removed, the store says that nothing is missing.
        let _ = std::fs::remove_file(&self.witness.path);
        Ok(())
    }
}

/// As if a life of a server had got so far on this host.
#[cfg(test)]
pub fn remember(dir: &Path, uuid: &str, place: u64) -> Result<(), MetaError> {
    Witness::open(dir, uuid)?.0.say(place);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::store::FjallStore;

    fn order(store: &Arc<dyn Store>, dir: &Path) -> (Order, bool) {
        Order::open(Arc::clone(store), dir, "u").unwrap()
    }

    fn commit(order: &Order, store: &Arc<dyn Store>) -> u64 {
        let mut txn = Txn::new(store.as_ref());
        txn.put(b"x".to_vec(), Vec::new());
        order.commit(txn).unwrap()
    }

    #[test]
    fn what_was_lost_shows_in_the_memory_of_the_host() {
        let (disk, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(disk.path()).unwrap());
        // A new store has no past; nobody can have been told anything.
        let (first, _) = order(&store, memory.path());
        first.settle(0).unwrap();
        assert_eq!((commit(&first, &store), commit(&first, &store)), (1, 2));
        assert_eq!((first.executed(), first.durable()), (2, 0));
        drop(first);
        // The process died: everything is there, and durable from now on.
        let (second, lost) = order(&store, memory.path());
        assert_eq!((lost, second.executed(), second.durable()), (false, 2, 2));
        assert_eq!(commit(&second, &store), 3);
        second.sync().unwrap();
        assert_eq!(second.durable(), 3);
        commit(&second, &store);
        drop(second);
        // The host died, and the store lost its end.
        let mut batch = Batch::default();
        batch.put(key::executed(), encode(&3u64));
        store.apply(batch).unwrap();
        let (third, lost) = order(&store, memory.path());
        assert!(lost);
        // Or took its memory along, whatever became of the store.
        drop(third);
        std::fs::remove_file(memory.path().join("distfuse-meta-u")).unwrap();
        let (fourth, lost) = order(&store, memory.path());
        assert!(lost);
        // It does not forget that before it has dealt with it, whether it dies or stops.
        drop(fourth);
        let (fourth, lost) = order(&store, memory.path());
        assert!(lost);
        fourth.stop().unwrap();
        drop(fourth);
        let (fourth, lost) = order(&store, memory.path());
        assert!(lost);
        fourth.settle(0).unwrap();
        fourth.stop().unwrap();
        drop(fourth);
        let (fifth, lost) = order(&store, memory.path());
        assert!(!lost);
        // Only the first time.
        drop(fifth);
        std::fs::remove_file(memory.path().join("distfuse-meta-u")).unwrap();
        assert!(order(&store, memory.path()).1);
    }

    /// A witness that is not whole, or of another boot of the host, is none: the mounts are asked.
    #[test]
    fn half_a_witness_is_none() {
        let (disk, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(disk.path()).unwrap());
        let (first, _) = order(&store, memory.path());
        first.settle(0).unwrap();
        commit(&first, &store);
        let whole = std::fs::read(&first.witness.path).unwrap();
        let path = first.witness.path.clone();
        drop(first);
        let lost = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            order(&store, memory.path()).1
        };
        assert!(!lost(&whole));
        for len in 0..whole.len() {
            assert!(lost(&whole[..len]));
        }
        let mut other = whole.clone();
        other[8] ^= 1;
        assert!(lost(&other));
    }

    #[test]
    fn places_that_anybody_knows_are_not_given_again() {
        let (disk, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(disk.path()).unwrap());
        let (order, _) = order(&store, memory.path());
        order.commit_again(Txn::new(store.as_ref()), 7).unwrap();
        order.settle(9).unwrap();
        assert_eq!(commit(&order, &store), 10);
    }

    #[test]
    fn transactions_that_are_carried_out_again_keep_their_places() {
        let (disk, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let store: Arc<dyn Store> = Arc::new(FjallStore::open(disk.path()).unwrap());
        let (order, _) = order(&store, memory.path());
        order.commit_again(Txn::new(store.as_ref()), 7).unwrap();
        assert_eq!(order.executed(), 7);
        assert_eq!(commit(&order, &store), 8);
    }
}
