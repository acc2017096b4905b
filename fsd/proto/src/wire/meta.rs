//! Requests to the metadata server and its answers.

use serde::{Deserialize, Serialize};

use crate::clock::Skew;
use crate::errno::Errno;

use super::attr::{Attr, AttrUpdate, Kind, Time};
use super::locks::{LockOwner, LockSpec};
use super::membership::Terms;
use super::names::{Carried, Created, NamespaceOp, Touched, Written};

/// Stands for the place of what is told in a recovery window beside transactions: it comes behind all of them and takes no place.
pub const BEHIND_ALL: u64 = u64::MAX;

/// Stands for all changes of names up to a moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The metadata server's process: marks of another one say nothing.
    pub life: u64,
    /// Changes that it has carried out.
    pub number: u64,
}

/// A transaction that a mount keeps until a crash of the metadata server's host can no longer undo it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logged {
    /// Its place in the order in which the server carried everything out, or [`BEHIND_ALL`].
    pub order: u64,
    /// What was asked: no `Replay`.
    #[serde(deserialize_with = "super::flat::flat")]
    pub request: MetaRequest,
}

/// Everything a client or tool asks the metadata server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaRequest {
    /// What the server's clock says; asked before `Join`.
    Clock,
    /// A mount joins, or comes back after the connection was lost (`node` then says which it is).
    Join {
        /// Node and incarnation it already has.
        again: Option<(u16, u8)>,
        /// Random number of this process.
        life: u64,
        /// Where other mounts reach it.
        listen: String,
        /// Host and mount point, for humans.
        name: String,
        /// What it has found out about the clocks.
        skew: Skew,
        /// File locks it holds (when it comes back).
        locks: Vec<LockSpec>,
        /// Up to here this server's order was durable, as it has been told: one that ends before has an older copy of its store.
        durable: u64,
    },
    /// The lease tables a mount has found, by storage node; said after `Join`, before the first lease.
    Tables {
        /// Their numbers.
        ids: Vec<u64>,
        /// The stores it has found at the addresses of the storage nodes.
        stores: Vec<String>,
        /// How far this server's order is known to be durable there.
        places: Vec<u64>,
    },
    /// A mount leaves; it holds no lease any more. Reserved inode numbers it has not used go back.
    Leave,
    /// Address of another mount.
    Peer {
        /// Its node number.
        node: u16,
    },
    /// Inode numbers for files to be created.
    ReserveInodes {
        /// How many.
        count: u32,
    },
    /// What a name in a directory is.
    Lookup {
        /// Directory.
        parent: u64,
        /// Name.
        name: Vec<u8>,
    },
    /// What a name in a directory is, and which names in it have been changed since a mark.
    LookupAgain {
        /// Directory.
        parent: u64,
        /// Name.
        name: Vec<u8>,
        /// As heard of this server.
        since: Mark,
    },
    /// Attributes.
    GetAttr {
        /// Inode.
        ino: u64,
    },
    /// Entries of a directory, in the order of their names.
    ReadDir {
        /// Directory.
        ino: u64,
        /// Name after which to go on (empty: from the start).
        after: Vec<u8>,
        /// Most entries.
        most: u32,
        /// Nobody waits for all of them: those that other mounts have changed and a crash could undo are left out, instead of being waited for.
        ahead: bool,
    },
    /// Target of a symbolic link.
    ReadLink {
        /// Inode.
        ino: u64,
    },
    /// All extended attributes of an inode.
    GetXattrs {
        /// Inode.
        ino: u64,
    },
    /// A transaction on the namespace, carried out exactly once.
    Namespace {
        /// Number of the request within the requester's life, for exactly-once.
        seq: u64,
        /// All numbers below this have been answered.
        acknowledged: u64,
        /// Time to record.
        now: Time,
        /// Inodes held exclusively.
        touched: Vec<Touched>,
        /// What to do.
        op: NamespaceOp,
    },
    /// Changes of the namespace that the mount has carried out itself, in order; each is carried out exactly once.
    WriteBack {
        /// Number of the first within the requester's life; the others follow.
        first: u64,
        /// The changes.
        changes: Vec<Carried>,
    },
    /// Attribute changes from the holders of exclusive leases.
    Update {
        /// One for each inode.
        updates: Vec<AttrUpdate>,
    },
    /// Everything answered so far is to survive a crash of the machine.
    Sync,
    /// A mount that has come back tells what it was answered and the restarted server's store may not have. The last part is
    /// answered when everybody's has been carried out again.
    Replay {
        /// In order.
        entries: Vec<Logged>,
        /// No more parts follow.
        last: bool,
    },
    /// Answered when the blocks of all files removed so far have been freed, or cannot be for now.
    Settle,
    /// The last close of an orphan.
    Reap {
        /// Inode.
        ino: u64,
    },
    /// Tests for a lock (`F_GETLK`).
    GetLock {
        /// The lock that would be set.
        lock: LockSpec,
    },
    /// Sets or clears a lock.
    SetLock {
        /// The lock.
        lock: LockSpec,
        /// Wait for it.
        wait: bool,
    },
    /// Gives up waiting for a lock.
    CancelLock {
        /// The lock waited for.
        lock: LockSpec,
    },
    /// Drops all locks of an owner on an inode.
    ReleaseLocks {
        /// Inode.
        ino: u64,
        /// Owner.
        owner: LockOwner,
    },
    /// What a mount holds of file locks is another one's from now on, which takes over from it; the sender is one of the two.
    GiveLocks {
        /// Who holds them.
        from: u16,
        /// Who is to.
        to: u16,
    },
    /// Capacity and inode counts.
    StatFs,
    /// A mount lives. `ESTALE`: it has been declared dead.
    Heartbeat,
    /// An operator's: this mount is to be declared dead now. Answered when what it had has been taken back.
    Evict {
        /// Its node number.
        node: u16,
    },
    /// A frame of lease messages for a mount that the sender cannot reach itself.
    Relay {
        /// The other mount.
        to: u16,
        /// The frame.
        #[serde(with = "serde_bytes")]
        frame: Vec<u8>,
    },
    /// For `fsd status`.
    Status,
    /// Where the storage nodes are, and what format fixed.
    Cluster,
}

