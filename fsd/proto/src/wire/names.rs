//! Changes of the namespace, and what comes of them.

use serde::{Deserialize, Serialize};

use super::attr::{Attr, Kind, Time};
use crate::layout::FIRST_COOKIE;

/// An inode that the requester holds exclusively, and the version it will have when it lets go of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Touched {
    /// Inode.
    pub ino: u64,
    /// Version after the requester's tenure.
    pub version: u64,
}

/// A change of the namespace, one transaction each. The requester holds the exclusive leases of every inode
/// in `touched` (parents, and the inodes named).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamespaceOp {
    /// New file, directory, special file or symbolic link.
    Create {
        /// Directory.
        parent: u64,
        /// Name in it.
        name: Vec<u8>,
        /// Number of the new inode, from a reserved range of the requester.
        ino: u64,
        /// Version of the new inode's lease record.
        version: u64,
        /// Type.
        kind: Kind,
        /// Permission bits (umask applied; set-group-id inherited from the directory, whose mode the
        /// requester knows better than the server).
        mode: u16,
        /// Owner.
        uid: u32,
        /// Group.
        gid: u32,
        /// Device number.
        rdev: u32,
        /// Target of a symbolic link.
        target: Vec<u8>,
    },
    /// Another name for an inode.
    Link {
        /// Inode.
        ino: u64,
        /// Directory.
        parent: u64,
        /// New name.
        name: Vec<u8>,
    },
    /// Removes a name that is not a directory.
    Unlink {
        /// Directory.
        parent: u64,
        /// Name.
        name: Vec<u8>,
        /// Inode the requester believes it names (and holds exclusively).
        ino: u64,
        /// The inode is open somewhere: keep it as an orphan when its last name goes.
        keep: bool,
    },
    /// Removes an empty directory.
    Rmdir {
        /// Directory above.
        parent: u64,
        /// Name.
        name: Vec<u8>,
        /// Inode the requester believes it names.
        ino: u64,
    },
    /// Renames, replaces or exchanges.
    Rename {
        /// Directory of the old name.
        parent: u64,
        /// Old name.
        name: Vec<u8>,
        /// Inode the requester believes the old name has.
        ino: u64,
        /// Directory of the new name.
        new_parent: u64,
        /// New name.
        new_name: Vec<u8>,
        /// Inode the requester believes the new name has.
        replaced: Option<u64>,
        /// The replaced inode is open somewhere.
        keep: bool,
        /// `RENAME_NOREPLACE` (1), `RENAME_EXCHANGE` (2).
        flags: u32,
    },
    /// Sets an extended attribute.
    SetXattr {
        /// Inode.
        ino: u64,
        /// Name with its prefix.
        name: Vec<u8>,
        /// Value.
        value: Vec<u8>,
        /// `XATTR_CREATE` (1), `XATTR_REPLACE` (2).
        flags: i32,
    },
    /// Removes an extended attribute.
    RemoveXattr {
        /// Inode.
        ino: u64,
        /// Name.
        name: Vec<u8>,
    },
}

/// A change of the namespace that its mount has carried out itself, under exclusive leases.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// Time to record.
    pub now: Time,
    /// Inodes held exclusively.
    pub touched: Vec<Touched>,
    /// What was done.
    pub op: NamespaceOp,
    /// The cookie of the entry that was made, 0 if none.
    pub cookie: u64,
}

/// Where a change has come to lie that a mount had carried out itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Written {
    /// Its place in the order of all.
    pub place: u64,
    /// The cookie of the entry that was made, 0 if none or not known any more; should be that of [`Carried`].
    pub cookie: u64,
}

/// Result of a namespace transaction: the new attributes of the inodes it changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// Attributes of every inode changed that still exists.
    pub attrs: Vec<Attr>,
    /// Cookie of the entry made, 0 if none.
    pub cookie: u64,
    /// Cookie of the second entry made (exchange), 0 if none.
    pub second_cookie: u64,
}

impl NamespaceOp {
    /// The inodes that it concerns where these are held for it: those, and the one that it makes.
    pub fn inodes<'a>(&self, touched: &'a [Touched]) -> impl Iterator<Item = u64> + use<'a> {
        let made = match self {
            Self::Create { ino, .. } => Some(*ino),
            _ => None,
        };
        touched.iter().map(|t| t.ino).chain(made)
    }

    /// The attributes of the inode that it makes; none where it makes none. The server and the mount that foresees what it does agree on
    /// them.
    #[must_use]
    pub fn new_inode(&self, now: Time) -> Option<Attr> {
        let Self::Create {
            ino,
            version,
            kind,
            mode,
            uid,
            gid,
            rdev,
            target,
            ..
        } = self
        else {
            return None;
        };
        let (nlink, size, blocks, layout) = match kind {
            Kind::Directory => (2, 4096, 8, FIRST_COOKIE),
            Kind::Symlink => (1, target.len() as u64, 0, 0),
            _ => (1, 0, 0, 0),
        };
        Some(Attr {
            ino: *ino,
            version: *version,
            kind: *kind,
            mode: *mode & 0o7777,
            nlink,
            uid: *uid,
            gid: *gid,
            rdev: *rdev,
            size,
            blocks,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            has_xattr: false,
            layout,
        })
    }
}

impl Carried {
    /// The inodes that it concerns.
    pub fn inodes(&self) -> impl Iterator<Item = u64> + use<'_> {
        self.op.inodes(&self.touched)
    }
}
