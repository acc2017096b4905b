//! The metadata server: names, inodes, extended attributes, file locks, membership.
//!
//! Every change is one transaction of the embedded store. Clients' leases protect the clients' caches, not
//! the store: requests are carried out one after the other on the progress thread.

mod error;
mod house;
mod journal;
mod membership;
mod namespace;
mod nodes;
pub mod rules;
pub mod server;
mod service;

pub use error::MetaError;
pub use server::MetaServer;

#[cfg(test)]
mod crash_tests;
#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod takeover_tests;
