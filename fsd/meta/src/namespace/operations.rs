//! The operations of mounts on the namespace, each within a transaction.

use super::change::{Change, Effects};
use super::{names, rename, xattrs};
use crate::error::Refusal;
use crate::journal::records::{Txn, encode, key};
use fsd_proto::wire::{AttrUpdate, Created, Kind, NamespaceOp};

/// Carries out an operation. The caller commits the transaction that comes back.
///
/// # Errors
/// The error number of the system call.
pub fn run<'a>(mut change: Change<'a>, op: &NamespaceOp) -> Result<(Txn<'a>, Created, Effects), Refusal> {
    let mut cookies = (0, 0);
    let to = &mut change;
    match op {
        NamespaceOp::Create { .. } => cookies.0 = names::create(to, op)?,
        NamespaceOp::Link { ino, parent, name } => cookies.0 = names::link(to, *ino, *parent, name)?,
        NamespaceOp::Unlink {
            parent,
            name,
            ino,
            keep,
        } => names::unlink(to, *parent, name, *ino, *keep)?,
        NamespaceOp::Rmdir { parent, name, ino } => names::rmdir(to, *parent, name, *ino)?,
        NamespaceOp::Rename { .. } => cookies = rename::rename(to, op)?,
        NamespaceOp::SetXattr {
            ino,
            name,
            value,
            flags,
        } => xattrs::set(to, *ino, name, value, *flags)?,
        NamespaceOp::RemoveXattr { ino, name } => xattrs::remove(to, *ino, name)?,
    }
    Ok(change.finish(cookies))
}

/// Removes an orphan for good; nothing if it is not one.
pub fn reap(mut change: Change<'_>, ino: u64) -> Result<Option<(Txn<'_>, Effects)>, Refusal> {
    if change.txn.get(&key::orphan(ino))?.is_none() {
        return Ok(None);
    }
    change.txn.delete(key::orphan(ino));
    change.effects.orphans -= 1;
    change.remove_inode(ino)?;
    Ok(Some((change.txn, change.effects)))
}

/// Stores attribute changes of an inode's exclusive holder; what is older than that which is stored is ignored. Mounts tell when they can,
/// so the end of a tenure may be told after a later owner has begun.
///
/// # Errors
/// The store failed. An inode that is gone is no error.
pub fn update(txn: &mut Txn<'_>, era: u32, change: &AttrUpdate) -> Result<(), Refusal> {
    let mut inode = match txn.inode(change.ino) {
        Ok(inode) => inode,
        Err(Refusal::Errno(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    if inode.era == era && (change.version, change.midway) < (inode.attr.version, inode.midway) {
        return Ok(());
    }
    let a = &mut inode.attr;
    a.version = change.version;
    inode.midway = change.midway;
    a.mode = change.mode & 0o7777;
    a.uid = change.uid;
    a.gid = change.gid;
    if a.kind == Kind::File {
        a.size = change.size;
        a.blocks = change.blocks;
        a.layout = change.layout;
    }
    a.atime = change.atime;
    a.mtime = change.mtime;
    a.ctime = change.ctime;
    inode.era = era;
    txn.put(key::inode(change.ino), encode(&inode));
    Ok(())
}

#[cfg(test)]
#[path = "operations_tests.rs"]
mod tests;
