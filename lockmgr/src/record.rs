//! The lease record in remote memory.
//!
//! ```text
//! word 0       owner    [incarnation:8 | writer node + 1:16 | data version:40]
//! word 1       flags
//! words 2..    holders  one bit a node
//! words ..     opens    one bit a node
//! ```

use crate::LeaseError;
use crate::ids::{NodeId, NodeSet};

/// Bits of the data version.
const VERSION_BITS: u32 = 40;

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
}

impl OwnerWord {
    /// Largest version; versions are cut to it.
    pub const MAX_VERSION: u64 = (1 << VERSION_BITS) - 1;
    /// An owner may have told readers of versions less than this much beyond the one in the word. Whoever
    /// frees the word of a dead owner moves the version on by as much.
    pub const RECOVERY_STEP: u64 = 1 << 16;

    /// The word after the death of everybody who knew the record under this one: nobody writes, and no cache
    /// has the version.
    #[must_use]
    pub fn freed_after_death(self) -> Self {
        let step = if self.writer.is_some() {
            Self::RECOVERY_STEP
        } else {
            1
        };
        Self::free(self.version.wrapping_add(step))
    }

    /// Nobody writes; the data have this version.
    #[must_use]
    pub const fn free(version: u64) -> Self {
        Self {
            incarnation: 0,
            writer: None,
            version: version & Self::MAX_VERSION,
        }
    }

    /// Written by this node.
    #[must_use]
    pub const fn owned(writer: NodeId, incarnation: u8, version: u64) -> Self {
        Self {
            incarnation,
            writer: Some(writer),
            version: version & Self::MAX_VERSION,
        }
    }

    /// As it is in memory.
    #[must_use]
    pub fn encode(self) -> u64 {
        let writer = self.writer.map_or(0, |n| u64::from(n.0) + 1) & 0xffff;
        u64::from(self.incarnation) << 56 | writer << VERSION_BITS | self.version & Self::MAX_VERSION
    }

    /// From memory; every value means something.
    #[must_use]
    pub fn decode(word: u64) -> Self {
        let writer = (word >> VERSION_BITS & 0xffff) as u16;
        Self {
            incarnation: (word >> 56) as u8,
            writer: writer.checked_sub(1).map(NodeId),
            version: word & Self::MAX_VERSION,
        }
    }
}

/// Where things are in a record of a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RecordLayout {
    map_words: u32,
}

impl RecordLayout {
    /// Offset of the owner word.
    pub const OWNER: u64 = 0;
    /// Offset of the flags.
    pub const FLAGS: u64 = 8;
    /// Offset of the holders bitmap.
    pub const HOLDERS: u64 = 16;

    /// The layout of records of 64, 128, 256 or 512 bytes.
    ///
    /// # Errors
    /// [`LeaseError::RecordSize`] for any other size.
    pub const fn new(record_bytes: u32) -> Result<Self, LeaseError> {
        match record_bytes {
            64 | 128 | 256 | 512 => Ok(Self {
                map_words: (record_bytes / 8 - 2) / 2,
            }),
            _ => Err(LeaseError::RecordSize { bytes: record_bytes }),
        }
    }

    /// Bytes of a record.
    #[must_use]
    pub const fn record_bytes(self) -> u64 {
        (self.map_words as u64 * 2 + 2) * 8
    }

    /// Words of each bitmap.
    #[must_use]
    pub const fn map_words(self) -> u32 {
        self.map_words
    }

    /// Nodes a record has bits for.
    #[must_use]
    pub const fn max_nodes(self) -> u16 {
        (self.map_words * 64) as u16
    }

    /// Offset of the opens bitmap.
    #[must_use]
    pub const fn opens(self) -> u64 {
        Self::HOLDERS + self.map_words as u64 * 8
    }

    /// Offset in the record of the word with the node's holder bit, and the bit.
    #[must_use]
    pub const fn holder_bit(self, node: NodeId) -> (u64, u64) {
        (Self::HOLDERS + node.0 as u64 / 64 * 8, 1 << (node.0 % 64))
    }

    /// Offset in the record of the word with the node's open bit, and the bit.
    #[must_use]
    pub const fn open_bit(self, node: NodeId) -> (u64, u64) {
        (self.opens() + node.0 as u64 / 64 * 8, 1 << (node.0 % 64))
    }

    /// The set from the words of a bitmap read at [`Self::HOLDERS`] or [`Self::opens`].
    #[must_use]
    pub fn set(self, words: &[u64]) -> NodeSet {
        NodeSet::from_words(&words[..words.len().min(self.map_words as usize)])
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
        fn owner_fields_round_trip(incarnation: u8, node in 0u16..u16::MAX, version in 0u64..1 << 40) {
            let word = OwnerWord::owned(NodeId(node), incarnation, version);
            prop_assert_eq!(OwnerWord::decode(word.encode()), word);
            let free = OwnerWord::free(version);
            prop_assert_eq!(OwnerWord::decode(free.encode()), free);
            prop_assert_eq!(free.encode(), version);
        }

        #[test]
        fn bits_stay_in_their_map(size in prop::sample::select(vec![64u32, 128, 256, 512]), node in 0u16..1984) {
            let layout = RecordLayout::new(size).unwrap();
            prop_assume!(node < layout.max_nodes());
            let (at, bit) = layout.holder_bit(NodeId(node));
            prop_assert!(at >= 16 && at < layout.opens() && at % 8 == 0 && bit.count_ones() == 1);
            let (at, _) = layout.open_bit(NodeId(node));
            prop_assert!(at >= layout.opens() && at < layout.record_bytes());
        }
    }

    #[test]
    fn sizes() {
        let nodes = [64u32, 128, 256, 512].map(|b| RecordLayout::new(b).unwrap().max_nodes());
        assert_eq!(nodes, [192, 448, 960, 1984]);
        assert_eq!(NodeSet::MAX_NODES, 1984);
        assert!(matches!(
            RecordLayout::new(100),
            Err(LeaseError::RecordSize { bytes: 100 })
        ));
    }
}
