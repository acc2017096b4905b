//! A passive agent behind TCP: the target's progress thread executes one-sided operations on its own memory.
//!
//! One progress thread per endpoint reads all connections, executes what peers ask for, delivers messages and
//! completes what was asked here. Everybody else writes to the sockets directly as long as they take it; what
//! they do not take is queued and written by the progress thread.

mod conn;
mod endpoint;
mod frame;
mod pending;
mod progress;
mod request;
mod rx;
mod tx;

pub(crate) use endpoint::open;

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;
