//! The kernel as a mount deals with it: a stock one, or one with the extension, to which leases are delegated.

use std::sync::{Arc, OnceLock};

use lockmgr::Mode;

use crate::cache::inode::Inode;
use crate::cache::state::State;
use fsd_proto::wire::Attr;

/// What is done for a kernel with the extension; a stock one has no part in leases.
pub trait KernelFront: Send + Sync {
    /// Delegates what the kernel is about to want, if that costs nothing: `held` of a file whose attributes these are, or a
    /// directory, for the names in it. With the inode locked, so that they are the last ones.
    fn delegate_ahead(&self, _inode: &Inode, _held: Mode, _version: u64, _attr: &Attr, _state: &State) {}
    /// Would the kernel keep names of a directory in which one has been looked up, if that were delegated to it?
    fn wants_names(&self, _dir: &Inode) -> bool {
        false
    }
    /// What names a directory has is not known: what the kernel knows of them goes. Under the mount's lease.
    fn forget_names(&self, _dir: &Inode) {}
    /// Attributes have been changed here: the kernel, if the inode is delegated to it, gets them with the answer,
    /// and from the entry should it begin anew. With the inode locked.
    fn attributes_changed(&self, _inode: &Inode, _attr: &Attr) {}
    /// The size is about to be set here: what the kernel says of it may be older.
    fn size_changes(&self, _inode: &Inode) {}
    /// Before blocks of a file lose their frames, or reservations: the kernel is told of none, until
    /// [`KernelFront::space_settled`].
    fn space_changes(&self, _inode: &Inode) {}
    /// After blocks of a file have got or lost their frames.
    fn space_settled(&self, _inode: &Inode, _state: &State) {}
    /// May the kernel write to a file without asking?
    fn may_write(&self, _inode: &Inode) -> bool {
        false
    }
    /// Is a delegation being recalled, so that the kernel flushes the file?
    fn is_recalling(&self, _inode: &Inode) -> bool {
        false
    }
    /// Recalls what is delegated of an inode, down to `to`, where that takes neither a system call nor a wait. If so, nothing is
    /// delegated until [`KernelFront::resume`].
    fn recall_at_once(&self, _inode: &Inode, _to: Option<Mode>) -> bool {
        true
    }
    /// Recalls what is delegated of an inode, down to `to`; waits for that. Nothing is delegated until [`KernelFront::resume`].
    fn recall(&self, _inode: &Arc<Inode>, _to: Option<Mode>) {}
    /// What is held may be delegated again.
    fn resume(&self, _inode: &Inode) {}
    /// The kernel has forgotten an inode.
    fn forgotten(&self, _inode: &Arc<Inode>) {}
    /// Does the kernel take attributes from what was delegated, and not from answers that an invalidation may overtake?
    fn has_leases(&self) -> bool {
        false
    }
    /// What the kernel has counted.
    fn counters(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}

/// A kernel without the extension: nothing is ever delegated to it, so what the trait does by itself will do.
#[derive(Debug)]
pub struct Stock;

impl KernelFront for Stock {}

/// The kernel of a mount: a stock one until the extension is attached.
#[derive(Default)]
pub struct Front(OnceLock<Arc<dyn KernelFront>>);

impl Front {
    /// The extension is attached; before anybody uses the mount.
    pub fn attach(&self, front: Arc<dyn KernelFront>) {
        let _ = self.0.set(front);
    }
}

impl std::ops::Deref for Front {
    type Target = dyn KernelFront;

    fn deref(&self) -> &Self::Target {
        self.0.get().map_or(&Stock, |front| &**front)
    }
}
