//! What a simulation is run with.

/// How a simulation is run.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Says all that is left to chance.
    pub seed: u64,
    /// So many points at which others might run are passed on average before they do. One: at each.
    pub points_between: u32,
    /// Virtual nanoseconds after which it has failed.
    pub longest: u64,
}

impl Settings {
    /// The usual ones.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            points_between: 20,
            longest: 3_600_000_000_000,
        }
    }
}
