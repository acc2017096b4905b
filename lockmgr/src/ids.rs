//! Names: nodes, records, lease modes, sets of nodes.

use std::fmt;

/// A node of the cluster; its number is its bit in the bitmaps of every record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub u16);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// A lease record: which shard (storage node) holds it, and its index in the shard's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordId(pub u64);

impl RecordId {
    /// Bits of the index; the shard is above them.
    pub const INDEX_BITS: u32 = 40;

    /// The record `index` of `shard`. Bits that do not fit are cut off.
    #[must_use]
    pub const fn new(shard: u32, index: u64) -> Self {
        Self(((shard as u64) << Self::INDEX_BITS) | (index & ((1 << Self::INDEX_BITS) - 1)))
    }

    /// The shard.
    #[must_use]
    pub const fn shard(self) -> u32 {
        (self.0 >> Self::INDEX_BITS) as u32
    }

    /// The index in the shard.
    #[must_use]
    pub const fn index(self) -> u64 {
        self.0 & ((1 << Self::INDEX_BITS) - 1)
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "record {}:{}", self.shard(), self.index())
    }
}

/// How a lease is held or wanted. Exclusive covers everything shared does, hence the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// Many readers.
    Shared,
    /// One writer.
    Exclusive,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shared => "shared",
            Self::Exclusive => "exclusive",
        })
    }
}

/// Words of a bitmap that are stored in place: those of the smallest record.
const INLINE: usize = 2;
/// Words of the largest bitmap (a record of 512 bytes).
pub(crate) const MAX_WORDS: usize = 20;
const REST: usize = MAX_WORDS - INLINE;

/// A set of nodes.
///
/// The first 128 nodes, all that the smallest record can hold, are kept in place; the rest is allocated only
/// while one of them is a member, so a state machine stays small and its equality is that of the sets.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct NodeSet {
    low: [u64; INLINE],
    high: Option<Box<[u64; REST]>>,
}

impl NodeSet {
    /// Most nodes a set, and so any record, can name.
    pub const MAX_NODES: u16 = (MAX_WORDS * 64) as u16;

    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            low: [0; INLINE],
            high: None,
        }
    }

    /// From the words of a bitmap; words past the largest bitmap are ignored.
    #[must_use]
    pub fn from_words(words: &[u64]) -> Self {
        let mut set = Self::new();
        for (i, &w) in words.iter().take(MAX_WORDS).enumerate() {
            if i < INLINE {
                set.low[i] = w;
            } else if w != 0 {
                set.high.get_or_insert_with(|| Box::new([0; REST]))[i - INLINE] = w;
            }
        }
        set
    }

    /// The words of the bitmap up to the last one that is not zero.
    pub fn words(&self) -> impl Iterator<Item = u64> + '_ {
        let last = (0..MAX_WORDS)
            .rev()
            .find(|&i| self.word(i) != 0)
            .map_or(0, |i| i + 1);
        (0..last).map(|i| self.word(i))
    }

    fn word(&self, i: usize) -> u64 {
        if i < INLINE {
            self.low[i]
        } else {
            self.high.as_ref().map_or(0, |h| h[i - INLINE])
        }
    }

    /// Adds a node; false if it was a member already, or is past [`Self::MAX_NODES`].
    pub fn insert(&mut self, node: NodeId) -> bool {
        if node.0 >= Self::MAX_NODES || self.contains(node) {
            return false;
        }
        let (w, bit) = (usize::from(node.0) / 64, 1u64 << (node.0 % 64));
        if w < INLINE {
            self.low[w] |= bit;
        } else {
            self.high.get_or_insert_with(|| Box::new([0; REST]))[w - INLINE] |= bit;
        }
        true
    }

    /// Removes a node; false if it was no member.
    pub fn remove(&mut self, node: NodeId) -> bool {
        if !self.contains(node) {
            return false;
        }
        let (w, bit) = (usize::from(node.0) / 64, 1u64 << (node.0 % 64));
        if w < INLINE {
            self.low[w] &= !bit;
        } else if let Some(high) = &mut self.high {
            high[w - INLINE] &= !bit;
            if high.iter().all(|&w| w == 0) {
                self.high = None;
            }
        }
        true
    }

    /// Is the node a member?
    #[must_use]
    pub fn contains(&self, node: NodeId) -> bool {
        node.0 < Self::MAX_NODES && self.word(usize::from(node.0) / 64) >> (node.0 % 64) & 1 == 1
    }

    /// Has the set no members?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.low == [0; INLINE] && self.high.is_none()
    }

    /// How many members.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words().map(|w| w.count_ones() as usize).sum()
    }

    /// Adds all members of `other`.
    pub fn union(&mut self, other: &Self) {
        for node in other.iter() {
            self.insert(node);
        }
    }

    /// The members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.words().enumerate().flat_map(|(i, word)| {
            (0..64u16)
                .filter(move |b| word >> b & 1 == 1)
                .map(move |b| NodeId(i as u16 * 64 + b))
        })
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<T: IntoIterator<Item = NodeId>>(iter: T) -> Self {
        let mut set = Self::new();
        for node in iter {
            set.insert(node);
        }
        set
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter().map(|n| n.0)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn record_id_round_trip(shard in 0u32..1 << 24, index in 0u64..1 << 40) {
            let id = RecordId::new(shard, index);
            prop_assert_eq!((id.shard(), id.index()), (shard, index));
        }

        #[test]
        fn node_set_is_a_set(ops in prop::collection::vec((any::<bool>(), 0u16..2100), 0..200)) {
            let (mut set, mut model) = (NodeSet::new(), BTreeSet::new());
            for (add, n) in ops {
                let node = NodeId(n);
                if add {
                    prop_assert_eq!(set.insert(node), n < NodeSet::MAX_NODES && model.insert(n));
                } else {
                    prop_assert_eq!(set.remove(node), model.remove(&n));
                }
                prop_assert_eq!(set.is_empty(), model.is_empty());
                prop_assert_eq!(set.len(), model.len());
            }
            prop_assert_eq!(set.iter().map(|n| n.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            let words: Vec<u64> = set.words().collect();
            prop_assert_eq!(&NodeSet::from_words(&words), &set);
            prop_assert_eq!(&set.iter().collect::<NodeSet>(), &set);
        }
    }
}
