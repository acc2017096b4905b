//! The VM lab: QEMU guests on stock Debian kernels with SoftRoCE, and scenarios that run in them.
//!
//! `README.md` beside this crate says how to use the program `fsd-lab`. [`cluster::Cluster`] is what scenarios
//! are written against.

pub mod cli;
pub mod cluster;
pub mod complaint;
pub mod error;
pub mod faults;
pub mod guest;
pub mod image;
mod journal;
pub mod kmod;
pub mod link;
pub mod monitor;
pub mod options;
pub mod process;
pub mod proto;
pub mod qemu;
pub mod report;
pub mod run;
pub mod scenario;
pub mod shell;
pub mod snapshot;
pub mod soak;
pub mod switch;
pub mod tools;
