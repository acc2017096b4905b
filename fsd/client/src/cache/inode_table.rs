//! The inodes a mount knows.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use lockmgr::RecordId;
use rt::sync::RwLock;

use crate::cache::inode::{Inode, Source};
use fsd_proto::ino;

/// Nobody refers to it but the table, and nothing of it is only here. Under the table's lock: a reference
/// can only be made from another one, or by asking the table.
fn is_idle(inode: &Arc<Inode>) -> bool {
    let pushed = {
        let push = inode.transit.push.lock();
        push.waiting.is_none() && push.sent.is_none()
    };
    Arc::strong_count(inode) == 1
        && pushed
        && inode.kernel.lookups.load(Ordering::SeqCst) == 0
        && inode
            .transit
            .granted
            .lock()
            .as_ref()
            .is_none_or(|g| g.source != Source::Handed)
        && inode.try_lock_raw().is_some_and(|s| !s.is_dirty())
}

/// The inodes this mount knows. One at most for a lease record, the one of the latest generation heard of: what the lease
/// stands for, and what a revocation takes, is its.
#[derive(Debug, Default)]
pub struct InodeTable {
    known: RwLock<Known>,
}

#[derive(Debug, Default)]
struct Known {
    current: HashMap<RecordId, Arc<Inode>>,
    /// By number: superseded ones that the kernel has not forgotten.
    former: HashMap<u64, Arc<Inode>>,
}

impl Known {
    fn get(&self, number: u64) -> Option<&Arc<Inode>> {
        let current = self.current.get(&ino::record(number));
        current
            .filter(|i| i.ino == number)
            .or_else(|| self.former.get(&number))
    }
}

impl InodeTable {
    /// The inode of a number, made if need be. A number of a later generation supersedes that of an earlier one. A number of
    /// an earlier one, from who has been slow, never does: what it gets is gone.
    pub fn get(&self, number: u64) -> Arc<Inode> {
        if let Some(inode) = self.known.read().get(number) {
            return Arc::clone(inode);
        }
        let mut known = self.known.write();
        if let Some(inode) = known.get(number) {
            return Arc::clone(inode);
        }
        let inode = Arc::new(Inode::new(number));
        let record = ino::record(number);
        let current = known.current.get(&record);
        if current.is_some_and(|i| ino::is_later(i.ino, number)) {
            inode.hints.superseded.store(true, Ordering::SeqCst);
            return inode;
        }
        if let Some(old) = known.current.insert(record, Arc::clone(&inode)) {
            old.hints.superseded.store(true, Ordering::SeqCst);
            if old.kernel.lookups.load(Ordering::SeqCst) > 0 {
                known.former.insert(old.ino, old);
            }
        }
        inode
    }

    /// The inode of a record, if known.
    #[must_use]
    pub fn by_record(&self, record: RecordId) -> Option<Arc<Inode>> {
        self.known.read().current.get(&record).cloned()
    }

    /// The inode of a number, if known and not superseded.
    #[must_use]
    pub fn find(&self, number: u64) -> Option<Arc<Inode>> {
        self.by_record(ino::record(number)).filter(|i| i.ino == number)
    }

    /// The inode of a number, if known, superseded or not.
    #[must_use]
    pub fn find_any(&self, number: u64) -> Option<Arc<Inode>> {
        self.known.read().get(number).cloned()
    }

    /// The kernel has forgotten an inode.
    pub fn forgotten(&self, inode: &Inode) {
        if inode.hints.superseded.load(Ordering::SeqCst) {
            self.known.write().former.remove(&inode.ino);
        }
    }

    /// Up to `most` inodes that nobody refers to but this table.
    #[must_use]
    pub fn idle(&self, most: usize) -> Vec<Arc<Inode>> {
        let known = self.known.read();
        let all = known.current.values();
        all.filter(|i| is_idle(i)).take(most).cloned().collect()
    }

    /// Removes an inode if nobody refers to it but this table. Whoever comes later starts with nothing
    /// cached, so there must be no lease any more.
    pub fn remove_idle(&self, number: u64) -> Option<Arc<Inode>> {
        let record = ino::record(number);
        let current = &mut self.known.write().current;
        current.get(&record).filter(|i| i.ino == number && is_idle(i))?;
        current.remove(&record)
    }

    /// All that are not superseded.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Inode>> {
        self.known.read().current.values().cloned().collect()
    }

    /// All, superseded ones that the kernel has not forgotten as well.
    #[must_use]
    pub fn known(&self) -> Vec<Arc<Inode>> {
        let known = self.known.read();
        let all = known.current.values().chain(known.former.values());
        all.cloned().collect()
    }

    /// How many there are that are not superseded.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.read().current.len()
    }

    /// None?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.read().current.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_idle_inodes_are_forgotten() {
        let table = InodeTable::default();
        for number in 1..=4 {
            table.get(number);
        }
        let held = table.get(1);
        table.get(2).kernel.lookups.store(1, Ordering::SeqCst);
        table.get(3).lock_raw().attr_dirty = true;
        assert_eq!(table.idle(9).iter().map(|i| i.ino).collect::<Vec<_>>(), [4]);
        for number in 1..=4 {
            assert_eq!(table.remove_idle(number).is_some(), number == 4);
        }
        drop(held);
        assert!(table.remove_idle(1).is_some());
        assert_eq!(table.len(), 2);
    }

    #[test]
    fn who_is_slow_does_not_supersede_what_is_there_now() {
        let table = InodeTable::default();
        let [old, new] = [ino::compose(0, 3, 7), ino::compose(0, 4, 7)];
        let current = table.get(new);
        let late = table.get(old);
        assert!(
            late.hints.superseded.load(Ordering::SeqCst) && !current.hints.superseded.load(Ordering::SeqCst)
        );
        assert!(Arc::ptr_eq(&table.get(new), &current));
        assert!(table.find_any(old).is_none());
    }

    #[test]
    fn what_the_kernel_has_not_forgotten_is_known_until_then() {
        let table = InodeTable::default();
        let [old, new] = [ino::compose(0, u32::MAX, 7), ino::compose(0, 0, 7)];
        let before = table.get(old);
        before.kernel.lookups.store(1, Ordering::SeqCst);
        let current = table.get(new);
        assert!(before.hints.superseded.load(Ordering::SeqCst));
        assert!(Arc::ptr_eq(&table.get(old), &before));
        assert!(table.find(old).is_none() && table.find_any(old).is_some());
        assert!(Arc::ptr_eq(&table.by_record(before.record()).unwrap(), &current));
        before.kernel.lookups.store(0, Ordering::SeqCst);
        table.forgotten(&before);
        assert!(table.find_any(old).is_none());
        assert_eq!(table.len(), 1);
    }
}
