//! The lease manager's user: what it is told becomes revocations, and attributes that came with a grant.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lockmgr::{LeaseUser, Mode, RecordId};
use rt::time::Instant;

use crate::cache::inode::{Granted, Source};
use crate::revoke::revocation::{Revocation, Revocations};
use fsd_proto::ino;
use fsd_proto::wire::{Attr, Places};

/// The lease manager's user: hands revocations to threads that never serve requests.
#[derive(Default)]
pub struct Revoker {
    revocations: OnceLock<Weak<Revocations>>,
    inodes: OnceLock<Arc<crate::cache::inode_table::InodeTable>>,
}

impl Revoker {
    /// To be called once, before the first lease.
    pub fn set(&self, revocations: &Arc<Revocations>) {
        let _ = self.revocations.set(Arc::downgrade(revocations));
        let _ = self.inodes.set(Arc::clone(&revocations.cache.inodes));
    }
}

impl LeaseUser for Revoker {
    fn revoke(&self, id: RecordId, from: Mode, to: Option<Mode>) {
        let Some(revocations) = self.revocations.get().and_then(Weak::upgrade) else {
            return;
        };
        let mut revocation = Revocation::asked(id, from, to);
        if revocations.carry_on(&mut revocation, false) {
            return;
        }
        let me = Arc::clone(&revocations);
        let revokers = &revocations.session.threads.revokers;
        revokers.run(move || _ = me.carry_on(&mut revocation, true));
    }

    fn granted(&self, id: RecordId, mode: Mode, version: u64, payload: Option<&[u8]>) {
        let Some(inodes) = self.inodes.get() else { return };
        let attr = payload.and_then(Attr::decode);
        // Whoever asked may have given up, and the inode been forgotten: what came with the lease goes on with it all the same.
        let told = attr.filter(|a| ino::record(a.ino) == id);
        let Some(inode) = told.map_or_else(|| inodes.by_record(id), |a| Some(inodes.get(a.ino))) else {
            return;
        };
        if mode == Mode::Exclusive {
            inode.hints.regained.store(true, Ordering::SeqCst);
            if inode.transit.push.lock().waiting.is_some()
                && let Some(revocations) = self.revocations.get().and_then(Weak::upgrade)
            {
                revocations.cache.note_dirty(inode.ino);
            }
        }
        if let Some(attr) = told {
            // Neither a hand-over nor a shared grant waits for the metadata server to have the attributes.
            let source = match mode {
                Mode::Exclusive => Source::Handed,
                Mode::Shared => Source::Owner,
            };
            *inode.transit.granted.lock() = Some(Box::new(Granted {
                attr: Attr { version, ..attr },
                places: payload.and_then(Places::decode_behind),
                source,
            }));
        }
    }

    fn keep(&self, id: RecordId, mode: Mode, since: Duration) -> Duration {
        let inode = self.inodes.get().and_then(|inodes| inodes.by_record(id));
        match inode.as_ref().and_then(|inode| inode.hints.turns.get()) {
            Some(turns) if mode == Mode::Exclusive => turns.lock().keep(Instant::now(), since),
            _ => Duration::ZERO,
        }
    }

    fn confirm(&self, id: RecordId, version: u64) {
        if let Some(revocations) = self.revocations.get().and_then(Weak::upgrade) {
            revocations.push.confirm(id, version);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::inode_table::InodeTable;

    #[test]
    fn attributes_that_come_with_a_lease_nobody_waits_for_are_kept() {
        let revoker = Revoker::default();
        let inodes = Arc::new(InodeTable::default());
        let _ = revoker.inodes.set(Arc::clone(&inodes));
        let attr = Attr::of_file(5, 8, 32);
        let record = ino::record(attr.ino);
        revoker.granted(record, Mode::Exclusive, 8, Some(&attr.encode()));
        assert!(inodes.idle(9).is_empty());
        let inode = inodes.by_record(record).unwrap();
        let how = inode.hand_over(&mut inode.lock_raw(), Some(8));
        assert_eq!(Attr::decode(&how.payload), Some(attr));
        assert!(how.needs_confirm);
    }
}
