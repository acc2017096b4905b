//! A kernel with the extension.

use std::sync::Arc;

use lockmgr::Mode;

use super::delegations::Delegations;
use super::front::KernelFront;
use super::recalls::Recalls;
use crate::cache::inode::Inode;
use crate::cache::state::State;
use fsd_proto::wire::Attr;

/// A kernel with the extension, attached to this mount.
pub struct Extended {
    /// What is delegated.
    pub delegations: Arc<Delegations>,
    /// Recalling it.
    pub recalls: Arc<Recalls>,
}

impl KernelFront for Extended {
    fn delegate_ahead(&self, inode: &Inode, held: Mode, version: u64, attr: &Attr, state: &State) {
        self.delegations.delegate_ahead(inode, held, version, attr, state);
    }

    fn wants_names(&self, dir: &Inode) -> bool {
        self.delegations.wants_names(dir)
    }

    fn forget_names(&self, dir: &Inode) {
        self.delegations.forget_names(dir);
    }

    fn attributes_changed(&self, inode: &Inode, attr: &Attr) {
        self.delegations.attributes_changed(inode, attr);
    }

    fn size_changes(&self, inode: &Inode) {
        inode.delegation.resize();
    }

    fn space_changes(&self, inode: &Inode) {
        self.delegations.tell_space(inode, (0, 0));
    }

    fn space_settled(&self, inode: &Inode, state: &State) {
        self.delegations.space_settled(inode, state);
    }

    fn may_write(&self, inode: &Inode) -> bool {
        self.delegations.may_write(inode)
    }

    fn is_recalling(&self, inode: &Inode) -> bool {
        inode.delegation.is_recalling()
    }

    fn recall_at_once(&self, inode: &Inode, to: Option<Mode>) -> bool {
        self.recalls.recall_at_once(inode, to)
    }

    fn recall(&self, inode: &Arc<Inode>, to: Option<Mode>) {
        self.recalls.recall(inode, to);
    }

    fn resume(&self, inode: &Inode) {
        if let Some(lent) = inode.delegation.get() {
            lent.again();
        }
    }

    fn forgotten(&self, inode: &Arc<Inode>) {
        self.recalls.forgotten(inode);
    }

    fn has_leases(&self) -> bool {
        true
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let counters = self.delegations.ext.counters();
        counters.iter().map(|(name, n)| (name.to_owned(), n)).collect()
    }
}
