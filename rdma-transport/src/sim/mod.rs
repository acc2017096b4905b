//! A deterministic fabric: one thread, virtual time, one seed.
//!
//! Endpoints of one [`SimNet`] are connected by lanes, one per direction of each connection. What enters a lane
//! leaves it in the same order, each thing at a random virtual time; lanes do not wait for each other, so
//! everything that a real fabric may reorder is reordered sooner or later, and the same seed gives the same run.
//! Nothing happens by itself: the test calls [`SimNet::step`]; but for [`SimNet::threaded`], whose time is that of `rt`.

mod config;
mod endpoint;
mod event;
mod lanes;
mod net;
mod netref;
mod place;
mod regions;
mod remote;
mod room;
mod schedule;
mod state;
mod travel;

pub use config::SimConfig;
pub use net::SimNet;
