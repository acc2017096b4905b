//! The whole system below FUSE in deterministic simulation: the real servers and the real client on a simulated network, simulated
//! disks, virtual time, and a seeded scheduler. docs/simulation.md says what is simulated, what is checked, and what it finds.

pub mod chance;
pub mod cluster;
pub mod content;
pub mod disk;
pub mod faults;
pub mod flaws;
pub mod model;
pub mod owned;
pub mod scenario;
pub mod seeds;
pub mod shared;
pub mod strain;
pub mod task;
pub mod world;
