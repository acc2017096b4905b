//! Operations that make and remove names.

use super::change::Change;
use crate::error::{Refusal, no};
use crate::journal::records::{Inode, key};
use fsd_proto::layout::{FIRST_COOKIE, NAME_MAX, is_name};
use fsd_proto::wire::{Kind, NamespaceOp};

/// Most hard links.
pub const LINK_MAX: u32 = 1 << 30;

/// Can this be a name in a directory?
pub fn check_name(name: &[u8]) -> Result<(), Refusal> {
    if name.len() > NAME_MAX {
        return no(libc::ENAMETOOLONG);
    }
    if !is_name(name) {
        return no(libc::EINVAL);
    }
    Ok(())
}

pub fn create(change: &mut Change<'_>, op: &NamespaceOp) -> Result<u64, Refusal> {
    let NamespaceOp::Create {
        parent,
        name,
        ino,
        kind,
        target,
        ..
    } = op
    else {
        return no(libc::EINVAL);
    };
    check_name(name)?;
    let mut dir = change.txn.directory(*parent)?;
    if dir.attr.nlink == 0 {
        return no(libc::ENOENT);
    }
    if change.txn.dirent(*parent, name)?.is_some() {
        return no(libc::EEXIST);
    }
    let reservation = key::reserved(change.node, *ino);
    if change.txn.get(&reservation)?.is_none() || change.txn.get(&key::inode(*ino))?.is_some() {
        return no(libc::ESTALE);
    }
    change.txn.delete(reservation);
    let directory = *kind == Kind::Directory;
    if directory {
        if dir.attr.nlink >= LINK_MAX {
            return no(libc::EMLINK);
        }
        dir.attr.nlink += 1;
    }
    let Some(attr) = op.new_inode(change.now) else {
        return no(libc::EINVAL);
    };
    let mut inode = Inode {
        attr,
        era: change.era,
        midway: false,
        parent: *parent,
        next_cookie: FIRST_COOKIE,
        target: target.clone(),
    };
    let cookie = change.txn.add_dirent(&mut dir, name, *ino, *kind);
    change.touch_dir(&mut dir);
    change.save(&mut inode);
    change.effects.inodes += 1;
    Ok(cookie)
}

pub fn link(change: &mut Change<'_>, ino: u64, parent: u64, name: &[u8]) -> Result<u64, Refusal> {
    check_name(name)?;
    let mut dir = change.txn.directory(parent)?;
    if dir.attr.nlink == 0 {
        return no(libc::ENOENT);
    }
    let mut inode = change.txn.inode(ino)?;
    if inode.attr.kind == Kind::Directory {
        return no(libc::EPERM);
    }
    if inode.attr.nlink == 0 {
        return no(libc::ENOENT);
    }
    if inode.attr.nlink >= LINK_MAX {
        return no(libc::EMLINK);
    }
    if change.txn.dirent(parent, name)?.is_some() {
        return no(libc::EEXIST);
    }
    inode.attr.nlink += 1;
    let cookie = change.txn.add_dirent(&mut dir, name, ino, inode.attr.kind);
    change.touch_dir(&mut dir);
    change.save(&mut inode);
    Ok(cookie)
}

/// The entry `name`, which must be the inode the requester believes.
pub fn entry(change: &Change<'_>, parent: u64, name: &[u8], ino: u64) -> Result<Inode, Refusal> {
    check_name(name)?;
    match change.txn.dirent(parent, name)? {
        None => no(libc::ENOENT),
        Some(d) if d.ino != ino => no(libc::ESTALE),
        Some(_) => change.txn.inode(ino),
    }
}

pub fn unlink(
    change: &mut Change<'_>,
    parent: u64,
    name: &[u8],
    ino: u64,
    keep: bool,
) -> Result<(), Refusal> {
    let mut dir = change.txn.directory(parent)?;
    let inode = entry(change, parent, name, ino)?;
    if inode.attr.kind == Kind::Directory {
        return no(libc::EISDIR);
    }
    change.txn.delete(key::dirent(parent, name));
    change.touch_dir(&mut dir);
    change.drop_link(inode, keep)
}

pub fn is_empty(change: &Change<'_>, ino: u64) -> Result<bool, Refusal> {
    Ok(change.txn.scan_stored(&key::dirent(ino, &[]), 1)?.is_empty())
}

pub fn rmdir(change: &mut Change<'_>, parent: u64, name: &[u8], ino: u64) -> Result<(), Refusal> {
    let mut dir = change.txn.directory(parent)?;
    let inode = entry(change, parent, name, ino)?;
    if inode.attr.kind != Kind::Directory {
        return no(libc::ENOTDIR);
    }
    if !is_empty(change, ino)? {
        return no(libc::ENOTEMPTY);
    }
    change.txn.delete(key::dirent(parent, name));
    dir.attr.nlink = dir.attr.nlink.saturating_sub(1);
    change.touch_dir(&mut dir);
    change.remove_inode(ino)
}
