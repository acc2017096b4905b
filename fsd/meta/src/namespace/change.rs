//! A transaction on the namespace under way: what all operations have in common.

use std::collections::HashMap;

use crate::error::Refusal;
use crate::journal::records::{Inode, Txn, key};
use fsd_proto::wire::{Attr, Created, Time, Touched};

/// What a transaction leaves to be done after it has been applied.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Inodes whose blocks are to be freed.
    pub freed: Vec<u64>,
    /// Change of the number of inodes.
    pub inodes: i64,
    /// Change of the number of orphans.
    pub orphans: i64,
}

/// One transaction under way.
pub struct Change<'a> {
    pub txn: Txn<'a>,
    pub now: Time,
    pub era: u32,
    pub node: u16,
    versions: HashMap<u64, u64>,
    attrs: Vec<Attr>,
    pub effects: Effects,
}

impl<'a> Change<'a> {
    /// Begins a transaction of mount `node`, which holds the inodes in `touched` exclusively.
    pub fn new(txn: Txn<'a>, node: u16, now: Time, era: u32, touched: &[Touched]) -> Self {
        let versions = touched.iter().map(|t| (t.ino, t.version)).collect();
        Self {
            txn,
            now,
            era,
            node,
            versions,
            attrs: Vec::new(),
            effects: Effects::default(),
        }
    }

    /// The transaction, what its mount is told, and what is to be done after it.
    pub fn finish(self, (cookie, second_cookie): (u64, u64)) -> (Txn<'a>, Created, Effects) {
        let created = Created {
            attrs: self.attrs,
            cookie,
            second_cookie,
        };
        (self.txn, created, self.effects)
    }

    /// Stores a changed inode with its new version and change time, and reports its attributes.
    pub fn save(&mut self, inode: &mut Inode) {
        inode.attr.ctime = self.now;
        self.save_unchanged_time(inode);
    }

    fn save_unchanged_time(&mut self, inode: &mut Inode) {
        if let Some(&version) = self.versions.get(&inode.attr.ino) {
            // The size may still be that of before the tenure, and come when its end is told.
            if inode.era != self.era || version > inode.attr.version {
                (inode.era, inode.attr.version, inode.midway) = (self.era, version, false);
            }
        }
        self.txn.set_inode(inode);
        self.attrs.retain(|a| a.ino != inode.attr.ino);
        self.attrs.push(inode.told());
    }

    /// Stores a directory in which a name has changed.
    pub fn touch_dir(&mut self, dir: &mut Inode) {
        dir.attr.mtime = self.now;
        self.save(dir);
    }

    /// Takes a name from an inode: one without names is removed, unless it is to be kept for who has it open.
    pub fn drop_link(&mut self, mut inode: Inode, keep: bool) -> Result<(), Refusal> {
        inode.attr.nlink = inode.attr.nlink.saturating_sub(1);
        if inode.attr.nlink > 0 {
            self.save(&mut inode);
        } else if keep {
            self.txn.put(key::orphan(inode.attr.ino), Vec::new());
            self.effects.orphans += 1;
            self.save(&mut inode);
        } else {
            self.remove_inode(inode.attr.ino)?;
        }
        Ok(())
    }

    /// Removes an inode and its attributes; its blocks are to be freed.
    pub fn remove_inode(&mut self, ino: u64) -> Result<(), Refusal> {
        for (key, _) in self.txn.scan_stored(&key::xattr(ino, &[]), usize::MAX)? {
            self.txn.delete(key);
        }
        self.txn.delete(key::inode(ino));
        self.txn.put(key::freed(ino), Vec::new());
        self.effects.freed.push(ino);
        self.effects.inodes -= 1;
        Ok(())
    }
}
