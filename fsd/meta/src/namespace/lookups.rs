//! What can be asked of inodes and names.

use crate::error::Refusal;
use crate::journal::Journal;
use crate::journal::records::{Dirent, Txn, decode, key};
use fsd_node::store::prefix_end;
use fsd_proto::wire::{Attr, DirEntry, MetaReply, Page};

/// Bytes of directory entries in one answer.
const READDIR_BYTES: usize = 64 << 10;
/// Most directory entries in one answer.
const READDIR_ENTRIES: usize = 512;

/// Looks at what is stored.
#[derive(Clone)]
pub struct Lookups(pub Journal);

impl Lookups {
    /// A name in a directory.
    pub fn find(&self, parent: u64, name: &[u8]) -> Result<Option<(u64, Attr)>, Refusal> {
        let txn = self.0.txn();
        let Some(entry) = txn.dirent(parent, name)? else {
            txn.directory(parent)?;
            return Ok(None);
        };
        Ok(Some((entry.cookie, self.attr_in(&txn, entry.ino)?)))
    }

    /// Attributes.
    pub fn attr(&self, ino: u64) -> Result<MetaReply, Refusal> {
        Ok(MetaReply::Attr(self.attr_in(&self.0.txn(), ino)?))
    }

    /// Target of a symbolic link.
    pub fn target(&self, ino: u64) -> Result<MetaReply, Refusal> {
        Ok(MetaReply::Target(self.0.txn().inode(ino)?.target))
    }

    /// Extended attributes.
    pub fn xattrs(&self, ino: u64) -> Result<MetaReply, Refusal> {
        let pairs = self.0.txn().scan_stored(&key::xattr(ino, &[]), usize::MAX)?;
        let pairs = pairs.into_iter().map(|(k, v)| (key::rest(&k).to_vec(), v));
        Ok(MetaReply::Xattrs(pairs.collect()))
    }

    /// The entries of a directory behind a name, as many as go into one answer, and at most so many.
    pub fn entries(&self, ino: u64, after: &[u8], most: u32) -> Result<Page, Refusal> {
        let txn = self.0.txn();
        txn.directory(ino)?;
        let mut from = key::dirent(ino, after);
        if !after.is_empty() {
            from.push(0);
        }
        let end = prefix_end(&key::dirent(ino, &[]));
        let most = (most as usize).clamp(1, READDIR_ENTRIES);
        let pairs = self.0.store.scan(&from, &end, most)?;
        let full = pairs.len() == most;
        let (mut page, mut bytes) = (Page::default(), 0);
        for (k, v) in pairs {
            let Dirent { ino, kind, cookie } = decode(&v)?;
            let name = key::rest(&k).to_vec();
            bytes += name.len() + 120;
            let attr = self.attr_in(&txn, ino)?;
            let entry = DirEntry {
                name,
                ino,
                kind,
                cookie,
            };
            page.entries.push((entry, attr));
            if bytes > READDIR_BYTES {
                return Ok(page.to_be_continued());
            }
        }
        Ok(if full { page.to_be_continued() } else { page })
    }

    fn attr_in(&self, txn: &Txn<'_>, ino: u64) -> Result<Attr, Refusal> {
        Ok(self.0.eras.attr(&txn.inode(ino)?))
    }
}
