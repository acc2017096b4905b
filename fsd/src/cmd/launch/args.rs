//! Arguments of `fsd launch`.

use std::path::PathBuf;

use fsd_node::config::{CacheMode, FabricChoice, Size};

use crate::cmd::defaults::DEV_POOL;

/// Arguments of `fsd launch`.
#[derive(Debug, clap::Args)]
pub struct LaunchArgs {
    /// Which hosts, and how members are started there.
    #[command(flatten)]
    pub hosts: HostArgs,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Where it keeps what it has.
    #[command(flatten)]
    pub dirs: DirArgs,
    /// How the members meet.
    #[command(flatten)]
    pub meeting: MeetingArgs,
    /// What a member is told that was started over ssh.
    #[command(flatten)]
    pub member: MemberArgs,
    /// Run this on every host that mounts, with `FSD_MOUNT`, `FSD_RANK`, `FSD_CLIENT` … set (default: nothing,
    /// until Ctrl-C).
    #[arg(last = true)]
    pub command: Vec<String>,
}

/// Which hosts, and how members are started there.
#[derive(Debug, clap::Args)]
pub struct HostArgs {
    /// Start a member on every host of this file over ssh (without it: mpirun or srun have started this).
    #[arg(long, conflicts_with = "hosts")]
    pub hostfile: Option<PathBuf>,
    /// The same, hosts separated by commas.
    #[arg(long, value_delimiter = ',')]
    pub hosts: Vec<String>,
    /// Program that is used like ssh, with its options.
    #[arg(long, default_value = "ssh -T -o BatchMode=yes")]
    pub ssh: String,
    /// Path of fsd on the other hosts (default: the same as here).
    #[arg(long)]
    pub fsd: Option<PathBuf>,
    /// Begin each line of output with the host it comes from.
    #[arg(long)]
    pub tag: bool,
}

/// What the cluster is like.
#[derive(Debug, clap::Args)]
pub struct ClusterArgs {
    /// Who plays what, by rank: for example meta=0,storage=0-1,client=1-3 (default: rank 0 serves, all mount).
    #[arg(long)]
    pub roles: Option<String>,
    /// Fabric.
    #[arg(long, default_value = "tcp")]
    pub fabric: FabricChoice,
    /// Kernel caching.
    #[arg(long, default_value = "auto")]
    pub cache: CacheMode,
    /// With --cache writethrough, as mount.cache_shared in the configuration: for comparisons, not coherent.
    #[arg(long)]
    pub cache_shared: bool,
    /// Pool of each storage node.
    #[arg(long, default_value_t = DEV_POOL)]
    pub pool: Size,
    /// Longest wait for a lease, milliseconds.
    #[arg(long)]
    pub lease_wait_ms: Option<u64>,
}

/// Where mounts and stores are.
#[derive(Debug, clap::Args)]
pub struct DirArgs {
    /// Mount at DIR/RANK (default: in a temporary directory).
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Keep the stores in DIR/rankN and use them again (default: a temporary directory, removed at the end).
    #[arg(long)]
    pub state: Option<PathBuf>,
}

/// How the members meet.
#[derive(Debug, clap::Args)]
pub struct MeetingArgs {
    /// HOST:PORT where the members meet: of the first host, or over ssh also of this one (default: found out, where that is
    /// possible).
    #[arg(long)]
    pub rendezvous: Option<String>,
    /// Secret of the job, the same file on all hosts (default: made up with --hostfile; else $FSD_LAUNCH_KEY).
    #[arg(long)]
    pub key_file: Option<PathBuf>,
    /// How long to wait until all have come, seconds.
    #[arg(long, default_value_t = 60)]
    pub wait: u64,
}

/// What a member is told that was started over ssh.
#[derive(Debug, clap::Args)]
pub struct MemberArgs {
    #[arg(long, hide = true, requires = "size")]
    /// This process is a member with this rank, its key comes on standard input.
    pub member: Option<u32>,
    #[arg(long, hide = true)]
    /// How many members there are.
    pub size: Option<u32>,
    #[arg(long, hide = true, requires = "member")]
    /// This member leads the job.
    pub lead: bool,
}
