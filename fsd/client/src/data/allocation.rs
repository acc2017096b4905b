//! `fallocate`: frames before there is data, zeros, holes.

use std::sync::Arc;

use crate::cache::frames::frame_size;
use crate::cache::inode::{Inode, Locked};
use crate::cache::state::State;
use crate::data::discard::Discards;
use crate::data::space::Space;
use crate::data::stored::Stored;
use crate::data::writing::Whole;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, fail};
use fsd_proto::ino;
use fsd_proto::layout::{BLOCK, HEADROOM_SLABS};

pub(crate) const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
pub(crate) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE;
pub(crate) const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;

/// Blocks looked at in one go: bounds the memory that a long range takes.
const STEP: u64 = 4096;

/// The blocks that a range of a file lies in.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: u64,
    last: u64,
    end: u64,
}

impl Range {
    /// `from .. end`, which must not be empty.
    fn new(from: u64, end: u64) -> Self {
        Self {
            first: from / BLOCK,
            last: (end - 1) / BLOCK,
            end,
        }
    }

    /// The frame a block of the range needs.
    fn size(&self, block: u64) -> u32 {
        frame_size(block, (self.end - block * BLOCK).min(BLOCK))
    }

    /// How many of the blocks lie on storage node `node` of `nodes`, where block 0 is on `shard`.
    fn blocks_on(&self, node: u64, shard: u64, nodes: u64) -> u64 {
        let below = |n: u64| (n + nodes - node - 1) / nodes;
        below(shard + self.last + 1) - below(shard + self.first)
    }
}

/// Adds a block to a list of runs, in ascending order.
fn add_to_runs(runs: &mut Vec<(u64, u64)>, block: u64) {
    match runs.last_mut() {
        Some((_, last)) if *last + 1 == block => *last = block,
        _ => runs.push((block, block)),
    }
}

/// Frames before there is data.
pub struct Allocator {
    pub(crate) session: Arc<Session>,
    pub(crate) space: Arc<Space>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) discards: Arc<Discards>,
}

impl Allocator {
    /// Gives every block of `from .. end` a frame, and zeros if `zero`.
    pub(crate) fn provide(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        state: &mut Locked<'_>,
        (from, end): (u64, u64),
        zero: bool,
    ) -> Res<()> {
        self.stored.load_all_frames(ctx, inode, state)?;
        let range = Range::new(from, end);
        let lacks = self.lacking(inode, state, range);
        let mut room = state.unlocked(|| self.room_for(&lacks))?;
        let zeroed = if zero {
            // Frames stay where they are: freed ones could not be had again before they are cleaned.
            self.discards.discard(ctx, inode, state, from, end, Whole::Zero)
        } else {
            Ok(())
        };
        let result = zeroed.and_then(|()| self.fill(inode, state, range, &mut room));
        state.unlocked(|| self.give_room_back(&room));
        result
    }

    /// What the blocks of a range lack on each storage node, bytes.
    fn lacking(&self, inode: &Inode, state: &State, range: Range) -> Vec<u64> {
        let (shard, nodes) = (
            u64::from(ino::shard(inode.ino)),
            u64::from(self.session.net.storage.count()),
        );
        let mut lacks: Vec<u64> = (0..nodes)
            .map(|node| range.blocks_on(node, shard % nodes, nodes) * BLOCK)
            .collect();
        let mut has =
            |block: u64, bytes: u64| lacks[usize::from(self.session.storage_of(inode.ino, block))] -= bytes;
        if range.first == 0 {
            // Only the first block of a file may do with less than a whole one.
            has(0, BLOCK - u64::from(range.size(0)));
        }
        for (&block, frame) in state.frames.known().range(range.first..=range.last) {
            if frame.size >= range.size(block) {
                has(block, u64::from(range.size(block)));
            }
        }
        let set_aside = state.frames.reserved.iter();
        for (&block, &bytes) in set_aside.filter(|(b, _)| (range.first..=range.last).contains(b)) {
            let size = range.size(block);
            if state.frames.known().get(&block).is_none_or(|f| f.size < size) {
                has(block, u64::from(bytes.min(size)));
            }
        }
        lacks
    }

