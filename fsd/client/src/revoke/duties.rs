//! What others must be able to see before a lease goes to them: at the metadata server, at the storage nodes, in the lease record.

use std::sync::atomic::Ordering;

use lockmgr::Mode;

use super::revocation::{RETRY, Revocations};
use crate::cache::inode::{Inode, Locked};
use crate::cache::state::State;
use crate::session::ctx::Ctx;
use fsd_proto::ask;
use fsd_proto::rpc::RpcError;

impl Revocations {
    /// Does what has to be done before a lease goes, again and again until it succeeds, or is of no use any more.
    fn insist(&self, why: &str, inode: &Inode, mut act: impl FnMut() -> Result<(), RpcError>) {
        while let Err(error) = act() {
            tracing::warn!("inode {:#x}: {why}: {error}", inode.ino);
            if self.session.fate.leaving.load(Ordering::SeqCst) || self.session.term.is_over() {
                return;
            }
            rt::thread::sleep(RETRY);
        }
    }

    /// Has the lease record say who uses the file here: whoever gets the lease asks it. False: it would have to wait.
    pub(super) fn publish(&self, inode: &Inode, to: Option<Mode>, may_wait: bool) -> bool {
        if !may_wait {
            return self.pinning.publish_at_once(inode, to);
        }
        let publish = || {
            let published = self.pinning.publish(&Ctx::on_worker(), inode, to);
            published.map_err(|stop| RpcError::Errno(stop.errno()))
        };
        self.insist(
            "its lease record does not say yet who has it open",
            inode,
            publish,
        );
        true
    }

    /// Has made durable that blocks beyond the end of a file are free: whoever gets the lease asks only the storage nodes that the file
    /// reaches, and what comes back elsewhere after a power cut would be there again when the file grows. False: it would have to wait.
    pub(super) fn commit_freed(&self, inode: &Inode, state: &mut Locked<'_>, may_wait: bool) -> bool {
        let freed = |state: &State| state.lasting.durable.as_ref().map_or(0, |d| d.freed_before());
        if freed(state) == 0 {
            return true;
        }
        let flushes = self.stored.flushes_of_freed(inode, state);
        if !may_wait && !flushes.is_empty() {
            return false;
        }
        state.unlocked(|| {
            for (node, flush) in flushes {
                let ask = || self.session.net.storage.ask(node, flush.clone());
                self.insist("what was freed is not durable yet", inode, ask);
            }
        });
        if let Some(durable) = state.lasting.durable.as_deref_mut() {
            durable.stored(durable.changes(), []);
        }
        true
    }

    /// Has told the metadata server what this mount has changed of an inode, or of the names in it: others will ask that. False: it would
    /// have to wait.
    pub(super) fn tell_names(&self, inode: &Inode, may_wait: bool) -> bool {
        let meta = &self.session.net.meta;
        if !meta.knows(inode.ino) {
            if !may_wait {
                return false;
            }
            let tell = || meta.tell(inode.ino);
            self.insist(
                "the metadata server does not know yet what became of it",
                inode,
                tell,
            );
        }
        true
    }

    /// Has made durable what this mount has changed of the names of a file, for whoever gets its attributes next is shown that; false: it
    /// would have to wait.
    pub(super) fn commit_names(&self, inode: &Inode, may_wait: bool) -> bool {
        let low = inode.transit.push.lock().linked;
        if low != 0 && !self.session.net.meta.is_durable_low(low) {
            if !may_wait {
                return false;
            }
            let sync = || self.session.net.meta.ask(ask::meta::Sync {});
            self.insist("names are not durable yet", inode, sync);
        }
        inode.transit.push.lock().linked = 0;
        true
    }
}
