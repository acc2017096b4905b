//! The daemon's side of the kernel extension `distfuse`: an attachment to a FUSE mount, the lease table
//! shared with the kernel, and the two rings.
//!
//! `docs/kernel-abi.md` has the protocol, `kmod/include/uapi/distfuse.h` the layout, which this crate is
//! checked against.
//!
//! A daemon opens an [`Attachment`] right after it has mounted, and before anybody uses the mount. One thread
//! reads [`Attachment::next_event`]. To give the kernel a lease it calls [`Table::grant`], and, if that says so
//! or if the kernel had asked by [`Event::Need`], sends [`Command::Wake`]. To take one back it calls
//! [`Table::revoke`], which either is all there is to it, or names what has to be done: wait for
//! [`Event::Drained`], or send [`Command::Flush`] and wait for [`Event::Flushed`]; then [`Table::finish`].

mod attachment;
mod counters;
mod device;
mod error;
#[cfg(test)]
mod fuzz_tests;
pub mod layout;
mod messages;
mod pace;
pub mod ring;
mod sync;
mod sys;
mod table;
pub mod word;

pub use attachment::Attachment;
pub use counters::Counters;
pub use device::{Options, kernel_version};
pub use error::Error;
pub use layout::{ABI_VERSION, DEVICE};
pub use messages::{Act, Answer, Call, Command, Event};
pub use table::{Attributes, Grant, Table, Time};
pub use word::{Mode, Pending, Revoked, Word};
