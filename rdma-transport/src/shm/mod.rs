//! Processes of one host map each other's registered memory; operations are executed by the caller's CPU.
//!
//! Three kinds of shared memory are involved:
//! * the **regions** the application registers;
//! * one **directory** per endpoint ([`layout::Directory`]): which region keys are valid right now, and whether
//!   the progress thread sleeps;
//! * one **channel** per connection ([`layout::Channel`]): a message ring each way, the permission each side
//!   gives the other, and for each side a count of its operations in flight per region.
//!
//! Of an endpoint whose memory outlives its process, the permission and the counts of a connection are in a file that does so,
//! too (`seat.rs`); the next process finds there who may still be executing something (`former.rs`).
//!
//! The last two make ends of access exact: an operation first counts itself in flight, then checks permission
//! and key, so whoever withdraws either and then sees the count at zero knows that nothing can land any more.

mod conn;
mod control;
mod core;
mod endpoint;
mod executor;
mod former;
mod host;
mod layout;
mod listen;
mod maps;
mod progress;
mod ring;
mod seat;
mod send;
mod setup;

pub(crate) use endpoint::open;

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;
