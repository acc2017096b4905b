//! What the providers share that set connections up over TCP streams and watch them with one progress thread.

mod core;
mod door;
mod host;
mod progress;
mod socket;

#[cfg(feature = "verbs")]
pub(crate) use core::Greeted;
pub(crate) use core::{Core, Linked};
pub(crate) use door::Listening;
pub(crate) use host::Host;
#[cfg(feature = "verbs")]
pub(crate) use progress::watch;
pub(crate) use progress::{Drive, Fate, Link, Links, start};
pub(crate) use socket::FramedPipe;
#[cfg(test)]
pub(crate) use socket::prepare;