    /// Sets aside what a range lacks on each storage node, so that allocating it cannot fail half-way for want of space.
    /// Returns the bytes by storage node.
    fn room_for(&self, lacks: &[u64]) -> Res<Vec<u64>> {
        // Asked first: a reservation would take what is left from others, if only until it is given back.
        for (node, &bytes) in (0..).zip(lacks) {
            if bytes > 0 && bytes > self.space.pool_space(node)?.free {
                return fail(libc::ENOSPC);
            }
        }
        let mut room = Vec::with_capacity(lacks.len());
        for (node, &bytes) in (0..).zip(lacks) {
            let granted = match bytes {
                0 => Ok(0),
                _ => self.space.ask_for_space(node, bytes, bytes),
            };
            match granted {
                // The last slabs cannot be set aside, but may still be used.
                Ok(granted) if granted == bytes || bytes <= HEADROOM_SLABS * BLOCK => room.push(granted),
                other => {
                    room.extend(other.as_ref().ok());
                    self.give_room_back(&room);
                    return other.and_then(|_| fail(libc::ENOSPC));
                }
            }
        }
        Ok(room)
    }

    fn give_room_back(&self, room: &[u64]) {
        for (node, &bytes) in (0..).zip(room) {
            if bytes > 0 {
                self.space.accounts.used(node, bytes);
                self.space.give_space_back(node, bytes);
            }
        }
    }

    /// Allocates the frames a range lacks out of the room set aside; where that fails, frees the new ones.
    fn fill(&self, inode: &Inode, state: &mut Locked<'_>, range: Range, room: &mut [u64]) -> Res<()> {
        let mut fresh: Vec<(u64, u64)> = Vec::new();
        let mut from = range.first;
        while from <= range.last {
            let to = range.last.min(from + STEP - 1);
            let wants: Vec<(u64, u32)> = (from..=to)
                .map(|block| (block, range.size(block)))
                .filter(|(block, size)| state.frames.known().get(block).is_none_or(|f| f.size < *size))
                .collect();
            let mut before = Vec::with_capacity(wants.len());
            for &(block, size) in &wants {
                let own = state.frames.reserved.get(&block).copied();
                if own.is_none() && !state.frames.known().contains_key(&block) {
                    add_to_runs(&mut fresh, block);
                }
                let have = own.unwrap_or(0);
                let left = &mut room[usize::from(self.session.storage_of(inode.ino, block))];
                let more = u64::from(size.saturating_sub(have)).min(*left);
                *left -= more;
                state.frames.reserved.insert(block, have + more as u32);
                before.push((block, own, more));
            }
            if let Err(stop) = self.stored.allocate(inode, state, &wants) {
                for (block, own, more) in before {
                    if state.frames.unreserve(block).is_some() {
                        room[usize::from(self.session.storage_of(inode.ino, block))] += more;
                        state.frames.reserved.extend(own.map(|bytes| (block, bytes)));
                    }
                }
                for (first, last) in fresh {
                    if let Err(error) = self.discards.free_blocks(inode, state, first, last) {
                        tracing::warn!(
                            "inode {:#x} keeps blocks of a failed fallocate: {error:?}",
                            inode.ino
                        );
                    }
                }
                return Err(stop);
            }
            from = to + 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    proptest::proptest! {
        #[test]
        fn blocks_are_counted_by_node(first in 0u64..50, more in 0u64..50, shard in 0u64..5, nodes in 1u64..5) {
            let range = Range { first, last: first + more, end: (first + more + 1) * BLOCK };
            for node in 0..nodes {
                let one_by_one = (range.first..=range.last)
                    .filter(|block| (shard % nodes + block) % nodes == node)
                    .count() as u64;
                proptest::prop_assert_eq!(range.blocks_on(node, shard % nodes, nodes), one_by_one);
            }
        }
    }

    #[test]
    fn runs_are_joined() {
        let mut runs = Vec::new();
        for block in [3, 4, 5, 9, 11, 12] {
            add_to_runs(&mut runs, block);
        }
        assert_eq!(runs, [(3, 5), (9, 9), (11, 12)]);
    }
}
