//! Allocation of frames in size classes; pure bookkeeping, no memory is touched here. One of these keeps the frames of
//! the pool, another one the extents of the backing file.
//!
//! The pool is cut into slabs of 256 KiB. A slab is free, or belongs to one class and holds frames of that
//! class only. Partly used slabs are filled before a new one is opened, so at most one slab a class is
//! opened needlessly, and reservations (counted in whole free slabs) can be honoured.
//!
//! A slab is *backed* if the system has allocated what lies behind it (memory, or blocks of the disk). Free slabs that
//! are backed are used first; what has not been needed for a while is given back.

use std::collections::BTreeSet;

use fsd_proto::layout::{BLOCK, CLASSES, HEADROOM_SLABS};

#[derive(Debug, Clone, Copy)]
struct Slab {
    class: u8,
    backed: bool,
    /// One bit for each frame in use.
    used: u64,
}

/// Which frames of a pool are in use.
#[derive(Debug)]
pub struct Allocator {
    slabs: Vec<Option<Slab>>,
    /// Free slabs that are backed …
    warm: BTreeSet<u32>,
    /// … and those that are not.
    cold: BTreeSet<u32>,
    /// Least number of warm slabs since [`Allocator::surplus`] was last asked.
    low_water: usize,
    partial: [BTreeSet<u32>; CLASSES.len()],
    free_bytes: u64,
    frames: u64,
    reserved: u64,
}

