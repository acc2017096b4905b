//! Keys and values of the metadata store, and transactions over them.
//!
//! | key | value |
//! | --- | --- |
//! | `S` | superblock |
//! | `I` ino | inode |
//! | `D` parent name | directory entry |
//! | `X` ino name | extended attribute |
//! | `O` ino | orphan: no name, still open |
//! | `F` ino | gone; its blocks are still to be freed on the storage nodes |
//! | `N` shard | next record index |
//! | `U` shard index | record index free for use again, with its next generation |
//! | `W` shard index | the same of one that is worn: used only when there is no other |
//! | `V` node ino | number reserved by a mount |
//! | `C` node | mount |
//! | `L` node seq | answer of a transaction, for exactly-once |
//! | `J` node | number of the last change that a mount has carried out itself, likewise |
//! | `T` | the storage nodes' stores |
//! | `E` | place of the last transaction in the order of all |
//! | `Y` | the epoch, and the dead whose leases are still to be taken back |
//! | `Z` | the server stopped in order, and nothing has been carried out since |

use std::collections::HashMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Refusal, no};
use fsd_node::store::{Batch, Store, StoreError};
use fsd_proto::ino;
use fsd_proto::layout::FIRST_COOKIE;
use fsd_proto::wire::{Attr, Kind, Time};

/// What format fixed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Superblock {
    /// Layout version of this store.
    pub layout: u32,
    /// Cluster name.
    pub cluster: String,
    /// Random name given at format time.
    pub uuid: String,
    /// Bytes of a lease record.
    pub record_bytes: u32,
    /// Number of storage nodes.
    pub shards: u16,
    /// Moves on when lease versions start again: stored versions of older eras count as zero.
    pub era: u32,
    /// The lease tables of the current era, by storage node.
    pub tables: Vec<u64>,
}

/// Layout version of this build.
pub const LAYOUT: u32 = 3;

/// A stored inode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inode {
    /// Attributes.
    pub attr: Attr,
    /// Era of `attr.version`.
    pub era: u32,
    /// The attributes are of a tenure that began with `attr.version`: what was told at the end of the one before is older.
    pub midway: bool,
    /// Directory above, for directories.
    pub parent: u64,
    /// Next cookie, for directories.
    pub next_cookie: u64,
    /// Target, for symbolic links.
    pub target: Vec<u8>,
}

impl Inode {
    /// Its attributes as mounts are told them: with the cookie that a directory's next entry gets.
    pub fn told(&self) -> Attr {
        let layout = match self.attr.kind {
            Kind::Directory => self.next_cookie,
            _ => self.attr.layout,
        };
        Attr { layout, ..self.attr }
    }
}

/// A stored directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dirent {
    /// Inode.
    pub ino: u64,
    /// Type.
    pub kind: Kind,
    /// Position.
    pub cookie: u64,
}

/// A stored mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Incarnation of the node number.
    pub incarnation: u8,
    /// Random number of the process; 0 once it has left.
    pub life: u64,
    /// Host and mount point.
    pub name: String,
    /// Address.
    pub listen: String,
}

