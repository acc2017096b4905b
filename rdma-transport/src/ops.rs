//! Remote memory, and what can be done with it.

use crate::buffer::Buffer;
use crate::error::TransportError;

/// Names a registered region of one endpoint; unguessable enough not to collide between incarnations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RegionKey(pub u64);

/// A place in a peer's registered memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RemoteAddr {
    /// Region at the peer.
    pub key: RegionKey,
    /// Offset in that region, bytes.
    pub offset: u64,
}

impl RemoteAddr {
    /// The address `delta` bytes further on.
    #[must_use]
    pub fn plus(self, delta: u64) -> Self {
        Self {
            key: self.key,
            offset: self.offset.wrapping_add(delta),
        }
    }
}

/// What remote sides may do with a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// One-sided reads.
    pub read: bool,
    /// One-sided writes.
    pub write: bool,
    /// Compare-and-swap, fetch-and-add.
    pub atomic: bool,
}

impl Access {
    /// Everything.
    pub const ALL: Self = Self {
        read: true,
        write: true,
        atomic: true,
    };
    /// Reads only.
    pub const READ: Self = Self {
        read: true,
        write: false,
        atomic: false,
    };
}

/// One operation of a blocking batch, with the caller's buffers.
#[derive(Debug)]
pub enum Op<'a> {
    /// Remote memory → `into`.
    Read {
        /// Source.
        at: RemoteAddr,
        /// Destination; its length is the length of the read.
        into: &'a mut [u8],
    },
    /// `from` → remote memory.
    Write {
        /// Destination.
        at: RemoteAddr,
        /// Source.
        from: &'a [u8],
    },
    /// 64-bit compare-and-swap (8-byte aligned, host byte order); `old` gets the value found.
    Cas {
        /// The word.
        at: RemoteAddr,
        /// Value it must have.
        expect: u64,
        /// Value it then gets.
        new: u64,
        /// Value that was found.
        old: u64,
    },
    /// 64-bit fetch-and-add, wrapping; `old` gets the value before.
    Faa {
        /// The word.
        at: RemoteAddr,
        /// What to add (two's complement to subtract).
        add: u64,
        /// Value before.
        old: u64,
    },
}

/// One operation of an asynchronous batch; owns what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AsyncOp {
    /// Remote memory → `into`, all of it.
    Read {
        /// Source.
        at: RemoteAddr,
        /// Destination; its length is the length of the read.
        into: Buffer,
    },
    /// `from` → remote memory, all of it.
    Write {
        /// Destination.
        at: RemoteAddr,
        /// Source.
        from: Buffer,
    },
    /// Read `words` consecutive u64 (at most 64), each 8-byte aligned and never torn.
    ReadWords {
        /// First word.
        at: RemoteAddr,
        /// How many.
        words: u32,
    },
    /// As [`Op::Cas`].
    Cas {
        /// The word.
        at: RemoteAddr,
        /// Value it must have.
        expect: u64,
        /// Value it then gets.
        new: u64,
    },
    /// As [`Op::Faa`].
    Faa {
        /// The word.
        at: RemoteAddr,
        /// What to add.
        add: u64,
    },
}

impl AsyncOp {
    /// The buffer it owns.
    pub(crate) fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Read { into: buffer, .. } | Self::Write { from: buffer, .. } => Some(buffer),
            Self::ReadWords { .. } | Self::Cas { .. } | Self::Faa { .. } => None,
        }
    }
}

/// Result of one [`AsyncOp`], in the order of the batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpResult {
    /// The buffer that was read into.
    Read(Buffer),
    /// The buffer that was written from.
    Written(Buffer),
    /// The words read.
    Words(Vec<u64>),
    /// The value before a compare-and-swap or fetch-and-add.
    Old(u64),
}

impl OpResult {
    /// The buffer that comes back with it.
    pub(crate) fn into_buffer(self) -> Option<Buffer> {
        match self {
            Self::Read(buffer) | Self::Written(buffer) => Some(buffer),
            Self::Words(_) | Self::Old(_) => None,
        }
    }
}

/// A batch that failed: which of its operations have taken effect is unknown.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{why}")]
pub struct BatchError {
    /// The first failure.
    pub why: TransportError,
    /// The buffers of the batch's reads and writes, in its order; what is in those read into is unknown.
    pub buffers: Vec<Buffer>,
}

impl BatchError {
    /// The failure of a batch of which nothing was started.
    pub(crate) fn unstarted(why: TransportError, batch: Vec<AsyncOp>) -> Self {
        let buffers = batch.into_iter().filter_map(AsyncOp::into_buffer).collect();
        Self { why, buffers }
    }
}

/// The failure of a batch without buffers.
impl From<TransportError> for BatchError {
    fn from(why: TransportError) -> Self {
        Self {
            why,
            buffers: Vec::new(),
        }
    }
}

impl From<BatchError> for TransportError {
    fn from(error: BatchError) -> Self {
        error.why
    }
}

/// What became of a submitted batch: the results, one an operation, in its order.
pub type Outcome = Result<Vec<OpResult>, BatchError>;

/// Called exactly once for a submitted batch: from the submitting thread before `submit` or the
/// [`Connection::attend`](crate::Connection::attend) around it returns, or from the endpoint's progress thread. It must
/// not block.
pub type Completion = Box<dyn FnOnce(Outcome) + Send>;
