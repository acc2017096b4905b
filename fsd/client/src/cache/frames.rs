//! Where the blocks of a file are, as far as known. Pure.

use std::collections::{BTreeMap, BTreeSet};

use fsd_proto::layout::{BLOCK, CLASSES, class_for};
use fsd_proto::wire::Frame;

fn is_short(frame: &Frame) -> bool {
    u64::from(frame.size) < fsd_proto::layout::BLOCK
}

/// Where the blocks of a file are, as far as known.
#[derive(Debug, Default)]
pub struct FrameMap {
    /// Layout number of the file that this belongs to.
    pub layout: Option<u64>,
    /// Where each block is, by its number in the file.
    known: BTreeMap<u64, Frame>,
    /// How many of them are smaller than a block.
    short: usize,
    /// Blocks among them whose contents their storage node cannot read.
    pub lost: BTreeSet<u64>,
    /// Storage nodes whose part is complete.
    pub loaded: BTreeSet<u16>,
    /// Space set aside for dirty blocks without (large enough) frames, bytes.
    pub reserved: BTreeMap<u64, u32>,
}

impl FrameMap {
    /// The frame for a block that needs `size`: all that was set aside for it, for as much may be needed of it.
    #[must_use]
    pub fn size_of(&self, block: u64, size: u32) -> u32 {
        self.reserved
            .get(&block)
            .map_or(size, |&reserved| size.max(reserved))
    }

    /// The frames that are known, by the number of their block.
    #[must_use]
    pub fn known(&self) -> &BTreeMap<u64, Frame> {
        &self.known
    }

    /// A block has this frame. Returns the size of the one that it had.
    pub fn learn(&mut self, block: u64, frame: Frame) -> u32 {
        self.short += usize::from(is_short(&frame));
        let old = self.known.insert(block, frame);
        self.forgotten(old)
    }

    /// A block has no frame. Returns the size of the one that it had.
    pub fn unlearn(&mut self, block: u64) -> u32 {
        let old = self.known.remove(&block);
        self.forgotten(old)
    }

    fn forgotten(&mut self, old: Option<Frame>) -> u32 {
        self.short -= usize::from(old.as_ref().is_some_and(is_short));
        old.map_or(0, |frame| frame.size)
    }

    /// The last block, if all up to it have whole frames.
    #[must_use]
    pub fn whole_up_to(&self) -> Option<u64> {
        let (&last, _) = self.known.last_key_value()?;
        (self.short == 0 && self.known.len() as u64 == last + 1).then_some(last)
    }

    /// The frame for a block whose data ends `end` bytes into it. What follows on a whole block is being written in order, and likely
    /// to come to a whole one; what stands in a hole by itself is not.
    #[must_use]
    pub fn size_for(&self, block: u64, end: u64) -> u32 {
        let whole = fsd_proto::layout::BLOCK as u32;
        let before = block.checked_sub(1);
        let follows = before.is_some_and(|before| {
            self.known.get(&before).is_some_and(|f| f.size == whole)
                || self.reserved.get(&before) == Some(&whole)
        });
        if follows { whole } else { least_frame(end) }
    }

    /// Forgets where the blocks are: from now on for the layout of this number.
    pub fn forget_places(&mut self, layout: Option<u64>) {
        self.known.clear();
        self.short = 0;
        self.lost.clear();
        self.loaded.clear();
        self.layout = layout;
    }

    /// Takes out what is set aside for a block.
    pub fn unreserve(&mut self, block: u64) -> Option<u32> {
        let bytes = self.reserved.remove(&block);
        if self.reserved.is_empty() {
            // An empty tree keeps a node, in each of a hundred thousand inodes.
            self.reserved = BTreeMap::new();
        }
        bytes
    }

    /// Is there a block among `first ..= last` whose contents are lost? It can neither be read nor written in part.
    #[must_use]
    pub fn any_lost(&self, first: u64, last: u64) -> bool {
        self.lost.range(first..=last).next().is_some()
    }
}

/// The frame size for a block whose data ends `end` bytes into it. Later blocks of a file are allocated
/// whole: such a file is likely to grow on.
#[must_use]
pub fn frame_size(block: u64, end: u64) -> u32 {
    if block > 0 { BLOCK as u32 } else { least_frame(end) }
}

/// The smallest frame for data that ends `end` bytes into its block. From half a block on it is a whole one, which saves moving it.
#[must_use]
pub fn least_frame(end: u64) -> u32 {
    if end >= BLOCK / 2 {
        return BLOCK as u32;
    }
    class_for(end as u32).map_or(BLOCK as u32, |c| CLASSES[c])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_in_order_gets_whole_frames_and_what_stands_in_a_hole_small_ones() {
        let whole = fsd_proto::layout::BLOCK as u32;
        let frame = |size| Frame { offset: 0, size };
        let mut frames = FrameMap::default();
        assert_eq!((frames.size_for(0, 100), frames.size_for(7, 4096)), (4096, 4096));
        assert_eq!(
            (frames.size_for(7, 5000), frames.size_for(7, 200_000)),
            (16_384, whole)
        );
        frames.learn(0, frame(4096));
        assert_eq!((frames.size_for(1, 100), frames.whole_up_to()), (4096, None));
        frames.learn(0, frame(whole));
        assert_eq!((frames.size_for(1, 100), frames.whole_up_to()), (whole, Some(0)));
        frames.reserved.insert(1, whole);
        assert_eq!((frames.size_for(2, 100), frames.size_for(3, 100)), (whole, 4096));
        frames.learn(1, frame(4096));
        assert_eq!(frames.whole_up_to(), None);
        frames.unlearn(1);
        assert_eq!(frames.whole_up_to(), Some(0));
    }
}
