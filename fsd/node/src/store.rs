//! The embedded transactional store behind the metadata server and the storage nodes' index.
//!
//! The servers need little of it: point reads, range scans, atomic batches that survive the death of the
//! process once applied, and a call that makes everything so far survive the death of the machine. They
//! see it through [`Store`], so that a replicated engine can carry them later. The engine is `fjall`;
//! docs/metadata-store.md has the comparison that chose it.

mod engine;
mod fjall_store;
mod kinds;
mod slot;
mod tail;
mod tidy;

pub use engine::is_begun;
pub use fjall_store::FjallStore;
pub use kinds::{Batch, Pair, Store, StoreError, prefix_end};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_apply_and_come_back_after_reopening() {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = FjallStore::open(dir.path()).unwrap();
            let mut batch = Batch::default();
            batch.put(b"a1".to_vec(), b"x".to_vec());
            batch.put(b"a2".to_vec(), b"y".to_vec());
            batch.put(b"b".to_vec(), b"z".to_vec());
            store.apply(batch).unwrap();
            let mut batch = Batch::default();
            batch.delete(b"a1".to_vec());
            store.apply(batch).unwrap();
            store.sync().unwrap();
        }
        let store = FjallStore::open(dir.path()).unwrap();
        assert_eq!(store.get(b"a1").unwrap(), None);
        let all = store.scan(b"a", &prefix_end(b"a"), 10).unwrap();
        assert_eq!(all, vec![(b"a2".to_vec(), b"y".to_vec())]);
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let store = FjallStore::open(dir.path()).unwrap();
        let again = FjallStore::open(dir.path()).err().unwrap();
        assert!(matches!(again, StoreError::InUse { .. }), "{again}");
        drop(store);
        std::fs::write(dir.path().join("version"), b"x").unwrap();
        let damaged = FjallStore::open(dir.path()).err().unwrap();
        assert!(matches!(damaged, StoreError::Damaged { .. }), "{damaged}");
        assert!(damaged.to_string().contains(&*dir.path().to_string_lossy()));
    }

    #[test]
    fn prefix_ends() {
        assert_eq!(prefix_end(b"a"), b"b");
        assert_eq!(prefix_end(&[1, 255]), vec![2]);
    }
}
