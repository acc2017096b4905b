//! libibverbs behind safe types; the only place of this provider with `unsafe` in it.
//!
//! Every object keeps alive what it was made from, and is destroyed when it is dropped. What is posted names
//! memory by address and key: the adapter refuses whatever lies outside of a registered region, and a region
//! keeps its memory mapped until after it is deregistered. So no work request can reach memory that is gone.

mod completions;
mod device;
mod queue;
mod status;

pub(super) use completions::{Channel, Cq, Wc};
pub(super) use device::{Context, DeviceLimits, Event, Gid, Mr, Pd, PortInfo, names};
pub(super) use queue::{Caps, Local, Post, Qp, RdAtomic, Route, Srq, Verb};
pub(super) use status::access;
