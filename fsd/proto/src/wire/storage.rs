//! Requests to a storage node and its answers.

use serde::{Deserialize, Serialize};

use super::membership::{DeadMount, Records};

/// A place in a storage node's pool: where a block of a file lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Frame {
    /// Offset in the pool, bytes.
    pub offset: u64,
    /// Size class, bytes: 4 KiB, 16 KiB, 64 KiB or 256 KiB.
    pub size: u32,
}

/// A block whose frame is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockWant {
    /// Inode.
    pub ino: u64,
    /// Block number in the file.
    pub block: u64,
    /// Least size of the frame, bytes; a smaller frame there is replaced by a larger one with its contents.
    pub size: u32,
}

/// A block and its frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockFrame {
    /// Block number in the file.
    pub block: u64,
    /// Where it is.
    pub frame: Frame,
    /// The storage node cannot read what was stored of it: to be answered with EIO, until it is freed.
    pub lost: bool,
}

/// Most ranges of blocks in one request to free them: the thread that answers also serves one-sided operations of others.
pub const MOST_RANGES: usize = 256;

/// Blocks of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockRange {
    /// Inode.
    pub ino: u64,
    /// First block.
    pub first: u64,
    /// Last block.
    pub last: u64,
}

impl BlockRange {
    /// All blocks of an inode.
    #[must_use]
    pub fn all(ino: u64) -> Self {
        let (first, last) = (0, u64::MAX);
        Self { ino, first, last }
    }

    /// A single block.
    #[must_use]
    pub fn one(ino: u64, block: u64) -> Self {
        let (first, last) = (block, block);
        Self { ino, first, last }
    }
}

/// A part of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Inode.
    pub ino: u64,
    /// Block number in the file.
    pub block: u64,
    /// Offset in the block, bytes.
    pub at: u32,
    /// Length, bytes.
    pub len: u32,
}

/// Everything a storage node is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StorageRequest {
    /// First request on a connection: the keys of the registered regions.
    Attach,
    /// Key of a segment of the lease table (made if it does not exist yet).
    LeaseSegment {
        /// Number of the segment.
        segment: u32,
    },
    /// Sets bytes aside for this mount, to be used by later allocations; grants what it can.
    Reserve {
        /// How much it needs, bytes.
        needed: u64,
        /// How much it would like to have for later, bytes; granted only where there is plenty.
        wanted: u64,
    },
    /// Gives a reservation back.
    Unreserve {
        /// How much, bytes.
        bytes: u64,
    },
    /// Frames for blocks, zeroed where new. All or nothing.
    Allocate {
        /// The blocks.
        wants: Vec<BlockWant>,
        /// Bytes of this mount's reservation to use up for it.
        reserved: u64,
    },
    /// Frames of the blocks `first ..` of an inode on this node, at most `count`.
    Lookup {
        /// Inode.
        ino: u64,
        /// First block.
        first: u64,
        /// Most blocks to answer.
        count: u32,
    },
    /// Frees blocks, of many inodes at once: all, or none where it is refused. Blocks that are not there are passed over, so it may
    /// be asked again.
    Free {
        /// Which, at most [`MOST_RANGES`].
        ranges: Vec<BlockRange>,
    },
    /// Makes what has been written to blocks durable.
    Flush {
        /// Inodes of which all is meant.
        inos: Vec<u64>,
        /// Parts of others, of which all else is durable.
        parts: Vec<Part>,
        /// What is to be written to the parts first, one after the other; empty: it is there.
        data: Vec<u8>,
    },
    /// Clears the whole lease table (no mount is alive). From the metadata server only.
    ResetLeases,
    /// A life of a mount is dead: its connections are ended, and nothing of it is served any more, for ever. Answered when nothing
    /// of it can change memory any more. From the metadata server only.
    Fence {
        /// Who.
        dead: DeadMount,
    },
    /// The lease records that one of the dead owns: their files may have bytes beyond the end, which are to be cut off before the
    /// records are free. From the metadata server only.
    Owned {
        /// Who.
        dead: Vec<DeadMount>,
        /// The first record that is looked at.
        from: u64,
    },
    /// Frees the lease records that the dead own, and takes their bits out of all others. Only once they are fenced everywhere, and
    /// no living mount is about to name them in a record. From the metadata server only.
    Recover {
        /// Who.
        dead: Vec<DeadMount>,
    },
    /// Of which of these inodes the lease records say that they have no name, and that nobody owns them, has them open or keeps them. From
    /// the metadata server only.
    Unused {
        /// Their numbers.
        inos: Vec<u64>,
    },
    /// From the metadata server: how far its order is durable; what is known of that, and the store's generation, is answered.
    Compare {
        /// The place.
        place: u64,
        /// It is to be noted also if a later one is known.
        accept: bool,
    },
    /// For `statfs`: only what can be told without looking at the lease table or the dirty counters.
    Space,
    /// For `fsd status`.
    Status,
    /// The inodes greater than `after` that have blocks on this node, in order; a part of them. From the metadata server.
    Inodes {
        /// The last one of the part before.
        after: u64,
    },
    /// Gives back what lies beyond the ends of files, durably (no mount is alive). From the metadata server only.
    Cut {
        /// Inodes and their sizes, bytes; none for those that are no more.
        ends: Vec<(u64, Option<u64>)>,
    },
}

