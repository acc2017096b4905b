//! The lease record in remote memory.
//!
//! ```text
//! word 0       owner    [incarnation:8 | writer node + 1:11 | data version:34 | far:1 | holders, nodes 0 to 9:10]
//! word 1       flags
//! words 2..    holders  one bit a node, of nodes 10 and up
//! words ..     opens    one bit a node
//! words ..     uses     one bit a node
//! ```
//!
//! The holder bits of the first nodes are in the owner word: one atomic shows them, and the owner, at once. The others' are
//! in a map, and *far* says whether that must be looked at.

use crate::LeaseError;
use crate::ids::{NodeId, NodeSet};

/// Nodes whose holder bit is in the owner word: numbers below this.
pub const NEAR_NODES: u16 = 10;
const FAR: u64 = 1 << NEAR_NODES;
const VERSION_SHIFT: u32 = NEAR_NODES as u32 + 1;
/// Bits of the data version.
const VERSION_BITS: u32 = 34;
const WRITER_SHIFT: u32 = VERSION_SHIFT + VERSION_BITS;
const WRITER_MASK: u64 = 0x7ff;
const INCARNATION_SHIFT: u32 = 56;
// Every node that a record can have a bit for can own it, and the fields fill the word.
const _: () = assert!((NodeSet::MAX_NODES as u64) < WRITER_MASK && WRITER_SHIFT + 11 == INCARNATION_SHIFT);

/// Word 0 of a record, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OwnerWord {
    /// Incarnation of the writer (0 where there is none), so that a node that came back after its death is
    /// told apart from what it was.
    pub incarnation: u8,
    /// The node that holds, or is about to hold, the record exclusively.
    pub writer: Option<NodeId>,
    /// Version of the data, moved by every modifying tenure.
    pub version: u64,
    /// Nodes of [`NEAR_NODES`] and up may hold the record shared: their bits are to be looked at.
    pub far: bool,
    /// Nodes below [`NEAR_NODES`] that hold, or may hold, the record shared: bit *n* is node *n*.
    pub near: u16,
}

impl OwnerWord {
    /// Largest version; versions are cut to it.
    pub const MAX_VERSION: u64 = (1 << VERSION_BITS) - 1;
    /// An owner may have told readers of versions less than this much beyond the one in the word.
    pub const MOST_AHEAD: u64 = 1 << 16;
    /// Whoever frees the word of a dead owner moves the version on by as much: beyond all that anybody has been told, and so far that
    /// it shows ([`Self::has_died`]).
    pub const RECOVERY_STEP: u64 = 2 * Self::MOST_AHEAD;

    /// Between these versions, the one seen before and the one of now, an owner may have died: what it had told others, or had moved
    /// or freed elsewhere, need not be as they know it. Many changes by those that live look the same.
    #[must_use]
    pub const fn has_died(before: u64, now: u64) -> bool {
        now.wrapping_sub(before) & Self::MAX_VERSION > Self::MOST_AHEAD
    }

    /// The word after the death of everybody who knew the record under this one: nobody reads or writes, and no
    /// cache has the version.
    #[must_use]
    pub fn freed_after_death(self) -> Self {
        let step = if self.writer.is_some() {
            Self::RECOVERY_STEP
        } else {
            1
        };
        Self::free(self.version.wrapping_add(step))
    }

    /// Nobody reads or writes; the data have this version.
    #[must_use]
    pub const fn free(version: u64) -> Self {
        Self {
            incarnation: 0,
            writer: None,
            version: version & Self::MAX_VERSION,
            far: false,
            near: 0,
        }
    }

    /// Written by this node, without readers.
    #[must_use]
    pub const fn owned(writer: NodeId, incarnation: u8, version: u64) -> Self {
        Self {
            incarnation,
            writer: Some(writer),
            ..Self::free(version)
        }
    }

    /// With these readers.
    #[must_use]
    pub const fn read_by(self, near: u16, far: bool) -> Self {
        Self { far, near, ..self }
    }

    /// What only the owner, or who becomes it, may change: all but the near holders.
    #[must_use]
    pub const fn owners_part(self) -> Self {
        Self { near: 0, ..self }
    }

    /// The near holders.
    #[must_use]
    pub fn near_holders(self) -> NodeSet {
        NodeSet::from_words(&[self.near.into()])
    }

    /// As it is in memory.
    #[must_use]
    pub fn encode(self) -> u64 {
        let writer = self.writer.map_or(0, |n| u64::from(n.0) + 1) & WRITER_MASK;
        u64::from(self.incarnation) << INCARNATION_SHIFT
            | writer << WRITER_SHIFT
            | (self.version & Self::MAX_VERSION) << VERSION_SHIFT
            | if self.far { FAR } else { 0 }
            | u64::from(self.near) & (FAR - 1)
    }

    /// From memory; every value means something.
    #[must_use]
    pub fn decode(word: u64) -> Self {
        let writer = (word >> WRITER_SHIFT & WRITER_MASK) as u16;
        Self {
            incarnation: (word >> INCARNATION_SHIFT) as u8,
            writer: writer.checked_sub(1).map(NodeId),
            version: word >> VERSION_SHIFT & Self::MAX_VERSION,
            far: word & FAR != 0,
            near: (word & (FAR - 1)) as u16,
        }
    }
}