impl Allocator {
    /// An empty pool of `bytes` (a multiple of 256 KiB).
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        let count = u32::try_from(bytes / BLOCK).unwrap_or(u32::MAX);
        Self {
            slabs: vec![None; count as usize],
            warm: BTreeSet::new(),
            cold: (0..count).collect(),
            low_water: 0,
            partial: Default::default(),
            free_bytes: u64::from(count) * BLOCK,
            frames: 0,
            reserved: 0,
        }
    }

    fn per_slab(class: usize) -> u32 {
        (BLOCK / u64::from(CLASSES[class])) as u32
    }

    fn full_mask(class: usize) -> u64 {
        let n = Self::per_slab(class);
        if n == 64 { u64::MAX } else { (1 << n) - 1 }
    }

    /// Makes it larger by so many slabs.
    pub fn grow(&mut self, slabs: u32) {
        let first = self.slabs.len() as u32;
        self.slabs.extend((0..slabs).map(|_| None));
        self.cold.extend(first..first.saturating_add(slabs));
        self.free_bytes += u64::from(slabs) * BLOCK;
    }

    fn free_slabs(&self) -> u64 {
        (self.warm.len() + self.cold.len()) as u64
    }

    /// Bytes of free slabs that are not backed.
    #[must_use]
    pub fn cold_bytes(&self) -> u64 {
        self.cold.len() as u64 * BLOCK
    }

    /// Number of free slabs that are backed.
    #[must_use]
    pub fn warm(&self) -> usize {
        self.warm.len()
    }

    /// Is the slab that holds `offset`, which is in use, backed?
    #[must_use]
    pub fn is_backed(&self, offset: u64) -> bool {
        let slab = self.slabs.get((offset / BLOCK) as usize);
        slab.is_some_and(|s| s.is_some_and(|s| s.backed))
    }

    /// Notes that the slab that holds `offset` is backed.
    pub fn set_backed(&mut self, offset: u64) {
        let index = (offset / BLOCK) as u32;
        if let Some(Some(slab)) = self.slabs.get_mut(index as usize) {
            slab.backed = true;
        } else if self.cold.remove(&index) {
            self.warm.insert(index);
        }
    }

    /// A free slab that is not backed: its offset.
    #[must_use]
    pub fn coldest(&self) -> Option<u64> {
        self.cold.first().map(|&i| u64::from(i) * BLOCK)
    }

    /// Takes out free slabs whose backing was not needed since this was last asked, beyond a `stock` and at most
    /// `limit` of them: their offsets. They come back with [`Allocator::cooled`].
    pub fn surplus(&mut self, stock: usize, limit: usize) -> Vec<u64> {
        let count = self.low_water.saturating_sub(stock).min(limit);
        let gone: Vec<u32> = self.warm.iter().rev().take(count).copied().collect();
        for index in &gone {
            self.warm.remove(index);
        }
        self.low_water = self.warm.len();
        gone.into_iter().map(|i| u64::from(i) * BLOCK).collect()
    }

    /// A slab that was taken out is free again, and backed or not.
    pub fn cooled(&mut self, offset: u64, backed: bool) {
        let home = if backed { &mut self.warm } else { &mut self.cold };
        home.insert((offset / BLOCK) as u32);
    }

    /// Takes a frame of a class; `None` when the pool has none left. One that is not `covered` by a
    /// reservation leaves alone what is reserved.
    pub fn allocate(&mut self, class: usize, covered: bool) -> Option<u64> {
        let index = match self.partial[class].first() {
            Some(&i) => i,
            None if !covered && self.reserved > 0 && self.reservable() < BLOCK => return None,
            None => {
                let warm = self.warm.pop_first();
                let i = warm.or_else(|| self.cold.pop_first())?;
                self.low_water = self.low_water.min(self.warm.len());
                self.slabs[i as usize] = Some(Slab {
                    class: class as u8,
                    backed: warm.is_some(),
                    used: 0,
                });
                self.partial[class].insert(i);
                i
            }
        };
        let slab = self.slabs[index as usize].as_mut()?;
        let bit = (!slab.used).trailing_zeros();
        slab.used |= 1 << bit;
        if slab.used == Self::full_mask(class) {
            self.partial[class].remove(&index);
        }
        self.free_bytes -= u64::from(CLASSES[class]);
        self.frames += 1;
        Some(u64::from(index) * BLOCK + u64::from(bit) * u64::from(CLASSES[class]))
    }

    /// Marks a frame as in use when the index is loaded. False if it overlaps one already there.
    pub fn occupy(&mut self, offset: u64, class: usize) -> bool {
        let Ok(index) = u32::try_from(offset / BLOCK) else {
            return false;
        };
        let bit = (offset % BLOCK) / u64::from(CLASSES[class]);
        let Some(place) = self.slabs.get_mut(index as usize) else {
            return false;
        };
        let slab = place.get_or_insert(Slab {
            class: class as u8,
            backed: false,
            used: 0,
        });
        if usize::from(slab.class) != class
            || slab.used & (1 << bit) != 0
            || !(offset % BLOCK).is_multiple_of(u64::from(CLASSES[class]))
        {
            return false;
        }
        slab.used |= 1 << bit;
        self.cold.remove(&index);
        if slab.used == Self::full_mask(class) {
            self.partial[class].remove(&index);
        } else {
            self.partial[class].insert(index);
        }
        self.free_bytes -= u64::from(CLASSES[class]);
        self.frames += 1;
        true
    }

    /// Gives a frame back (of the pool: its memory has been zeroed).
    pub fn free(&mut self, offset: u64, class: usize) {
        let index = (offset / BLOCK) as u32;
        let bit = (offset % BLOCK) / u64::from(CLASSES[class]);
        let Some(Some(slab)) = self.slabs.get_mut(index as usize) else {
            return;
        };
        if usize::from(slab.class) != class || slab.used & (1 << bit) == 0 {
            return;
        }
        slab.used &= !(1 << bit);
        if slab.used == 0 {
            let home = if slab.backed {
                &mut self.warm
            } else {
                &mut self.cold
            };
            home.insert(index);
            self.slabs[index as usize] = None;
            self.partial[class].remove(&index);
        } else {
            self.partial[class].insert(index);
        }
        self.free_bytes += u64::from(CLASSES[class]);
        self.frames -= 1;
    }

    /// Sets `needed` bytes aside, and up to `wanted` where there is plenty, so that what one mount hoards
    /// never matters to the others; returns how much. `lacking`: bytes of free slabs that the system cannot back now.
    pub fn reserve(&mut self, needed: u64, wanted: u64, lacking: u64) -> u64 {
        let reservable = self.reservable().saturating_sub(lacking);
        let granted = needed.max(wanted.min(reservable / 8)).min(reservable);
        self.reserved += granted;
        granted
    }

    /// Takes back an [`Allocator::unreserve`] whose bytes were not allocated after all.
    pub fn restore(&mut self, bytes: u64) {
        self.reserved += bytes;
    }

    /// Gives reserved bytes back (unused, or just about to be allocated).
    pub fn unreserve(&mut self, bytes: u64) {
        self.reserved = self.reserved.saturating_sub(bytes);
    }

    /// Bytes that nobody uses or has reserved, in whole slabs.
    #[must_use]
    pub fn reservable(&self) -> u64 {
        self.free_slabs()
            .saturating_sub(HEADROOM_SLABS)
            .saturating_mul(BLOCK)
            .saturating_sub(self.reserved)
    }

    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.slabs.len() as u64 * BLOCK
    }

    /// Bytes in free frames.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes
    }

    /// Bytes reserved.
    #[must_use]
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Frames in use.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn a_small_pool_fills_to_the_last_frame() {
        let mut a = Allocator::new(2 * BLOCK);
        assert!(a.allocate(3, false).is_some());
        for _ in 0..64 {
            assert!(a.allocate(0, false).is_some());
        }
        assert_eq!(a.allocate(0, true), None);
        assert_eq!(a.free_bytes(), 0);
    }

    #[test]
    fn what_is_reserved_is_there_for_those_who_reserved_it() {
        let mut a = Allocator::new(20 * BLOCK);
        assert_eq!(a.reserve(6 * BLOCK, 0, 0), 6 * BLOCK);
        let others = (0..30).filter(|_| a.allocate(3, false).is_some()).count();
        assert_eq!(others as u64, 20 - 6 - HEADROOM_SLABS);
        // In whatever sizes it is used.
        for class in [0, 1, 2, 3, 3, 3, 3, 3] {
            a.unreserve(u64::from(CLASSES[class]));
            assert!(a.allocate(class, true).is_some());
        }
    }

    #[test]
    fn reservations_stop_at_whole_slabs() {
        let mut a = Allocator::new(10 * BLOCK);
        assert_eq!(a.reserve(u64::MAX, 0, 0), 6 * BLOCK);
        assert_eq!(a.reserve(1, 1, 0), 0);
        a.unreserve(BLOCK);
        assert_eq!(a.reserve(u64::MAX, 0, 0), BLOCK);
    }

    #[test]
    fn more_than_needed_is_set_aside_only_where_there_is_plenty() {
        let mut a = Allocator::new(84 * BLOCK);
        assert_eq!(a.reserve(100, 8 * BLOCK, 0), 8 * BLOCK);
        assert_eq!(a.reserve(100, 100 * BLOCK, 0), 9 * BLOCK);
        assert_eq!(a.reserve(20 * BLOCK, 21 * BLOCK, 0), 20 * BLOCK);
    }

    #[test]
    fn backing_that_is_not_needed_for_a_while_is_given_back() {
        let mut a = Allocator::new(8 * BLOCK);
        let offsets: Vec<u64> = (0..6).filter_map(|_| a.allocate(3, false)).collect();
        for &offset in &offsets {
            assert!(!a.is_backed(offset));
            a.set_backed(offset);
            assert!(a.is_backed(offset));
        }
        for offset in offsets {
            a.free(offset, 3);
        }
        assert_eq!((a.warm(), a.cold_bytes()), (6, 2 * BLOCK));
        assert!(a.surplus(1, 9).is_empty(), "they were in use a moment ago");
        let taken = a.allocate(3, false).unwrap();
        assert!(a.is_backed(taken), "what is backed is used first");
        a.free(taken, 3);
        assert_eq!(a.surplus(1, 2), vec![5 * BLOCK, 4 * BLOCK]);
        a.cooled(4 * BLOCK, false);
        a.cooled(5 * BLOCK, false);
        assert_eq!((a.warm(), a.cold_bytes()), (4, 4 * BLOCK));
        a.set_backed(a.coldest().unwrap());
        assert_eq!(a.warm(), 5);
        a.grow(2);
        assert_eq!((a.bytes(), a.free_bytes()), (10 * BLOCK, 10 * BLOCK));
    }

    #[test]
    fn what_the_system_cannot_back_is_not_promised() {
        let mut a = Allocator::new(20 * BLOCK);
        assert_eq!(a.reserve(u64::MAX, 0, 10 * BLOCK), 6 * BLOCK);
    }

    proptest::proptest! {
        #[test]
        fn frames_never_overlap_and_all_come_back(ops in proptest::collection::vec((0usize..4, 0u8..3), 1..400)) {
            let mut a = Allocator::new(16 * BLOCK);
            let mut live: HashMap<u64, usize> = HashMap::new();
            for (class, action) in ops {
                if action < 2 {
                    if let Some(offset) = a.allocate(class, false) {
                        let end = offset + u64::from(CLASSES[class]);
                        for (&o, &c) in &live {
                            proptest::prop_assert!(end <= o || o + u64::from(CLASSES[c]) <= offset);
                        }
                        live.insert(offset, class);
                    }
                } else if let Some((&offset, &class)) = live.iter().next() {
                    live.remove(&offset);
                    a.free(offset, class);
                }
                let used: u64 = live.values().map(|&c| u64::from(CLASSES[c])).sum();
                proptest::prop_assert_eq!(a.free_bytes(), 16 * BLOCK - used);
            }
            let mut b = Allocator::new(16 * BLOCK);
            for (&o, &c) in &live {
                proptest::prop_assert!(b.occupy(o, c));
                proptest::prop_assert!(!b.occupy(o, c));
            }
            proptest::prop_assert_eq!(a.free_bytes(), b.free_bytes());
            for (o, c) in live {
                a.free(o, c);
            }
            proptest::prop_assert_eq!(a.free_bytes(), 16 * BLOCK);
        }
    }
}
