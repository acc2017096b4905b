//! What a program needs from its system: clock, locks, condition variables, channels, threads, randomness.
//!
//! In production this is nothing but other names for what `parking_lot`, `crossbeam`, `rand` and the standard library have.
//! With the feature `sim` each of them asks whether its thread belongs to a simulation, and if so takes part in it: one thread
//! runs at a time, which one is next is drawn from a seed, and time passes only when all of them wait.

pub mod chance;
#[cfg(not(feature = "sim"))]
mod real;
// For tests only, where a panic is a message to who writes them.
#[cfg(feature = "sim")]
#[allow(clippy::panic)]
mod simulated;

#[cfg(not(feature = "sim"))]
pub use real::*;
#[cfg(feature = "sim")]
pub use simulated::*;
