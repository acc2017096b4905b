//! What of a file is known to survive a crash of the servers' hosts: what the next fsync need not ask for. Pure.

use std::collections::BTreeSet;

/// What is known to be durable, in one tenure of the lease.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Durable {
    /// The metadata server had made all durable when the file had this size, except perhaps its times.
    size: Option<u64>,
    /// Storage nodes that have made all durable that they have of it.
    nodes: BTreeSet<u16>,
    /// Blocks before this one have been freed by this mount, and not all storage nodes have been asked since to make that durable: what
    /// comes back after a power cut would be there again when the file grows. Holds beyond the tenure.
    freed: u64,
    /// Moves when something changes at a storage node.
    changes: u64,
}

impl Durable {
    /// Another version of the lease: another mount may have changed anything.
    pub(super) fn forget(&mut self) {
        self.size = None;
        self.nodes.clear();
        self.changes += 1;
    }

    /// This mount changes something of the file at a storage node.
    pub(super) fn changed(&mut self, node: u16) {
        self.nodes.remove(&node);
        self.changes += 1;
    }

    /// Blocks before `end` are freed.
    pub(super) fn freed(&mut self, end: u64) {
        self.freed = self.freed.max(end);
    }

    /// Blocks before this one have been freed, which may not be durable.
    #[must_use]
    pub fn freed_before(&self) -> u64 {
        self.freed
    }

    /// Is all durable that a storage node has of it?
    #[must_use]
    pub fn is_stored(&self, node: u16) -> bool {
        self.nodes.contains(&node)
    }

    /// Storage nodes that have made all durable that they have of it.
    #[must_use]
    pub fn nodes(&self) -> Vec<u16> {
        self.nodes.iter().copied().collect()
    }

    /// Is everything durable at the metadata server that reading a file of this size needs?
    #[must_use]
    pub fn is_told(&self, size: u64) -> bool {
        self.size == Some(size)
    }

    /// To be noted when the storage nodes are asked, and given back with their answers.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Storage nodes have made durable what they had when [`Durable::changes`] was this, and nodes that it lacks had nothing else.
    pub fn stored(&mut self, changes: u64, nodes: impl IntoIterator<Item = u16>) {
        if self.changes == changes {
            self.nodes.extend(nodes);
            self.freed = 0;
        }
    }

    /// The metadata server has made everything durable, for a file of this size.
    pub fn told(&mut self, size: u64) {
        self.size = Some(size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_while_a_node_stores_is_not_taken_for_stored() {
        let mut durable = Durable::default();
        let before = durable.changes();
        durable.changed(1);
        durable.stored(before, [0, 1]);
        assert!(!durable.is_stored(0) && !durable.is_stored(1));
        durable.stored(durable.changes(), [0, 1]);
        assert!(durable.is_stored(0) && durable.is_stored(1));
        durable.changed(1);
        assert!(durable.is_stored(0) && !durable.is_stored(1));
    }

    #[test]
    fn another_tenure_knows_only_what_this_mount_has_freed() {
        let mut durable = Durable::default();
        durable.freed(9);
        durable.stored(durable.changes(), [0]);
        assert_eq!(durable.freed_before(), 0);
        durable.freed(7);
        durable.told(4096);
        assert!(durable.is_told(4096) && !durable.is_told(0));
        let asked = durable.changes();
        durable.forget();
        durable.stored(asked, [0]);
        assert!(!durable.is_stored(0) && !durable.is_told(4096));
        assert_eq!(durable.freed_before(), 7);
    }
}
