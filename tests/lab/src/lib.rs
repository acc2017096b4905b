//! The VM lab: QEMU guests on stock Debian kernels with SoftRoCE, and scenarios that run in them.
//!
//! `README.md` beside this crate says how to use the program `fsd-lab`.

pub mod error;
pub mod image;
pub mod link;
pub mod monitor;
pub mod process;
pub mod proto;
pub mod qemu;
pub mod tools;
