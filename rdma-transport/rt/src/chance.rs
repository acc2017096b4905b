//! Random numbers that are the same everywhere and for ever (SplitMix64).

/// What is drawn from a seed.
#[derive(Debug)]
pub struct Chance(u64);

impl Chance {
    /// All that is drawn follows from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `n`, counted from zero.
    pub fn one_of(&mut self, n: usize) -> usize {
        if n < 2 {
            0
        } else {
            (self.next() % n as u64) as usize
        }
    }

    /// Between `low` and `high`, both possible.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        let span = high.saturating_sub(low).saturating_add(1);
        low.saturating_add(self.next() % span)
    }
}
