//! DistFUSE: a distributed POSIX file system through FUSE, coherent by leases. This is its program: the commands.
//!
//! One process plays one role: metadata server (`fsd-meta`), storage node (`fsd-storage`), or FUSE client (`fsd-client`). They
//! talk through `rdma-transport` with the messages of `fsd-proto`; the leases that keep the clients' caches coherent are `lockmgr`'s.
//! Servers know no client, and the client knows of the servers only their messages.

pub mod cmd;