/// Where things are in a record of a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordLayout {
    words: u32,
}

impl RecordLayout {
    /// Offset of the owner word.
    pub const OWNER: u64 = 0;
    /// Offset of the flags, which are for the user of the leases.
    pub const FLAGS: u64 = 8;
    /// Offset of the bitmap of holders from node [`NEAR_NODES`] on.
    pub const HOLDERS: u64 = 16;

    /// The layout of records of 64, 128, 256 or 512 bytes.
    ///
    /// # Errors
    /// [`LeaseError::RecordSize`] for any other size.
    pub const fn new(record_bytes: u32) -> Result<Self, LeaseError> {
        match record_bytes {
            64 | 128 | 256 | 512 => Ok(Self {
                words: record_bytes / 8,
            }),
            _ => Err(LeaseError::RecordSize { bytes: record_bytes }),
        }
    }

    /// Bytes of a record.
    #[must_use]
    pub const fn record_bytes(self) -> u64 {
        self.words as u64 * 8
    }

    /// Words of each of the three bitmaps.
    #[must_use]
    pub const fn map_words(self) -> u32 {
        (self.words - 2) / 3
    }

    /// Nodes a record has bits for.
    #[must_use]
    pub const fn max_nodes(self) -> u16 {
        (self.map_words() * 64) as u16
    }

    /// Offset of the opens bitmap.
    #[must_use]
    pub const fn opens(self) -> u64 {
        Self::HOLDERS + self.map_words() as u64 * 8
    }

    /// Offset of the uses bitmap: beside an open bit, the node has the file open for writing; alone, it keeps the inode for a
    /// look-up.
    #[must_use]
    pub const fn uses(self) -> u64 {
        self.opens() + self.map_words() as u64 * 8
    }

    /// Offset in the record of the word with the node's holder bit, and the bit.
    #[must_use]
    pub const fn holder_bit(self, node: NodeId) -> (u64, u64) {
        if node.0 < NEAR_NODES {
            return (Self::OWNER, 1 << node.0);
        }
        (Self::HOLDERS + node.0 as u64 / 64 * 8, 1 << (node.0 % 64))
    }

    /// Offset in the record of the word with the node's open bit, and the bit.
    #[must_use]
    pub const fn open_bit(self, node: NodeId) -> (u64, u64) {
        (self.opens() + node.0 as u64 / 64 * 8, 1 << (node.0 % 64))
    }

    /// Offset in the record of the word with the node's use bit, and the bit.
    #[must_use]
    pub const fn use_bit(self, node: NodeId) -> (u64, u64) {
        (self.uses() + node.0 as u64 / 64 * 8, 1 << (node.0 % 64))
    }

    /// The set from the words of a bitmap read at [`Self::HOLDERS`], [`Self::opens`] or [`Self::uses`].
    #[must_use]
    pub fn set(self, words: &[u64]) -> NodeSet {
        NodeSet::from_words(&words[..words.len().min(self.map_words() as usize)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn owner_word_round_trip(word: u64) {
            prop_assert_eq!(OwnerWord::decode(word).encode(), word);
        }

        #[test]
        fn owner_fields_round_trip(
            incarnation: u8, node in 0..NodeSet::MAX_NODES, version in 0..=OwnerWord::MAX_VERSION, near in 0u16..1 << NEAR_NODES, far: bool,
        ) {
            let word = OwnerWord::owned(NodeId(node), incarnation, version).read_by(near, far);
            prop_assert_eq!(OwnerWord::decode(word.encode()), word);
            prop_assert_eq!(word.encode() - word.owners_part().encode(), u64::from(near));
            let free = OwnerWord::free(version);
            prop_assert_eq!(OwnerWord::decode(free.encode()), free);
            prop_assert_eq!(OwnerWord::free(0).encode(), 0);
        }

        #[test]
        fn bits_stay_in_their_map(size in prop::sample::select(vec![64u32, 128, 256, 512]), node in 0u16..1280) {
            let layout = RecordLayout::new(size).unwrap();
            prop_assume!(node < layout.max_nodes());
            let (at, bit) = layout.holder_bit(NodeId(node));
            prop_assert!(at % 8 == 0 && bit.count_ones() == 1);
            if node < NEAR_NODES {
                prop_assert_eq!(OwnerWord::decode(bit), OwnerWord::free(0).read_by(1 << node, false));
                prop_assert_eq!(at, RecordLayout::OWNER);
            } else {
                prop_assert!(at >= 16 && at < layout.opens());
            }
            let (at, _) = layout.open_bit(NodeId(node));
            prop_assert!(at >= layout.opens() && at < layout.uses());
            let (at, _) = layout.use_bit(NodeId(node));
            prop_assert!(at >= layout.uses() && at < layout.record_bytes());
        }
    }

    #[test]
    fn sizes() {
        let nodes = [64u32, 128, 256, 512].map(|b| RecordLayout::new(b).unwrap().max_nodes());
        assert_eq!(nodes, [128, 256, 640, 1280]);
        assert!(nodes.iter().all(|&n| n <= NodeSet::MAX_NODES));
        assert!(matches!(
            RecordLayout::new(100),
            Err(LeaseError::RecordSize { bytes: 100 })
        ));
    }
}
