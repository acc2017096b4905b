//! Why a mount fails.

use std::path::PathBuf;

use lockmgr::LeaseError;

use fsd_node::ports::Ports;
use fsd_proto::clock::Skew;
use fsd_proto::rpc::RpcError;

/// Why a mount failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no FUSE here.
    #[error(
        "/dev/fuse cannot be opened ({0}): load the fuse module (modprobe fuse) or run where the device is available"
    )]
    NoFuse(std::io::Error),
    /// The mount point is unusable.
    #[error("{path}: {detail}")]
    MountPoint {
        /// The mount point.
        path: PathBuf,
        /// What is wrong, and what to do.
        detail: String,
    },
    /// The cluster does not take us.
    #[error("cannot join the cluster: {0}")]
    Join(RpcError),
    /// The clocks differ too much.
    #[error(
        "the clock of this host differs: it is {0} the metadata server's, and two seconds are the most; synchronise the clocks (for example with chrony)"
    )]
    Clocks(Skew),
    /// A server has a store that is not what it was.
    #[error(
        "the metadata server refuses this cluster's stores: one of them is an older copy, or another's; the server's log says which"
    )]
    Stores,
    /// No node number is free.
    #[error("the cluster has no room for another mount: format it with a larger lease.record_bytes")]
    Full,
    /// The fabric refused.
    #[error(transparent)]
    Transport(#[from] rdma_transport::TransportError),
    /// The leases cannot be set up.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// Options that are not known.
    #[error("{detail}")]
    Options {
        /// One sentence that names them.
        detail: String,
    },
    /// The kernel refused the mount.
    #[error("the kernel refuses to mount on {path}: {error}")]
    Kernel {
        /// The mount point.
        path: PathBuf,
        /// The error number of mount(2).
        error: std::io::Error,
    },
    /// No port is left for it.
    #[error(
        "all ports that mounts may listen at (mount.ports = \"{0}\") are taken on this host: end a mount, or allow more ports there and in the firewalls"
    )]
    Ports(Ports),
    /// The kernel extension cannot be used.
    #[error("{0}; or mount with --cache writethrough")]
    Extension(#[from] distfuse_abi::Error),
    /// Another mount is not replaced by this one.
    #[error("the mount cannot be taken over: {0}")]
    Successor(String),
    /// The device cannot be used.
    #[error("the descriptor of /dev/fuse: {0}")]
    Device(std::io::Error),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
