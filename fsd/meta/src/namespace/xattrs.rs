//! Transactions on extended attributes.

use super::change::Change;
use crate::error::{Refusal, no};
use crate::journal::records::key;
use fsd_proto::layout::NAME_MAX;

/// Longest value of an extended attribute, bytes.
pub const XATTR_MAX: usize = 64 << 10;
/// Most bytes of names and values of one inode's extended attributes.
pub const XATTR_TOTAL: usize = 96 << 10;

pub fn set(change: &mut Change<'_>, ino: u64, name: &[u8], value: &[u8], flags: i32) -> Result<(), Refusal> {
    if name.is_empty() || name.len() > NAME_MAX {
        return no(libc::ERANGE);
    }
    if value.len() > XATTR_MAX {
        return no(libc::E2BIG);
    }
    let mut inode = change.txn.inode(ino)?;
    let key = key::xattr(ino, name);
    let exists = change.txn.get(&key)?.is_some();
    if flags & libc::XATTR_CREATE != 0 && exists {
        return no(libc::EEXIST);
    }
    if flags & libc::XATTR_REPLACE != 0 && !exists {
        return no(libc::ENODATA);
    }
    let others: usize = change
        .txn
        .scan_stored(&key::xattr(ino, &[]), usize::MAX)?
        .iter()
        .filter(|(k, _)| *k != key)
        .map(|(k, v)| k.len() + v.len())
        .sum();
    if others + name.len() + value.len() > XATTR_TOTAL {
        return no(libc::ENOSPC);
    }
    change.txn.put(key, value.to_vec());
    inode.attr.has_xattr = true;
    change.save(&mut inode);
    Ok(())
}

pub fn remove(change: &mut Change<'_>, ino: u64, name: &[u8]) -> Result<(), Refusal> {
    let mut inode = change.txn.inode(ino)?;
    let key = key::xattr(ino, name);
    if change.txn.get(&key)?.is_none() {
        return no(libc::ENODATA);
    }
    inode.attr.has_xattr = change
        .txn
        .scan_stored(&key::xattr(ino, &[]), 2)?
        .iter()
        .any(|(k, _)| *k != key);
    change.txn.delete(key);
    change.save(&mut inode);
    Ok(())
}
