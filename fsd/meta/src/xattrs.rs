//! Transactions on extended attributes.

use super::names::Change;
use super::records::key;
use super::{Refusal, no};
use fsd_proto::layout::NAME_MAX;

/// Longest value of an extended attribute, bytes.
pub const XATTR_MAX: usize = 64 << 10;
/// Most bytes of names and values of one inode's extended attributes.
pub const XATTR_TOTAL: usize = 96 << 10;

impl Change<'_> {
    pub(super) fn set_xattr(
        &mut self,
        ino: u64,
        name: &[u8],
        value: &[u8],
        flags: i32,
    ) -> Result<(), Refusal> {
        if name.is_empty() || name.len() > NAME_MAX {
            return no(libc::ERANGE);
        }
        if value.len() > XATTR_MAX {
            return no(libc::E2BIG);
        }
        let mut inode = self.txn.inode(ino)?;
        let key = key::xattr(ino, name);
        let exists = self.txn.get(&key)?.is_some();
        if flags & libc::XATTR_CREATE != 0 && exists {
            return no(libc::EEXIST);
        }
        if flags & libc::XATTR_REPLACE != 0 && !exists {
            return no(libc::ENODATA);
        }
        let others: usize = self
            .txn
            .scan_stored(&key::xattr(ino, &[]), usize::MAX)?
            .iter()
            .filter(|(k, _)| *k != key)
            .map(|(k, v)| k.len() + v.len())
            .sum();
        if others + name.len() + value.len() > XATTR_TOTAL {
            return no(libc::ENOSPC);
        }
        self.txn.put(key, value.to_vec());
        inode.attr.has_xattr = true;
        self.save(&mut inode);
        Ok(())
    }

    pub(super) fn remove_xattr(&mut self, ino: u64, name: &[u8]) -> Result<(), Refusal> {
        let mut inode = self.txn.inode(ino)?;
        let key = key::xattr(ino, name);
        if self.txn.get(&key)?.is_none() {
            return no(libc::ENODATA);
        }
        inode.attr.has_xattr = self
            .txn
            .scan_stored(&key::xattr(ino, &[]), 2)?
            .iter()
            .any(|(k, _)| *k != key);
        self.txn.delete(key);
        self.save(&mut inode);
        Ok(())
    }
}
