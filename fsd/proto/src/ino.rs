//! Inode numbers: `[0 | generation:19 | shard:8 | index:36]`.
//!
//! The lease record of an inode is found from the number alone: the shard names the storage node, the index
//! the record in its table. The generation makes a number unique although record indices are used again.
//!
//! The generation comes first so that numbers stay below 2^53 while it is below [`WORN`]: programs that keep numbers as
//! floating point (JavaScript) take larger ones for each other. A record that has been used so often is given out again
//! only when there are no others.

use lockmgr::RecordId;

const INDEX_BITS: u32 = 36;
const SHARD_BITS: u32 = 8;
const GENERATION_BITS: u32 = 19;
/// Largest record index of a shard.
pub const MAX_INDEX: u64 = (1 << INDEX_BITS) - 1;
/// Most storage nodes.
pub const MAX_SHARDS: u16 = 127;
/// The first generation whose numbers need more than 53 bits.
pub const WORN: u32 = 1 << (53 - INDEX_BITS - SHARD_BITS);

/// The root directory's inode number, the one FUSE prescribes: shard 0, generation 0, index 1.
pub const ROOT: u64 = 1;

/// Composes an inode number; the generation wraps.
#[must_use]
pub fn compose(shard: u16, generation: u32, index: u64) -> u64 {
    (u64::from(wrapped(generation)) << (INDEX_BITS + SHARD_BITS))
        | (u64::from(shard & 0xff) << INDEX_BITS)
        | (index & MAX_INDEX)
}

/// A generation as numbers have it.
fn wrapped(generation: u32) -> u32 {
    generation & ((1 << GENERATION_BITS) - 1)
}

/// The generation of the next inode of the same record.
#[must_use]
pub fn next_generation(ino: u64) -> u32 {
    wrapped(generation(ino) + 1)
}

/// Storage node that holds the lease record.
#[must_use]
pub fn shard(ino: u64) -> u16 {
    (ino >> INDEX_BITS) as u16 & 0xff
}

/// Index of the lease record within its shard.
#[must_use]
pub fn index(ino: u64) -> u64 {
    ino & MAX_INDEX
}

/// Generation of the number.
#[must_use]
pub fn generation(ino: u64) -> u32 {
    wrapped((ino >> (INDEX_BITS + SHARD_BITS)) as u32)
}

/// The flags word of the inode's lease record when it has no name left, or is about to lose its last. It names the generation, so that
/// what the word says of an inode that is gone is not taken for the next one's.
#[must_use]
pub fn unlinked_flag(ino: u64) -> u64 {
    u64::from(generation(ino)) << 1 | 1
}

/// The lease record of an inode.
#[must_use]
pub fn record(ino: u64) -> RecordId {
    RecordId::new(u32::from(shard(ino)), index(ino))
}

/// The storage node that holds a lease record: its shard, by the number that storage nodes have.
#[must_use]
pub fn record_shard(id: RecordId) -> u16 {
    id.shard() as u16
}

/// Whether the first of two numbers of one record is of a later generation than the second. Half of the generations count as
/// later, for they wrap.
#[must_use]
pub fn is_later(ino: u64, than: u64) -> bool {
    const HALF: u32 = 1 << (GENERATION_BITS - 1);
    let ahead = wrapped(generation(ino).wrapping_sub(generation(than)));
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
        fn numbers_of_records_that_are_not_worn_are_exact_as_floating_point(s in 0u16..127, g in 0..WORN, i in 1u64..=MAX_INDEX) {
            let ino = compose(s, g, i);
            assert_eq!(ino as f64 as u64, ino);
            assert!(ino < 1 << 53 && compose(s, WORN, i) >= 1 << 53);
        }

        #[test]
        fn parts_come_back(s in 0u16..127, g in 0u32..(1 << GENERATION_BITS), i in 1u64..=MAX_INDEX) {
            let ino = compose(s, g, i);
            assert_eq!((shard(ino), generation(ino), index(ino)), (s, g, i));
            assert_eq!(record_shard(record(ino)), s);
            assert_eq!(record(ino).index(), i);
            assert!(i64::try_from(ino).is_ok());
            assert!(is_later(compose(s, next_generation(ino), i), ino));
        }
    }
}
