//! What goes over the wire between the roles of DistFUSE, and what all of them must agree on.

pub mod ask;
pub mod clock;
pub mod errno;
pub mod ino;
pub mod layout;
pub mod locks;
pub mod rpc;
pub mod stores;
pub mod time;
pub mod wire;
