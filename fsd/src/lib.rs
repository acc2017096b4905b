//! DistFUSE: a distributed POSIX file system through FUSE, coherent by leases.
//!
//! One process plays one or more roles: metadata server ([`meta`]), storage node ([`storage`]), FUSE
//! client ([`client`]). They talk through `rdma-transport` with the messages of [`wire`]; the leases that
//! keep the clients' caches coherent are `lockmgr`'s.

pub mod client;
pub mod clock;
pub mod cmd;
pub mod config;
pub mod endpoint;
#[cfg(test)]
mod fake_conn;
pub mod files;
mod heap;
pub mod ino;
pub mod memory;
pub mod meta;
pub mod ports;
pub mod probe;
pub mod rpc;
pub mod storage;
pub mod store;
pub mod wire;
