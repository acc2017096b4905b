//! Batches that are to be posted.

use std::sync::Arc;

use crate::fsm::WordOps;
use crate::lease::LeaseHandle;

/// The batch of a record.
pub(super) type RecordBatch = (Arc<LeaseHandle>, WordOps);

/// When batches are posted.
pub(super) enum Posting<'a> {
    /// At once.
    AtOnce,
    /// Later, together with others.
    Together(&'a mut Vec<RecordBatch>),
}
