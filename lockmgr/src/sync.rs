//! What the gate is made of; the loom test puts its own in the place of these.

pub(crate) use rt::sync::Mutex;
pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
