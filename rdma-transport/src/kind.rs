//! Kinds of fabrics.

/// Which provider an endpoint is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FabricKind {
    /// Shared memory between processes of one host.
    Shm,
    /// A passive agent behind TCP.
    Tcp,
    /// The deterministic simulator.
    Sim,
    /// RDMA verbs.
    Verbs,
}