/// A storage node as the cluster knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageInfo {
    /// Its id (= shard).
    pub id: u16,
    /// Its address.
    pub listen: String,
    /// Its store, if that is known: no other one at its address will do.
    pub store: Option<String>,
    /// The store's generation is at least this: one that is less is an older copy.
    pub generation: u64,
}

/// What a mount learns when it joins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinReply {
    /// Its node number: its bit in the lease records.
    pub node: u16,
    /// Its incarnation.
    pub incarnation: u8,
    /// Who takes part; a mount that comes back while leases of the dead are taken back is told again by a `View`.
    pub epoch: u64,
    /// How long it may act on that.
    pub terms: Terms,
    /// Bytes of a lease record.
    pub record_bytes: u32,
    /// The storage nodes.
    pub storage: Vec<StorageInfo>,
    /// The last transaction that the server's store has.
    pub executed: u64,
    /// The server has restarted, may have lost transactions, and waits for this mount's `Replay`.
    pub awaited: bool,
    /// Up to here the server's order is durable.
    pub durable: u64,
}

/// An inode number a mount may use for a new file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InoRange {
    /// The numbers.
    pub inos: Vec<u64>,
}

/// A name in a directory, with what it names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Name.
    pub name: Vec<u8>,
    /// Inode.
    pub ino: u64,
    /// Type.
    pub kind: Kind,
    /// Position: greater for entries made later, never used twice in a directory.
    pub cookie: u64,
}

/// A part of a directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page {
    /// Entries with their attributes.
    pub entries: Vec<(DirEntry, Attr)>,
    /// The name after which to go on; none if that was all.
    pub next: Option<Vec<u8>>,
    /// Names in the directory of which nothing is said, wherever they would be.
    pub left_out: Vec<Vec<u8>>,
}

impl Page {
    /// This one, where there is more behind its last entry.
    #[must_use]
    pub fn to_be_continued(mut self) -> Self {
        self.next = self.entries.last().map(|(entry, _)| entry.name.clone());
        self
    }
}

