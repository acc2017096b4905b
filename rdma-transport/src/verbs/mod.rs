//! RDMA hardware, or SoftRoCE: reliable-connected queue pairs, driven through libibverbs.
//!
//! A connection is set up over TCP with the key handshake; then queue-pair data is exchanged on that stream,
//! which stays open: it tells what region keys stand for, and its end is the end of the connection. One-sided
//! operations and messages go through the queue pair. Callers post and reap by themselves; the progress thread
//! receives messages, and sees to completions that nobody polls for.
#![deny(unsafe_code)]

mod adapter;
mod attend;
mod cells;
mod conn;
mod connection;
mod control;
mod device;
mod endpoint;
#[allow(unsafe_code)]
mod ffi;
mod incoming;
mod pace;
mod pair;
mod progress;
mod receive;
mod region;
mod request;
mod setup;
mod submit;
mod tx;
mod unit;
mod wire;

pub(crate) use endpoint::open;

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod tests;