/// What a mount learns when it attaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// Region of the pool.
    pub pool_key: u64,
    /// Region of the dirty counters: one u64 for each 256 KiB of the pool, to be incremented by
    /// fetch-and-add after a write.
    pub dirty_key: u64,
    /// Lease records in a segment.
    pub segment_records: u32,
    /// Names this life of the lease table: another number means that all leases have been lost.
    pub table: u64,
    /// Names the node's store: another one at its address has none of its blocks.
    pub store: String,
    /// Generation of the store: one that is less than what is known is an older copy.
    pub generation: u64,
    /// How far the metadata server's order is known to be durable: one that ends before has an older copy of its store.
    pub place: u64,
}

/// How full a storage node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolSpace {
    /// Pool size, bytes.
    pub total: u64,
    /// Neither allocated nor reserved, bytes.
    pub free: u64,
}

/// State of a storage node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageStatus {
    /// Its id.
    pub id: u16,
    /// Pool size, bytes.
    pub total: u64,
    /// Neither allocated nor reserved, bytes.
    pub free: u64,
    /// Reserved by mounts, bytes.
    pub reserved: u64,
    /// Allocated frames.
    pub frames: u64,
    /// Lease records with an owner.
    pub exclusive: u64,
    /// Lease records with shared holders.
    pub shared: u64,
    /// Bytes not yet written to the backing file.
    pub dirty: u64,
    /// Blocks whose contents cannot be read.
    pub lost: u64,
    /// Copies on disk found damaged since start, and made anew from memory.
    pub damaged: u64,
    /// Bytes checked on disk since start.
    pub checked: u64,
    /// Requests answered since start.
    pub requests: u64,
    /// Connections.
    pub connections: u64,
    /// For each mount that holds any: lease records that it holds.
    pub holders: Vec<(u16, u64)>,
    /// Generation of the store.
    pub generation: u64,
    /// How far the metadata server's order is known to be durable.
    pub place: u64,
    /// What is wrong there, one sentence each.
    pub troubles: Vec<String>,
}

/// Answers of a storage node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum StorageReply {
    /// Nothing more to say.
    Done,
    /// To `Attach`.
    Attached(Attached),
    /// To `LeaseSegment`: region key.
    Segment(u64),
    /// To `Reserve`: bytes granted.
    Reserved(u64),
    /// To `Allocate`: one frame for each want, in order.
    Allocated(Vec<Frame>),
    /// To `Lookup`: the blocks that have frames, in order.
    Blocks(Vec<BlockFrame>),
    /// To `Free` and `Cut`: bytes freed.
    Freed(u64),
    /// To `Compare`.
    Compared {
        /// The store's generation.
        generation: u64,
        /// The last place of the metadata server's order that was known before.
        place: u64,
    },
    /// To `Space`.
    Space(PoolSpace),
    /// To `Status`.
    Status(StorageStatus),
    /// To `Owned`.
    Records(Records),
    /// To `Inodes`, empty when there are no more, and to `Unused`.
    Inodes(Vec<u64>),
}
