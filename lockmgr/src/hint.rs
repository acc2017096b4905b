//! What is remembered of records that have left the table.

use crate::ids::NodeId;

/// What is remembered of a record: the version of its data, and who owned the word last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Hint {
    pub(crate) version: u64,
    pub(crate) owner: Option<NodeId>,
}
