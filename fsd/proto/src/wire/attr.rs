//! Inode attributes as they travel between nodes and with lease grants.

use serde::{Deserialize, Serialize};

use super::storage::Frame;
pub use crate::time::Time;

/// Type of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
    /// Character device.
    Char,
    /// Block device.
    Block,
}

impl Kind {
    /// From the type bits of a mode.
    #[must_use]
    pub fn from_mode(mode: u32) -> Option<Self> {
        Some(match mode & libc::S_IFMT {
            libc::S_IFREG | 0 => Self::File,
            libc::S_IFDIR => Self::Directory,
            libc::S_IFLNK => Self::Symlink,
            libc::S_IFIFO => Self::Fifo,
            libc::S_IFSOCK => Self::Socket,
            libc::S_IFCHR => Self::Char,
            libc::S_IFBLK => Self::Block,
            _ => return None,
        })
    }
}

/// Everything `stat` tells of an inode, and the version of its lease record it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attr {
    /// Inode number.
    pub ino: u64,
    /// Version of the lease record that these attributes belong to (`OwnerWord::MAX_VERSION` at most).
    pub version: u64,
    /// Type.
    pub kind: Kind,
    /// Permission bits, 12 of them.
    pub mode: u16,
    /// Hard links.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of special files.
    pub rdev: u32,
    /// Size, bytes.
    pub size: u64,
    /// Allocated storage, 512-byte units.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last modification of the data.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// The inode has extended attributes.
    pub has_xattr: bool,
    /// Moves on when blocks get or lose frames: the map of frames stays valid while it is the same. Of a directory: the cookie that
    /// its next entry gets.
    pub layout: u64,
}

impl Attr {
    /// Encodes for the payload of a lease grant.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_stdvec(self).unwrap_or_default()
    }

    /// Decodes a lease grant's payload.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::from_bytes(bytes).ok()
    }
}

/// Where the blocks of a small file are: all that some storage nodes have of it, under the layout number of the attributes beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Places {
    /// Storage nodes that have nothing else of the file.
    pub nodes: Vec<u16>,
    /// Blocks by number, and where each is.
    pub frames: Vec<(u64, Frame)>,
}

impl Places {
    /// Most blocks, and most storage nodes, that go along with a lease: a grant is short.
    pub const MOST: usize = 8;

    /// The payload of a lease grant with attributes and, behind them, perhaps this.
    #[must_use]
    pub fn encode_behind(attr: &Attr, places: Option<&Self>) -> Vec<u8> {
        let mut payload = attr.encode();
        if let Some(places) = places {
            payload.extend(postcard::to_stdvec(places).unwrap_or_default());
        }
        payload
    }

    /// What is behind the attributes in the payload of a lease grant.
    #[must_use]
    pub fn decode_behind(payload: &[u8]) -> Option<Self> {
        let (_, rest) = postcard::take_from_bytes::<Attr>(payload).ok()?;
        let places: Self = postcard::from_bytes(rest).ok()?;
        (places.nodes.len() <= Self::MOST && places.frames.len() <= Self::MOST).then_some(places)
    }
}

/// What the holder of an exclusive lease has changed in an inode's attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttrUpdate {
    /// Inode.
    pub ino: u64,
    /// That of the lease record when the tenure ended; older updates are ignored.
    pub version: u64,
    /// The tenure goes on: it *began* with that version, and so these are newer than those of the tenure that ended with it, which another
    /// mount may still be about to tell.
    pub midway: bool,
    /// Permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size, bytes.
    pub size: u64,
    /// Allocated storage, 512-byte units.
    pub blocks: u64,
    /// Last access.
    pub atime: Time,
    /// Last modification.
    pub mtime: Time,
    /// Last change.
    pub ctime: Time,
    /// Layout number.
    pub layout: u64,
}

impl AttrUpdate {
    /// Those of a tenure that goes on and began with this version.
    #[must_use]
    pub fn midway(attr: &Attr, version: u64) -> Self {
        Self {
            version,
            midway: true,
            ..Self::from(attr)
        }
    }
}

impl From<&Attr> for AttrUpdate {
    fn from(a: &Attr) -> Self {
        Self {
            ino: a.ino,
            version: a.version,
            midway: false,
            mode: a.mode,
            uid: a.uid,
            gid: a.gid,
            size: a.size,
            blocks: a.blocks,
            atime: a.atime,
            mtime: a.mtime,
            ctime: a.ctime,
            layout: a.layout,
        }
    }
}

impl Attr {
    /// Those of an ordinary file of root's, with nothing told of its times.
    #[must_use]
    pub fn of_file(ino: u64, version: u64, size: u64) -> Self {
        Self {
            ino,
            version,
            kind: Kind::File,
            mode: 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size,
            blocks: 0,
            atime: Time(0),
            mtime: Time(0),
            ctime: Time(0),
            btime: Time(0),
            has_xattr: false,
            layout: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_has_the_longest_places() {
        let frame = |n| Frame {
            offset: u64::MAX - n,
            size: u32::MAX,
        };
        let places = Places {
            nodes: (0..Places::MOST as u16).map(|n| u16::MAX - n).collect(),
            frames: (0..Places::MOST as u64)
                .map(|n| (u64::MAX - n, frame(n)))
                .collect(),
        };
        let attr = Attr::of_file(u64::MAX, u64::MAX, u64::MAX);
        let payload = Places::encode_behind(&attr, Some(&places));
        assert!(
            payload.len() <= lockmgr::msg::MAX_PAYLOAD,
            "{} bytes",
            payload.len()
        );
        assert_eq!(
            (Attr::decode(&payload), Places::decode_behind(&payload)),
            (Some(attr), Some(places))
        );
        let alone = Places::encode_behind(&attr, None);
        assert_eq!(
            (Attr::decode(&alone), Places::decode_behind(&alone)),
            (Some(attr), None)
        );
        assert_eq!(Places::decode_behind(&payload[..payload.len() - 1]), None);
    }

    proptest::proptest! {
        #[test]
        fn times_keep_their_nanoseconds(n in i64::MIN / 2..i64::MAX / 2) {
            proptest::prop_assert_eq!(Time::from_system(Time(n).to_system()), Time(n));
        }
    }
}