/// Composes keys.
pub mod key {
    fn tagged(tag: u8, number: u64, rest: &[u8]) -> Vec<u8> {
        let mut key = Vec::with_capacity(9 + rest.len());
        key.push(tag);
        key.extend_from_slice(&number.to_be_bytes());
        key.extend_from_slice(rest);
        key
    }
    /// Superblock.
    pub fn superblock() -> Vec<u8> {
        vec![b'S']
    }
    /// The storage nodes' stores.
    pub fn stores() -> Vec<u8> {
        vec![b'T']
    }
    /// The last known generations of the storage nodes' stores.
    pub fn generations() -> Vec<u8> {
        vec![b'G']
    }
    /// Inode.
    pub fn inode(ino: u64) -> Vec<u8> {
        tagged(b'I', ino, &[])
    }
    /// Directory entry.
    pub fn dirent(parent: u64, name: &[u8]) -> Vec<u8> {
        tagged(b'D', parent, name)
    }
    /// Extended attribute.
    pub fn xattr(ino: u64, name: &[u8]) -> Vec<u8> {
        tagged(b'X', ino, name)
    }
    /// Orphan.
    pub fn orphan(ino: u64) -> Vec<u8> {
        tagged(b'O', ino, &[])
    }
    /// Blocks to be freed.
    pub fn freed(ino: u64) -> Vec<u8> {
        tagged(b'F', ino, &[])
    }
    /// Next index of a shard.
    pub fn next_index(shard: u16) -> Vec<u8> {
        tagged(b'N', u64::from(shard), &[])
    }
    /// Record index to be used again.
    pub fn reusable(shard: u16, index: u64) -> Vec<u8> {
        tagged(b'U', u64::from(shard), &index.to_be_bytes())
    }
    /// Record index of which larger numbers would be made.
    pub fn worn(shard: u16, index: u64) -> Vec<u8> {
        tagged(b'W', u64::from(shard), &index.to_be_bytes())
    }
    /// Reserved inode number.
    pub fn reserved(node: u16, ino: u64) -> Vec<u8> {
        tagged(b'V', u64::from(node), &ino.to_be_bytes())
    }
    /// Mount.
    pub fn member(node: u16) -> Vec<u8> {
        tagged(b'C', u64::from(node), &[])
    }
    /// Answer of a transaction.
    pub fn answer(node: u16, seq: u64) -> Vec<u8> {
        tagged(b'L', u64::from(node), &seq.to_be_bytes())
    }
    /// Number of the last change that a mount has carried out itself.
    pub fn carried(node: u16) -> Vec<u8> {
        tagged(b'J', u64::from(node), &[])
    }
    /// Place of the last transaction.
    pub fn executed() -> Vec<u8> {
        vec![b'E']
    }
    /// The epoch.
    pub fn view() -> Vec<u8> {
        vec![b'Y']
    }
    /// The server stopped in order.
    pub fn stopped() -> Vec<u8> {
        vec![b'Z']
    }
    /// The number after the tag.
    pub fn number(key: &[u8]) -> u64 {
        key.get(1..9)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_be_bytes)
    }
    /// The second number.
    pub fn second(key: &[u8]) -> u64 {
        key.get(9..17)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_be_bytes)
    }
    /// What follows the first number.
    pub fn rest(key: &[u8]) -> &[u8] {
        key.get(9..).unwrap_or_default()
    }
}

/// Decodes a stored value.
///
/// # Errors
/// `EIO` for a damaged value.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Refusal> {
    postcard::from_bytes(bytes).or_else(|error| {
        tracing::error!("a stored value cannot be read: {error}");
        no(libc::EIO)
    })
}

/// Encodes a value to be stored.
pub fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    // None of the stored types has a form that postcard refuses.
    postcard::to_stdvec(value).unwrap_or_default()
}

/// A transaction: reads see its own writes; nothing is applied before [`Txn::commit`].
pub struct Txn<'a> {
    store: &'a dyn Store,
    changed: HashMap<Vec<u8>, Option<Vec<u8>>>,
    /// The next entry's cookie is at least this.
    least_cookie: u64,
}

impl<'a> Txn<'a> {
    /// Begins.
    pub fn new(store: &'a dyn Store) -> Self {
        Self {
            store,
            changed: HashMap::new(),
            least_cookie: 0,
        }
    }

    /// The entry that is made gets at least this cookie: the mount that has made it has foreseen it. It may know of entries, whose mount
    /// died together with this server's host, that this store has forgotten.
    pub fn foreseen(&mut self, cookie: u64) {
        self.least_cookie = cookie;
    }

