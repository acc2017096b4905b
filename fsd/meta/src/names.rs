//! Transactions on the namespace.

use fsd_proto::layout::NAME_MAX;
use std::collections::HashMap;

use super::records::{FIRST_COOKIE, Inode, Txn, encode, key};
use super::{Refusal, no};
use fsd_proto::wire::{Attr, Created, Kind, NamespaceOp, Time, Touched};

/// Most hard links.
pub const LINK_MAX: u32 = 1 << 30;
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;

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
    pub(super) txn: Txn<'a>,
    now: Time,
    era: u32,
    node: u16,
    versions: HashMap<u64, u64>,
    attrs: Vec<Attr>,
    effects: Effects,
}

fn check_name(name: &[u8]) -> Result<(), Refusal> {
    if name.len() > NAME_MAX {
        return no(libc::ENAMETOOLONG);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return no(libc::EINVAL);
    }
    Ok(())
}

impl<'a> Change<'a> {
    /// Begins a transaction of mount `node`, which holds the inodes in `touched` exclusively.
    #[must_use]
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

    /// Carries out the operation. The caller commits the transaction that comes back.
    ///
    /// # Errors
    /// The error number of the system call.
    pub fn run(mut self, op: &NamespaceOp) -> Result<(Txn<'a>, Created, Effects), Refusal> {
        let (cookie, second_cookie) = match op {
            NamespaceOp::Create { .. } => (self.create(op)?, 0),
            NamespaceOp::Link { ino, parent, name } => (self.link(*ino, *parent, name)?, 0),
            NamespaceOp::Unlink {
                parent,
                name,
                ino,
                keep,
            } => {
                self.unlink(*parent, name, *ino, *keep)?;
                (0, 0)
            }
            NamespaceOp::Rmdir { parent, name, ino } => {
                self.rmdir(*parent, name, *ino)?;
                (0, 0)
            }
            NamespaceOp::Rename { .. } => self.rename(op)?,
            NamespaceOp::SetXattr {
                ino,
                name,
                value,
                flags,
            } => {
                self.set_xattr(*ino, name, value, *flags)?;
                (0, 0)
            }
            NamespaceOp::RemoveXattr { ino, name } => {
                self.remove_xattr(*ino, name)?;
                (0, 0)
            }
        };
        Ok((
            self.txn,
            Created {
                attrs: self.attrs,
                cookie,
                second_cookie,
            },
            self.effects,
        ))
    }

    /// Stores a changed inode with its new version and change time, and reports its attributes.
    pub(super) fn save(&mut self, inode: &mut Inode) {
        inode.attr.ctime = self.now;
        self.save_unchanged_time(inode);
    }

    fn save_unchanged_time(&mut self, inode: &mut Inode) {
        if let Some(&version) = self.versions.get(&inode.attr.ino) {
            inode.attr.version = if inode.era == self.era {
                inode.attr.version.max(version)
            } else {
                version
            };
            inode.era = self.era;
        }
        self.txn.set_inode(inode);
        self.attrs.retain(|a| a.ino != inode.attr.ino);
        self.attrs.push(inode.attr);
    }

    fn touch_dir(&mut self, dir: &mut Inode) {
        dir.attr.mtime = self.now;
        self.save(dir);
    }

    fn create(&mut self, op: &NamespaceOp) -> Result<u64, Refusal> {
        let NamespaceOp::Create {
            parent,
            name,
            ino,
            version,
            kind,
            mode,
            uid,
            gid,
            rdev,
            target,
        } = op
        else {
            return no(libc::EINVAL);
        };
        check_name(name)?;
        let mut dir = self.txn.directory(*parent)?;
        if dir.attr.nlink == 0 {
            return no(libc::ENOENT);
        }
        if self.txn.dirent(*parent, name)?.is_some() {
            return no(libc::EEXIST);
        }
        let reservation = key::reserved(self.node, *ino);
        if self.txn.get(&reservation)?.is_none() || self.txn.get(&key::inode(*ino))?.is_some() {
            return no(libc::ESTALE);
        }
        self.txn.delete(reservation);
        let directory = *kind == Kind::Directory;
        if directory {
            if dir.attr.nlink >= LINK_MAX {
                return no(libc::EMLINK);
            }
            dir.attr.nlink += 1;
        }
        let size = match kind {
            Kind::Directory => 4096,
            Kind::Symlink => target.len() as u64,
            _ => 0,
        };
        let mut inode = Inode {
            attr: Attr {
                ino: *ino,
                version: *version,
                kind: *kind,
                mode: *mode & 0o7777,
                nlink: if directory { 2 } else { 1 },
                uid: *uid,
                gid: *gid,
                rdev: *rdev,
                size,
                blocks: if directory { 8 } else { 0 },
                atime: self.now,
                mtime: self.now,
                ctime: self.now,
                btime: self.now,
                has_xattr: false,
                layout: 0,
            },
            era: self.era,
            parent: *parent,
            next_cookie: FIRST_COOKIE,
            target: target.clone(),
        };
        let cookie = self.txn.add_dirent(&mut dir, name, *ino, *kind);
        self.touch_dir(&mut dir);
        self.save(&mut inode);
        self.effects.inodes += 1;
        Ok(cookie)
    }

