//! Inode numbers: `[shard:8 | generation:20 | index:36]`.
//!
//! The lease record of an inode is found from the number alone: the shard names the storage node, the index
//! the record in its table. The generation makes a number unique although record indices are used again.

use lockmgr::RecordId;

const INDEX_BITS: u32 = 36;
const GENERATION_BITS: u32 = 20;
/// Largest record index of a shard.
pub const MAX_INDEX: u64 = (1 << INDEX_BITS) - 1;
/// Most storage nodes (shard 127 keeps the number positive as a signed one).
pub const MAX_SHARDS: u16 = 127;

/// The root directory's inode number, the one FUSE prescribes: shard 0, generation 0, index 1.
pub const ROOT: u64 = 1;

/// Composes an inode number; the generation wraps at 2^20.
#[must_use]
pub fn compose(shard: u16, generation: u32, index: u64) -> u64 {
    (u64::from(shard & 0xff) << (INDEX_BITS + GENERATION_BITS))
        | ((u64::from(generation) & ((1 << GENERATION_BITS) - 1)) << INDEX_BITS)
        | (index & MAX_INDEX)
}

/// Storage node that holds the lease record.
#[must_use]
pub fn shard(ino: u64) -> u16 {
    (ino >> (INDEX_BITS + GENERATION_BITS)) as u16 & 0xff
}

/// Index of the lease record within its shard.
#[must_use]
pub fn index(ino: u64) -> u64 {
    ino & MAX_INDEX
}

/// Generation of the number.
#[must_use]
pub fn generation(ino: u64) -> u32 {
    (ino >> INDEX_BITS) as u32 & ((1 << GENERATION_BITS) - 1)
}

/// The lease record of an inode.
#[must_use]
pub fn record(ino: u64) -> RecordId {
    RecordId((u64::from(shard(ino)) << 40) | index(ino))
}

/// Shard of a lease record.
#[must_use]
pub fn record_shard(id: RecordId) -> u16 {
    (id.0 >> 40) as u16
}

/// Index of a lease record within its shard.
#[must_use]
pub fn record_index(id: RecordId) -> u64 {
    id.0 & ((1 << 40) - 1)
}

/// Whether the first of two numbers of one record is of a later generation than the second. Half of the generations count as
/// later, for they wrap.
#[must_use]
pub fn is_later(ino: u64, than: u64) -> bool {
    const HALF: u32 = 1 << (GENERATION_BITS - 1);
    let ahead = generation(ino).wrapping_sub(generation(than)) & ((1 << GENERATION_BITS) - 1);
    (1..HALF).contains(&ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_one() {
        assert_eq!(compose(0, 0, 1), ROOT);
    }

    proptest::proptest! {
        #[test]
        fn parts_come_back(s in 0u16..127, g in 0u32..(1 << 20), i in 1u64..=MAX_INDEX) {
            let ino = compose(s, g, i);
            assert_eq!((shard(ino), generation(ino), index(ino)), (s, g, i));
            assert_eq!(record_shard(record(ino)), s);
            assert_eq!(record_index(record(ino)), i);
        }
    }
}
