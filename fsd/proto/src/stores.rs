//! What to say where a storage node has not the store that it should have.

/// What to say of a storage node's store.
#[must_use]
pub fn older_store(node: u16, addr: &str, found: u64, known: u64) -> String {
    format!(
        "storage node {node} at {addr} has an older copy of its store (generation {found}, and it was at {known}): \
         put the newest one back, or take it as it is with fsd meta --accept-older (see docs/operations.md)"
    )
}

/// What to say where a storage node has another store than it had.
#[must_use]
pub fn other_store(node: u16, addr: &str, found: &str, expected: &str) -> String {
    format!(
        "storage node {node} at {addr} has the store {found}, but this cluster's files are in {expected}: \
         start the node with the right directory, or put its address right"
    )
}