    fn link(&mut self, ino: u64, parent: u64, name: &[u8]) -> Result<u64, Refusal> {
        check_name(name)?;
        let mut dir = self.txn.directory(parent)?;
        if dir.attr.nlink == 0 {
            return no(libc::ENOENT);
        }
        let mut inode = self.txn.inode(ino)?;
        if inode.attr.kind == Kind::Directory {
            return no(libc::EPERM);
        }
        if inode.attr.nlink == 0 {
            return no(libc::ENOENT);
        }
        if inode.attr.nlink >= LINK_MAX {
            return no(libc::EMLINK);
        }
        if self.txn.dirent(parent, name)?.is_some() {
            return no(libc::EEXIST);
        }
        inode.attr.nlink += 1;
        let cookie = self.txn.add_dirent(&mut dir, name, ino, inode.attr.kind);
        self.touch_dir(&mut dir);
        self.save(&mut inode);
        Ok(cookie)
    }

    /// The entry `name`, which must be the inode the requester believes.
    fn entry(&self, parent: u64, name: &[u8], ino: u64) -> Result<Inode, Refusal> {
        check_name(name)?;
        match self.txn.dirent(parent, name)? {
            None => no(libc::ENOENT),
            Some(d) if d.ino != ino => no(libc::ESTALE),
            Some(_) => self.txn.inode(ino),
        }
    }

    fn unlink(&mut self, parent: u64, name: &[u8], ino: u64, keep: bool) -> Result<(), Refusal> {
        let mut dir = self.txn.directory(parent)?;
        let inode = self.entry(parent, name, ino)?;
        if inode.attr.kind == Kind::Directory {
            return no(libc::EISDIR);
        }
        self.txn.delete(key::dirent(parent, name));
        self.touch_dir(&mut dir);
        self.drop_link(inode, keep)
    }

