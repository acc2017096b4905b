//! How the simulated network behaves.

use std::time::Duration;

/// How the simulated network behaves.
#[derive(Debug, Clone, Copy)]
pub struct SimConfig {
    /// Shortest time anything takes from one endpoint to another.
    pub min_delay: Duration,
    /// Longest time.
    pub max_delay: Duration,
    /// Messages of a connection that a peer has not dealt with, before [`crate::Connection::send`] waits; only in networks
    /// whose time passes by itself.
    pub room: usize,
}

impl Default for SimConfig {
    fn default() -> Self {
        Self {
            min_delay: Duration::from_micros(1),
            max_delay: Duration::from_micros(20),
            room: usize::MAX,
        }
    }
}
