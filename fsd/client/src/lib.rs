//! The FUSE client: a mount.
//!
//! Rooms, each above those that it knows:
//!
//! | room | subject |
//! | --- | --- |
//! | [`mount`] | start, stop |
//! | [`fuse`], [`calls`] | the requests of a stock kernel; the calls of the kernel extension |
//! | [`membership`] | what is done when another mount is dead |
//! | [`revoke`] | giving leases up, forgetting inodes |
//! | [`files`] | the operations on files: what a system call does, from its lease to its answer |
//! | [`storing`] | bringing dirty data and attributes to the servers |
//! | [`namespace`] | names, extended attributes, transactions |
//! | [`opens`] | open files, and what a lease record says of them |
//! | [`data`] | frames, space, reads and writes under a lease that is held |
//! | [`kernel`] | what the kernel caches: invalidations, delegations, recalls |
//! | [`cache`] | inodes, and what is cached of them under which version |
//! | [`session`] | connections, leases, threads that may wait |
//!
//! Order of locks: lease → claim on a range of a file → inode state → space accounts → connections. Nothing waits for a lease while it
//! holds a claim or an inode's state, and nothing waits for a server while it holds an inode's state.

pub mod cache;
pub mod calls;
pub mod client;
pub mod data;
pub mod files;
pub mod fuse;
pub mod kernel;
pub mod membership;
pub mod mount;
pub mod namespace;
pub mod opens;
pub mod revoke;
pub mod session;
pub mod storing;

pub use client::Client;
pub use mount::{Detached, Mount, MountError, MountOptions, Mounted};