    fn drop_link(&mut self, mut inode: Inode, keep: bool) -> Result<(), Refusal> {
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

    fn remove_inode(&mut self, ino: u64) -> Result<(), Refusal> {
        for (key, _) in self.txn.scan_stored(&key::xattr(ino, &[]), usize::MAX)? {
            self.txn.delete(key);
        }
        self.txn.delete(key::inode(ino));
        self.txn.put(key::freed(ino), Vec::new());
        self.effects.freed.push(ino);
        self.effects.inodes -= 1;
        Ok(())
    }

    fn is_empty(&self, ino: u64) -> Result<bool, Refusal> {
        Ok(self.txn.scan_stored(&key::dirent(ino, &[]), 1)?.is_empty())
    }

    fn rmdir(&mut self, parent: u64, name: &[u8], ino: u64) -> Result<(), Refusal> {
        let mut dir = self.txn.directory(parent)?;
        let inode = self.entry(parent, name, ino)?;
        if inode.attr.kind != Kind::Directory {
            return no(libc::ENOTDIR);
        }
        if !self.is_empty(ino)? {
            return no(libc::ENOTEMPTY);
        }
        self.txn.delete(key::dirent(parent, name));
        dir.attr.nlink = dir.attr.nlink.saturating_sub(1);
        self.touch_dir(&mut dir);
        self.remove_inode(ino)
    }

    /// Is `dir` the directory `above` or somewhere below it?
    fn is_below(&self, dir: u64, above: u64) -> Result<bool, Refusal> {
        let mut at = dir;
        loop {
            if at == above {
                return Ok(true);
            }
            if at == fsd_proto::ino::ROOT {
                return Ok(false);
            }
            at = self.txn.directory(at)?.parent;
        }
    }

    fn rename(&mut self, op: &NamespaceOp) -> Result<(u64, u64), Refusal> {
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
        let moved = self.entry(*parent, name, *ino)?;
        let target = self.txn.dirent(*new_parent, new_name)?;
        if target.map(|t| t.ino) != *replaced {
            return no(libc::ESTALE);
        }
        let mut to = self.txn.directory(*new_parent)?;
        if to.attr.nlink == 0 {
            return no(libc::ENOENT);
        }
        let directory = moved.attr.kind == Kind::Directory;
        if directory && parent != new_parent && self.is_below(*new_parent, *ino)? {
            return no(libc::EINVAL);
        }
        let other = target.map(|t| self.txn.inode(t.ino)).transpose()?;
        if noreplace && other.is_some() {
            return no(libc::EEXIST);
        }
        if exchange {
            let Some(other) = other else {
                return no(libc::ENOENT);
            };
            return self.exchange(*parent, name, moved, *new_parent, new_name, other);
        }
        if let Some(other) = &other {
            if other.attr.ino == *ino {
                return Ok((0, 0)); // two names of one inode: nothing happens
            }
            match (directory, other.attr.kind == Kind::Directory) {
                (true, false) => return no(libc::ENOTDIR),
                (false, true) => return no(libc::EISDIR),
                (true, true) if !self.is_empty(other.attr.ino)? => return no(libc::ENOTEMPTY),
                _ => {}
            }
        }
        self.txn.delete(key::dirent(*parent, name));
        if parent != new_parent {
            let mut from = self.txn.directory(*parent)?;
            if directory {
                from.attr.nlink = from.attr.nlink.saturating_sub(1);
                to.attr.nlink += 1;
            }
            self.touch_dir(&mut from);
        }
        let cookie = self.txn.add_dirent(&mut to, new_name, *ino, moved.attr.kind);
        if other.as_ref().is_some_and(|o| o.attr.kind == Kind::Directory) {
            to.attr.nlink = to.attr.nlink.saturating_sub(1);
        }
        self.touch_dir(&mut to);
        let mut moved = moved;
        moved.parent = *new_parent;
        self.save(&mut moved);
        if let Some(other) = other {
            if other.attr.kind == Kind::Directory {
                self.remove_inode(other.attr.ino)?;
            } else {
                self.drop_link(other, *keep)?;
            }
        }
        Ok((cookie, 0))
    }

    fn exchange(
        &mut self,
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
        if b.attr.kind == Kind::Directory && self.is_below(parent, b.attr.ino)? {
            return no(libc::EINVAL);
        }
        let mut from = self.txn.directory(parent)?;
        let first = self.txn.add_dirent(&mut from, name, b.attr.ino, b.attr.kind);
        let second;
        if parent == new_parent {
            second = self.txn.add_dirent(&mut from, new_name, a.attr.ino, a.attr.kind);
            self.touch_dir(&mut from);
        } else {
            let mut to = self.txn.directory(new_parent)?;
            second = self.txn.add_dirent(&mut to, new_name, a.attr.ino, a.attr.kind);
            let (a_dir, b_dir) = (a.attr.kind == Kind::Directory, b.attr.kind == Kind::Directory);
            if a_dir && !b_dir {
                from.attr.nlink -= 1;
                to.attr.nlink += 1;
            } else if b_dir && !a_dir {
                from.attr.nlink += 1;
                to.attr.nlink -= 1;
            }
            self.touch_dir(&mut from);
            self.touch_dir(&mut to);
        }
        a.parent = new_parent;
        b.parent = parent;
        self.save(&mut a);
        self.save(&mut b);
        // The cookie under the new name first, as for a plain rename.
        Ok((second, first))
    }

    /// Removes an orphan for good. `Ok(false)` if it is not one.
    ///
    /// # Errors
    /// The store failed.
    pub fn reap(mut self, ino: u64) -> Result<Option<(Txn<'a>, Effects)>, Refusal> {
        if self.txn.get(&key::orphan(ino))?.is_none() {
            return Ok(None);
        }
        self.txn.delete(key::orphan(ino));
        self.effects.orphans -= 1;
        self.remove_inode(ino)?;
        Ok(Some((self.txn, self.effects)))
    }
}

/// Stores attribute changes of an inode's exclusive holder; older versions than the one stored are ignored.
///
/// # Errors
/// The store failed. An inode that is gone is no error.
pub fn update(txn: &mut Txn<'_>, era: u32, change: &fsd_proto::wire::AttrUpdate) -> Result<(), Refusal> {
    let mut inode = match txn.inode(change.ino) {
        Ok(inode) => inode,
        Err(Refusal::Errno(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    if inode.era == era && change.version < inode.attr.version {
        return Ok(());
    }
    let a = &mut inode.attr;
    a.version = change.version;
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
#[path = "names_tests.rs"]
mod tests;
