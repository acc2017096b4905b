//! The whole system below FUSE in deterministic simulation: the real servers and the real client on a simulated network, simulated
//! disks, virtual time, and a seeded scheduler. docs/simulation.md says what is simulated, what is checked, and what it finds.

pub mod disk;
pub mod flaws;
pub mod task;
pub mod world;
