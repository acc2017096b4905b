//! What several commands take if nothing else is said, and how it is called.

use fsd_node::config::{FabricChoice, Size};

/// Size of the pool of each storage node in `fsd dev`.
pub const DEV_POOL: Size = Size(1 << 30);

/// Fabric of `fsd dev`, from its argument.
#[must_use]
pub fn fabric_name(fabric: FabricChoice) -> &'static str {
    match fabric {
        FabricChoice::Shm => "shm",
        FabricChoice::Tcp => "tcp",
        FabricChoice::Verbs => "verbs",
    }
}