    /// The value of a key as this transaction sees it, its own changes included.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
        match self.changed.get(key) {
            Some(value) => Ok(value.clone()),
            None => Ok(self.store.get(key)?),
        }
    }

    /// Sets a key when the transaction is committed.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.changed.insert(key, Some(value));
    }

    /// Removes a key when the transaction is committed.
    pub fn delete(&mut self, key: Vec<u8>) {
        self.changed.insert(key, None);
    }

    /// The stored pairs with a prefix (not those of this transaction).
    pub fn scan_stored(&self, prefix: &[u8], limit: usize) -> Result<Vec<fsd_node::store::Pair>, Refusal> {
        Ok(self
            .store
            .scan(prefix, &fsd_node::store::prefix_end(prefix), limit)?)
    }

    /// The record of an inode that is no more can be used again.
    pub fn recycle(&mut self, ino: u64) {
        let (shard, index, next) = (ino::shard(ino), ino::index(ino), ino::next_generation(ino));
        let key = if next < ino::WORN {
            key::reusable(shard, index)
        } else {
            key::worn(shard, index)
        };
        self.put(key, encode(&next));
    }

    /// The stored inode of a number.
    ///
    /// # Errors
    /// `ENOENT` if there is none.
    pub fn inode(&self, ino: u64) -> Result<Inode, Refusal> {
        self.get(&key::inode(ino))?
            .map_or_else(|| no(libc::ENOENT), |bytes| decode(&bytes))
    }

    /// An inode that must be a directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTDIR`.
    pub fn directory(&self, ino: u64) -> Result<Inode, Refusal> {
        let inode = self.inode(ino)?;
        if inode.attr.kind == Kind::Directory {
            Ok(inode)
        } else {
            no(libc::ENOTDIR)
        }
    }

    /// Stores an inode.
    pub fn set_inode(&mut self, inode: &Inode) {
        self.put(key::inode(inode.attr.ino), encode(inode));
    }

    /// The entry of a name in a directory, if there is one.
    pub fn dirent(&self, parent: u64, name: &[u8]) -> Result<Option<Dirent>, Refusal> {
        self.get(&key::dirent(parent, name))?
            .map(|bytes| decode(&bytes))
            .transpose()
    }

    /// Stores a directory entry under the directory's next cookie, which it returns.
    pub fn add_dirent(&mut self, parent: &mut Inode, name: &[u8], ino: u64, kind: Kind) -> u64 {
        let cookie = parent.next_cookie.max(self.least_cookie);
        parent.next_cookie = cookie + 1;
        self.put(
            key::dirent(parent.attr.ino, name),
            encode(&Dirent { ino, kind, cookie }),
        );
        cookie
    }

    /// Applies all changes to the store as one batch.
    pub fn commit(self) -> Result<(), StoreError> {
        let mut batch = Batch::default();
        for (key, value) in self.changed {
            match value {
                Some(value) => batch.put(key, value),
                None => batch.delete(key),
            }
        }
        if batch.is_empty() {
            Ok(())
        } else {
            self.store.apply(batch)
        }
    }
}

/// The root directory of a new file system.
pub fn new_root(now: Time, uid: u32, gid: u32) -> Inode {
    Inode {
        attr: Attr {
            ino: fsd_proto::ino::ROOT,
            version: 0,
            kind: Kind::Directory,
            mode: 0o755,
            nlink: 2,
            uid,
            gid,
            rdev: 0,
            size: 4096,
            blocks: 8,
            atime: now,
            mtime: now,
            ctime: now,
            btime: now,
            has_xattr: false,
            layout: 0,
        },
        era: 0,
        midway: false,
        parent: fsd_proto::ino::ROOT,
        next_cookie: FIRST_COOKIE,
        target: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::store::FjallStore;

    #[test]
    fn an_entry_gets_no_cookie_that_its_mount_knows_of_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = FjallStore::open(dir.path()).unwrap();
        let mut txn = Txn::new(&store);
        let mut root = new_root(Time(0), 0, 0);
        assert_eq!(txn.add_dirent(&mut root, b"a", 5, Kind::File), FIRST_COOKIE);
        txn.foreseen(9);
        assert_eq!(txn.add_dirent(&mut root, b"b", 6, Kind::File), 9);
        // What it does not know of is greater: it is told.
        txn.foreseen(4);
        assert_eq!(txn.add_dirent(&mut root, b"c", 7, Kind::File), 10);
        assert_eq!(root.told().layout, 11);
    }
}
