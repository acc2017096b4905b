//! Renaming, and exchanging two names.

use super::change::Change;
use super::names::{check_name, entry, is_empty};
use crate::error::{Refusal, no};
use crate::journal::records::{Inode, key};
use fsd_proto::wire::{Kind, NamespaceOp};

const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

/// Is `dir` the directory `above` or somewhere below it?
fn is_below(change: &Change<'_>, dir: u64, above: u64) -> Result<bool, Refusal> {
    let mut at = dir;
    loop {
        if at == above {
            return Ok(true);
        }
        if at == fsd_proto::ino::ROOT {
            return Ok(false);
        }
        at = change.txn.directory(at)?.parent;
    }
}

pub fn rename(change: &mut Change<'_>, op: &NamespaceOp) -> Result<(u64, u64), Refusal> {
    let NamespaceOp::Rename {
        parent,
        name,
        ino,
        new_parent,
        new_name,
        replaced,
        keep,
        flags,
    } = op
    else {
        return no(libc::EINVAL);
    };
    let (exchange, noreplace) = (flags & RENAME_EXCHANGE != 0, flags & RENAME_NOREPLACE != 0);
    if flags & !(RENAME_EXCHANGE | RENAME_NOREPLACE) != 0 || (exchange && noreplace) {
        return no(libc::EINVAL);
    }
    check_name(new_name)?;
    let moved = entry(change, *parent, name, *ino)?;
    let target = change.txn.dirent(*new_parent, new_name)?;
    if target.map(|t| t.ino) != *replaced {
        return no(libc::ESTALE);
    }
    let mut to = change.txn.directory(*new_parent)?;
    if to.attr.nlink == 0 {
        return no(libc::ENOENT);
    }
    let directory = moved.attr.kind == Kind::Directory;
    if directory && parent != new_parent && is_below(change, *new_parent, *ino)? {
        return no(libc::EINVAL);
    }
    let other = target.map(|t| change.txn.inode(t.ino)).transpose()?;
    if noreplace && other.is_some() {
        return no(libc::EEXIST);
    }
    if exchange {
        let Some(other) = other else {
            return no(libc::ENOENT);
        };
        return exchange_names(change, *parent, name, moved, *new_parent, new_name, other);
    }
    if let Some(other) = &other {
        if other.attr.ino == *ino {
            return Ok((0, 0)); // two names of one inode: nothing happens
        }
        match (directory, other.attr.kind == Kind::Directory) {
            (true, false) => return no(libc::ENOTDIR),
            (false, true) => return no(libc::EISDIR),
            (true, true) if !is_empty(change, other.attr.ino)? => return no(libc::ENOTEMPTY),
            _ => {}
        }
    }
    change.txn.delete(key::dirent(*parent, name));
    if parent != new_parent {
        let mut from = change.txn.directory(*parent)?;
        if directory {
            from.attr.nlink = from.attr.nlink.saturating_sub(1);
            to.attr.nlink += 1;
        }
        change.touch_dir(&mut from);
    }
    let cookie = change.txn.add_dirent(&mut to, new_name, *ino, moved.attr.kind);
    if other.as_ref().is_some_and(|o| o.attr.kind == Kind::Directory) {
        to.attr.nlink = to.attr.nlink.saturating_sub(1);
    }
    change.touch_dir(&mut to);
    let mut moved = moved;
    moved.parent = *new_parent;
    change.save(&mut moved);
    if let Some(other) = other {
        if other.attr.kind == Kind::Directory {
            change.remove_inode(other.attr.ino)?;
        } else {
            change.drop_link(other, *keep)?;
        }
    }
    Ok((cookie, 0))
}

fn exchange_names(
    change: &mut Change<'_>,
    parent: u64,
    name: &[u8],
    mut a: Inode,
    new_parent: u64,
    new_name: &[u8],
    mut b: Inode,
) -> Result<(u64, u64), Refusal> {
    if a.attr.ino == b.attr.ino {
        return Ok((0, 0));
    }
    if b.attr.kind == Kind::Directory && is_below(change, parent, b.attr.ino)? {
        return no(libc::EINVAL);
    }
    let mut from = change.txn.directory(parent)?;
    let first = change.txn.add_dirent(&mut from, name, b.attr.ino, b.attr.kind);
    let second;
    if parent == new_parent {
        second = change
            .txn
            .add_dirent(&mut from, new_name, a.attr.ino, a.attr.kind);
        change.touch_dir(&mut from);
    } else {
        let mut to = change.txn.directory(new_parent)?;
        second = change.txn.add_dirent(&mut to, new_name, a.attr.ino, a.attr.kind);
        let (a_dir, b_dir) = (a.attr.kind == Kind::Directory, b.attr.kind == Kind::Directory);
        if a_dir && !b_dir {
            from.attr.nlink -= 1;
            to.attr.nlink += 1;
        } else if b_dir && !a_dir {
            from.attr.nlink += 1;
            to.attr.nlink -= 1;
        }
        change.touch_dir(&mut from);
        change.touch_dir(&mut to);
    }
    a.parent = new_parent;
    b.parent = parent;
    change.save(&mut a);
    change.save(&mut b);
    // The cookie under the new name first, as for a plain rename.
    Ok((second, first))
}
