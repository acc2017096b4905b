//! What word and rings are made of; the loom tests put their own in the place of these.

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