/// `statfs` figures of the metadata server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatFs {
    /// Inodes in use.
    pub inodes: u64,
    /// Inodes still possible.
    pub free: u64,
}

/// State of a node as the metadata server sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PeerState {
    /// Connected.
    Up,
    /// Connection lost, may come back.
    Lost,
    /// Gone without giving up its leases.
    Dead,
    /// Connected, but silent for longer than a third of its term.
    Late,
}

impl std::fmt::Display for PeerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Up => "up",
            Self::Lost => "lost",
            Self::Dead => "dead",
            Self::Late => "late",
        })
    }
}

/// A mount, for `fsd status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Node number.
    pub node: u16,
    /// Incarnation.
    pub incarnation: u8,
    /// Host and mount point.
    pub name: String,
    /// Address.
    pub listen: String,
    /// State.
    pub state: PeerState,
    /// File locks held.
    pub locks: u64,
    /// Since its last heartbeat, milliseconds.
    pub silent_ms: u64,
}

/// For `fsd status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetaStatus {
    /// Mounts.
    pub nodes: Vec<NodeInfo>,
    /// Inodes in use.
    pub inodes: u64,
    /// Unlinked inodes that are still open.
    pub orphans: u64,
    /// Removed inodes whose blocks are still to be freed.
    pub freeing: u64,
    /// Requests answered since start.
    pub requests: u64,
    /// Counts declared deaths.
    pub epoch: u64,
    /// Up to this place its order is durable.
    pub durable: u64,
    /// Generations of the storage nodes' stores, as last heard.
    pub generations: Vec<u64>,
    /// What is wrong as seen from there, one sentence each.
    pub troubles: Vec<String>,
}

/// Answers of the metadata server. Errors travel as errno in the response frame's `Result`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetaReply {
    /// Nothing more to say.
    Done,
    /// To what changes the store, and to `Sync`.
    Ordered {
        /// Place of this transaction in the order of all; 0 if it need not be kept.
        order: u64,
        /// Up to here a crash of the server's host undoes nothing.
        durable: u64,
        /// The answer itself.
        reply: Box<Self>,
    },
    /// To the last part of `Replay`: the transactions that could not be carried out again, by their place, and why.
    Replayed(Vec<(u64, Errno)>),
    /// To `Settle`.
    Settled {
        /// Files that have lost their last name, and are open.
        orphans: u64,
    },
    /// To `Clock`.
    Clock(Time),
    /// To `Join`.
    Joined(JoinReply),
    /// To `Peer`.
    Peer {
        /// Address.
        listen: String,
        /// State.
        state: PeerState,
    },
    /// To `ReserveInodes`.
    Inodes(InoRange),
    /// To `Lookup`: cookie and attributes; `None` where the name does not exist.
    Found(Option<(u64, Attr)>),
    /// To `GetAttr`.
    Attr(Attr),
    /// To `ReadDir`.
    Entries(Page),
    /// To `ReadLink`.
    Target(Vec<u8>),
    /// To `GetXattrs`.
    Xattrs(Vec<(Vec<u8>, Vec<u8>)>),
    /// To `Namespace`.
    Changed(Created),
    /// To `WriteBack`.
    WrittenBack {
        /// Up to here a crash of the server's host undoes nothing.
        durable: u64,
        /// What came of each change, of the first ones at least.
        written: Vec<Result<Written, Errno>>,
        /// Why the others were not tried: the store takes nothing just now. They are to be told again.
        stopped: Option<Errno>,
        /// Behind all these changes.
        mark: Mark,
    },
    /// To `LookupAgain`.
    FoundAgain {
        /// As in `Found`.
        found: Option<(u64, Attr)>,
        /// The names that have been changed; none if that is not known any more, or they are too many.
        changed: Option<Vec<Vec<u8>>>,
    },
    /// To `GetLock`: the lock in the way, if any.
    Lock(Option<LockSpec>),
    /// To `StatFs`.
    StatFs(StatFs),
    /// To `Status`.
    Status(MetaStatus),
    /// To `Cluster`.
    Cluster {
        /// Storage nodes.
        storage: Vec<StorageInfo>,
        /// Bytes of a lease record.
        record_bytes: u32,
    },
}
