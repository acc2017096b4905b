//! Clusters and their floors, side by side: a null FUSE server, memory, and this machine's disk.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum;

use crate::nullfs::NullMode;
use crate::procs::{self, Cluster, ClusterSpec, NullServer};
use crate::progress::check;

/// How long is waited for what was written to be stored, between two phases.
const PATIENCE: Duration = Duration::from_secs(30);

/// Which of the floors is which; clusters come behind them.
pub const TMPFS: usize = 0;
/// This machine's disk.
pub const DISK: usize = 1;
/// The FUSE server that does nothing.
pub const NULL: usize = 2;
/// The first cluster.
pub const OURS: usize = 3;

/// What is measured: a floor, or a cluster.
pub struct System {
    /// As columns say it.
    pub name: String,
    /// Where it is mounted.
    pub mounts: Vec<PathBuf>,
    /// None: a floor.
    pub cluster: Option<Cluster>,
}

/// The floors, then the clusters.
pub struct Beside {
    /// In this order they take turns.
    pub systems: Vec<System>,
    _kept: (tempfile::TempDir, tempfile::TempDir, NullServer),
}

/// Arguments of all that is measured so.
#[derive(Debug, Clone, clap::Args)]
pub struct BesideArgs {
    /// Rounds in turns; the median counts.
    #[arg(long, default_value_t = 3)]
    pub rounds: usize,
    /// Fabric of the clusters.
    #[arg(long, default_value = "shm")]
    pub fabric: String,
    /// Kernel caching of the clusters, and of the null FUSE server.
    #[arg(long, value_enum, default_value_t = NullMode::Writethrough)]
    pub cache: NullMode,
    /// A directory on the disk that is to be beside them.
    #[arg(long, default_value = ".")]
    pub disk: PathBuf,
    /// Pool of each of a cluster's two storage nodes, MiB.
    #[arg(long, default_value_t = 512)]
    pub pool_mib: u64,
}

impl Beside {
    /// Starts floors, and a cluster of `mounts` mounts of each program.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start(args: &BesideArgs, mounts: usize, programs: &[(&str, PathBuf)]) -> anyhow::Result<Self> {
        let temporary = |dir: &Path| {
            let made = tempfile::Builder::new().prefix("bench-floor-").tempdir_in(dir);
            made.with_context(|| format!("a directory in {}", dir.display()))
        };
        let (memory, disk) = (temporary(Path::new("/dev/shm"))?, temporary(&args.disk)?);
        let null = NullServer::start(args.cache)?;
        let floor = |name: &str, dir: &Path| System {
            name: name.to_owned(),
            mounts: vec![dir.to_owned()],
            cluster: None,
        };
        let mut systems = vec![
            floor("tmpfs", memory.path()),
            floor(kind_of(disk.path())?, disk.path()),
            floor("null FUSE", null.path()),
        ];
        let cache = args.cache.to_possible_value().context("a cache mode")?;
        let spec = ClusterSpec {
            mounts,
            cache: cache.get_name().to_owned(),
            cache_shared: false,
            fabric: args.fabric.clone(),
            pool_mib: args.pool_mib,
        };
        for (name, program) in programs {
            let cluster = Cluster::start(program, &spec)?;
            systems.push(System {
                name: (*name).to_owned(),
                mounts: (0..mounts).map(|n| cluster.mount(n)).collect(),
                cluster: Some(cluster),
            });
        }
        Ok(Self {
            systems,
            _kept: (memory, disk, null),
        })
    }

    /// As columns say them.
    pub fn names(&self) -> Vec<String> {
        self.systems.iter().map(|s| s.name.clone()).collect()
    }
}

impl System {
    /// The mount of a number; a floor has one, whoever asks.
    pub fn mount(&self, number: usize) -> &Path {
        &self.mounts[number % self.mounts.len()]
    }

    /// Waits until everything that was done in some directories is done at the servers, too.
    pub fn settle<'a>(&self, dirs: impl IntoIterator<Item = &'a Path>) -> anyhow::Result<()> {
        for dir in dirs {
            File::open(dir)?.sync_all()?;
        }
        let Some(cluster) = &self.cluster else {
            return Ok(());
        };
        let start = Instant::now();
        while cluster.counter("dirty_files").context("the cluster's status")? > 0 {
            check()?;
            ensure!(start.elapsed() < PATIENCE, "what was written is not stored");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// What the cluster's processes have done so far.
    pub fn effort(&self) -> anyhow::Result<Option<Effort>> {
        let Some(cluster) = &self.cluster else {
            return Ok(None);
        };
        let all: BTreeMap<String, u64> = cluster.counters().context("the cluster's status")?;
        let [requests, messages] = ["requests", "messages"].map(|name| all.get(name).copied().unwrap_or(0));
        let cpu = cluster
            .members()
            .iter()
            .map(|(_, pid)| procs::cpu_time(*pid))
            .sum();
        Ok(Some(Effort {
            requests,
            messages,
            cpu,
        }))
    }

    /// What the cluster said, if it is one.
    pub fn log(&self) -> String {
        self.cluster.as_ref().map(Cluster::log).unwrap_or_default()
    }
}

/// What processes of a cluster have done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Effort {
    /// Requests of the kernel.
    pub requests: u64,
    /// Messages and one-sided operations of the mounts.
    pub messages: u64,
    /// CPU time of all its processes.
    pub cpu: Duration,
}

impl Effort {
    /// Since `before`, without what asking costs.
    pub fn since(&self, before: &Self, asking: &Self) -> Self {
        let less = |now: u64, then: u64, asked: u64| now.saturating_sub(then).saturating_sub(asked);
        Self {
            requests: less(self.requests, before.requests, asking.requests),
            messages: less(self.messages, before.messages, asking.messages),
            cpu: self.cpu.saturating_sub(before.cpu).saturating_sub(asking.cpu),
        }
    }

    /// Requests, messages, and microseconds of CPU, of each of some files.
    pub fn of_each(&self, files: usize) -> [f64; 3] {
        let all = [
            self.requests as f64,
            self.messages as f64,
            self.cpu.as_secs_f64() * 1e6,
        ];
        all.map(|n| n / files.max(1) as f64)
    }
}

/// What a directory's file system is.
fn kind_of(dir: &Path) -> anyhow::Result<&'static str> {
    Ok(match rustix::fs::statfs(dir)?.f_type {
        0xef53 => "ext4",
        0x5846_5342 => "xfs",
        0x9123_683e => "btrfs",
        0x794c_7630 => "overlay",
        0x0102_1994 => "tmpfs there",
        _ => "disk",
    })
}

/// How a rate compares with another.
pub fn ratio(ours: f64, floor: f64) -> String {
    if floor > 0.0 && ours > 0.0 {
        format!("{:.2}", ours / floor)
    } else {
        "-".into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asking_costs_is_no_effort() {
        let effort = |n: u64| Effort {
            requests: n,
            messages: 2 * n,
            cpu: Duration::from_micros(n),
        };
        let each = effort(130).since(&effort(20), &effort(10)).of_each(50);
        assert_eq!((each[0], each[1]), (2.0, 4.0));
        assert!((each[2] - 2.0).abs() < 1e-9);
        assert_eq!(effort(5).since(&effort(5), &effort(1)), Effort::default());
    }
}
