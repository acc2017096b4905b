//! The file system beside its floors: a null FUSE server and tmpfs.

pub mod micro;
pub mod micro_ops;
pub mod pattern;
pub mod runner;
pub mod stamp;
mod sweep;

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::ValueEnum;

use crate::nullfs::NullMode;
use crate::procs::{self, Cluster, ClusterSpec, NullServer};
use crate::progress::check;

/// Removes a file, or finds that there is none.
fn remove_if_there(path: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Arguments of `bench fs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Less than a minute: fewer points, shorter runs.
    #[arg(long)]
    pub quick: bool,
    /// What to measure.
    #[arg(long, value_enum, default_values_t = [Section::Micro, Section::Ratio, Section::Contention, Section::Nodes])]
    pub section: Vec<Section>,
    /// Fabric of the clusters.
    #[arg(long, default_value = "shm")]
    pub fabric: String,
    /// Read shares to measure, percent.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 25, 50, 75, 100])]
    pub ratios: Vec<u32>,
    /// Block sizes, bytes.
    #[arg(long, value_delimiter = ',', default_values_t = [4096, 1 << 20])]
    pub blocks: Vec<usize>,
    /// Contention levels: percent of each node's files that all nodes use.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 25, 50, 75, 100])]
    pub contention: Vec<u32>,
    /// Nodes (mounts) to go up to.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    pub nodes: Vec<usize>,
    /// Threads a node.
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Where the micro-benchmarks run: on all CPUs, on one, or once on each.
    #[arg(long, value_enum, default_value_t = Placement::Both)]
    pub placement: Placement,
}

/// Parts of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// Single operations, with targets.
    Micro,
    /// Read:write ratios, random and sequential, block sizes.
    Ratio,
    /// Share of files that all nodes use.
    Contention,
    /// Number of nodes.
    Nodes,
}

/// On which CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Placement {
    /// All.
    Free,
    /// One (`--pin`, else 0).
    Pinned,
    /// First all, then one.
    Both,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// Memory without FUSE.
    Tmpfs,
    /// FUSE without a file system, no kernel cache.
    NullDirect,
    /// FUSE without a file system, page cache for reads.
    NullWt,
    /// DistFUSE, no kernel cache.
    FsdDirect,
    /// DistFUSE, page cache for reads.
    FsdWt,
}

impl System {
    /// In the order of the columns.
    pub const ALL: [Self; 5] = [
        Self::Tmpfs,
        Self::NullDirect,
        Self::NullWt,
        Self::FsdDirect,
        Self::FsdWt,
    ];

    /// Column title.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tmpfs => "tmpfs",
            Self::NullDirect => "null direct",
            Self::NullWt => "null wt",
            Self::FsdDirect => "fsd direct",
            Self::FsdWt => "fsd wt",
        }
    }

    /// Is it ours?
    pub fn is_fsd(self) -> bool {
        matches!(self, Self::FsdDirect | Self::FsdWt)
    }
}

/// All systems, running.
pub struct Systems {
    tmpfs: tempfile::TempDir,
    null: [NullServer; 2],
    /// `direct`, then `writethrough`.
    pub clusters: [Cluster; 2],
    mounts: usize,
}

impl Systems {
    /// Starts them where this thread may run.
    ///
    /// # Errors
    /// One of them does not start.
    pub fn start(mounts: usize, fabric: &str, pool_mib: u64) -> anyhow::Result<Self> {
        let fsd = procs::fsd_binary()?;
        let cluster = |cache: &str| {
            check()?;
            let spec = ClusterSpec {
                mounts,
                cache: cache.to_owned(),
                cache_shared: false,
                fabric: fabric.to_owned(),
                pool_mib,
            };
            Cluster::start(&fsd, &spec)
        };
        Ok(Self {
            tmpfs: tempfile::Builder::new().prefix("bench-").tempdir_in("/dev/shm")?,
            null: [
                NullServer::start(NullMode::Direct)?,
                NullServer::start(NullMode::Writethrough)?,
            ],
            clusters: [cluster("direct")?, cluster("writethrough")?],
            mounts,
        })
    }

    /// The directories of a system: one a mount; floors have one only.
    pub fn dirs(&self, system: System) -> Vec<PathBuf> {
        let all = |c: &Cluster| (0..self.mounts).map(|n| c.mount(n)).collect();
        match system {
            System::Tmpfs => vec![self.tmpfs.path().to_owned()],
            System::NullDirect => vec![self.null[0].path().to_owned()],
            System::NullWt => vec![self.null[1].path().to_owned()],
            System::FsdDirect => all(&self.clusters[0]),
            System::FsdWt => all(&self.clusters[1]),
        }
    }
}

/// Runs `bench fs`.
///
/// # Errors
/// Something cannot be started or written, or a file system call fails.
pub fn run(args: &Args, pin: Option<usize>, out: &Path) -> anyhow::Result<()> {
    let scale = if args.quick {
        micro::Scale::quick()
    } else {
        micro::Scale::full()
    };
    if args.section.contains(&Section::Micro) {
        let mut tables = Vec::new();
        if args.placement != Placement::Pinned {
            procs::pin(pin)?;
            tables.push(micro::run("all CPUs", &args.fabric, scale, out)?);
        }
        if args.placement != Placement::Free {
            let cpu = pin.unwrap_or(0);
            procs::pin(Some(cpu))?;
            tables.push(micro::run("one CPU", &args.fabric, scale, out)?);
            procs::pin(pin)?;
        }
        for table in tables {
            println!("{table}");
        }
    }
    if args.section.iter().any(|s| *s != Section::Micro) {
        sweep::run(args, out)?;
    }
    println!("CSV and plots: {}", out.display());
    Ok(())
}
