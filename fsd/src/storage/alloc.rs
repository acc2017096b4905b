//! Allocation of frames in size classes; pure bookkeeping, no memory is touched here.
//!
//! The pool is cut into slabs of 256 KiB. A slab is free, or belongs to one class and holds frames of that
//! class only. Partly used slabs are filled before a new one is opened, so at most one slab a class is
//! opened needlessly, and reservations (counted in whole free slabs) can be honoured.

use std::collections::BTreeSet;

use super::BLOCK;

/// Frame sizes, bytes.
pub const CLASSES: [u32; 4] = [4 << 10, 16 << 10, 64 << 10, 256 << 10];

/// Slabs kept out of reservations for fragmentation (one a class).
pub const HEADROOM_SLABS: u64 = CLASSES.len() as u64;

/// The smallest class that holds `bytes`, if any.
#[must_use]
pub fn class_for(bytes: u32) -> Option<usize> {
    CLASSES.iter().position(|&c| c >= bytes)
}

#[derive(Debug, Clone, Copy)]
struct Slab {
    class: u8,
    /// One bit for each frame in use.
    used: u64,
}

/// Which frames of a pool are in use.
#[derive(Debug)]
pub struct Allocator {
    slabs: Vec<Option<Slab>>,
    free: BTreeSet<u32>,
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
            free: (0..count).collect(),
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

    /// Takes a frame of a class; `None` when the pool has none left. One that is not `covered` by a
    /// reservation leaves alone what is reserved.
    pub fn allocate(&mut self, class: usize, covered: bool) -> Option<u64> {
        let index = match self.partial[class].first() {
            Some(&i) => i,
            None if !covered && self.reserved > 0 && self.reservable() < BLOCK => return None,
            None => {
                let i = self.free.pop_first()?;
                self.slabs[i as usize] = Some(Slab {
                    class: class as u8,
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
        let index = (offset / BLOCK) as u32;
        let bit = (offset % BLOCK) / u64::from(CLASSES[class]);
        let Some(place) = self.slabs.get_mut(index as usize) else {
            return false;
        };
        let slab = place.get_or_insert(Slab {
            class: class as u8,
            used: 0,
        });
        if usize::from(slab.class) != class
            || slab.used & (1 << bit) != 0
            || !(offset % BLOCK).is_multiple_of(u64::from(CLASSES[class]))
        {
            return false;
        }
        slab.used |= 1 << bit;
        self.free.remove(&index);
        if slab.used == Self::full_mask(class) {
            self.partial[class].remove(&index);
        } else {
            self.partial[class].insert(index);
        }
        self.free_bytes -= u64::from(CLASSES[class]);
        self.frames += 1;
        true
    }

    /// Gives a frame back (its memory has been zeroed).
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
            self.slabs[index as usize] = None;
            self.partial[class].remove(&index);
            self.free.insert(index);
        } else {
            self.partial[class].insert(index);
        }
        self.free_bytes += u64::from(CLASSES[class]);
        self.frames -= 1;
    }

    /// Sets `needed` bytes aside, and up to `wanted` where there is plenty, so that what one mount hoards
    /// never matters to the others; returns how much.
    pub fn reserve(&mut self, needed: u64, wanted: u64) -> u64 {
        let reservable = self.reservable();
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
        (self.free.len() as u64)
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
        assert_eq!(a.reserve(6 * BLOCK, 0), 6 * BLOCK);
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
        assert_eq!(a.reserve(u64::MAX, 0), 6 * BLOCK);
        assert_eq!(a.reserve(1, 1), 0);
        a.unreserve(BLOCK);
        assert_eq!(a.reserve(u64::MAX, 0), BLOCK);
    }

    #[test]
    fn more_than_needed_is_set_aside_only_where_there_is_plenty() {
        let mut a = Allocator::new(84 * BLOCK);
        assert_eq!(a.reserve(100, 8 * BLOCK), 8 * BLOCK);
        assert_eq!(a.reserve(100, 100 * BLOCK), 9 * BLOCK);
        assert_eq!(a.reserve(20 * BLOCK, 21 * BLOCK), 20 * BLOCK);
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
