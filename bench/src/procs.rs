//! Servers that the benchmarks start, and that end with them however they end: every one of them watches its
//! standard input, whose other end closes with this process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::nullfs::NullMode;

/// How long servers may take to end by themselves.
const PATIENCE: Duration = Duration::from_secs(10);

/// Finds the `fsd` program.
///
/// # Errors
/// There is none.
pub fn fsd_binary() -> anyhow::Result<PathBuf> {
    let mut tried = Vec::new();
    if let Some(path) = std::env::var_os("FSD_BIN") {
        tried.push(PathBuf::from(path));
    } else {
        if let Ok(exe) = std::env::current_exe() {
            tried.push(exe.with_file_name("fsd"));
        }
        tried.push("target/release/fsd".into());
    }
    match tried.iter().find(|p| p.is_file()) {
        Some(path) => path.canonicalize().context("path of fsd"),
        None => bail!(
            "no fsd program at {}: build it with `cargo build --release -p fsd`, or set FSD_BIN",
            tried
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(" or ")
        ),
    }
}

/// Pins this thread, and all threads and processes it starts, to a CPU; or lifts that.
///
/// # Errors
/// There is no such CPU.
pub fn pin(cpu: Option<usize>) -> anyhow::Result<()> {
    let mut set = rustix::thread::CpuSet::new();
    match cpu {
        Some(cpu) if cpu < rustix::thread::CpuSet::MAX_CPU => set.set(cpu),
        Some(cpu) => bail!("there is no CPU {cpu}"),
        None => (0..rustix::thread::CpuSet::MAX_CPU).for_each(|cpu| set.set(cpu)),
    }
    rustix::thread::sched_setaffinity(None, &set).context("sched_setaffinity")
}

/// CPU time used by a process so far, all threads.
pub fn cpu_time(pid: u32) -> Duration {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return Duration::ZERO;
    };
    let ns = tasks
        .flatten()
        .filter_map(|t| std::fs::read_to_string(t.path().join("schedstat")).ok())
        .filter_map(|s| s.split(' ').next().and_then(|n| n.parse::<u64>().ok()))
        .sum();
    Duration::from_nanos(ns)
}

fn mounts_under(dir: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .filter_map(|l| l.split(' ').nth(1))
        .map(|p| PathBuf::from(p.replace("\\040", " ")))
        .filter(|p| p.starts_with(dir))
        .collect()
}

fn unmount_under(dir: &Path) {
    for point in mounts_under(dir) {
        if rustix::mount::unmount(&point, rustix::mount::UnmountFlags::DETACH).is_err() {
            let _ = Command::new("fusermount3").arg("-uz").arg(&point).status();
        }
    }
}

fn ended_within(child: &mut Child, limit: Duration) -> bool {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
}

/// What `fsd status --json` says of a cluster.
pub fn status(fsd: &Path, config: &Path) -> Option<serde_json::Value> {
    let out = Command::new(fsd)
        .args(["status", "--json", "--config"])
        .arg(config)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    serde_json::from_slice(&out.stdout).ok()
}

/// What kind of cluster to start.
#[derive(Debug, Clone)]
pub struct ClusterSpec {
    /// Mounts.
    pub mounts: usize,
    /// `direct`, `writethrough`, `writeback` (or `auto`).
    pub cache: String,
    /// In mode `writethrough`: shared files in the page cache too, as the paper's baseline has them.
    pub cache_shared: bool,
    /// `shm`, `tcp` or `verbs`.
    pub fabric: String,
    /// Pool of each of the two storage nodes, MiB.
    pub pool_mib: u64,
}

/// A running `fsd dev`.
pub struct Cluster {
    dev: Child,
    members: Vec<(String, u32)>,
    dir: tempfile::TempDir,
    fsd: PathBuf,
}

impl Cluster {
    /// Starts it and waits until all mounts are there.
    ///
    /// # Errors
    /// It does not start; what it said is in the error.
    pub fn start(fsd: &Path, spec: &ClusterSpec) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("bench-fsd-")
            .tempdir()
            .context("temporary directory")?;
        let log = std::fs::File::create(dir.path().join("log")).context("log file")?;
        let dev = Command::new(fsd)
            .args([
                "dev",
                "--mounts",
                &spec.mounts.to_string(),
                "--cache",
                &spec.cache,
            ])
            .args([
                "--fabric",
                &spec.fabric,
                "--pool",
                &format!("{}MiB", spec.pool_mib),
            ])
            .args(spec.cache_shared.then_some("--cache-shared"))
            .arg("--dir")
            .arg(dir.path().join("mnt"))
            .arg("--state")
            .arg(dir.path().join("state"))
            // Says who is there, then lives as long as we do.
            .args(["--", "sh", "-c", "echo \"pids $FSD_PIDS\"; exec cat >/dev/null"])
            .env("RUST_LOG", "warn")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {}", fsd.display()))?;
        let mut cluster = Self {
            dev,
            members: Vec::new(),
            dir,
            fsd: fsd.to_owned(),
        };
        let out = cluster.dev.stdout.take().context("output of fsd dev")?;
        for line in BufReader::new(out).lines() {
            if let Some(pids) = line?.strip_prefix("pids ") {
                cluster.members = pids
                    .split(' ')
                    .filter_map(|m| m.split_once('='))
                    .filter_map(|(name, pid)| Some((name.to_owned(), pid.parse().ok()?)))
                    .collect();
                break;
            }
        }
        if cluster.members.is_empty() {
            bail!("fsd dev did not start: {}", cluster.log().trim());
        }
        Ok(cluster)
    }

    /// What its processes said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Where mount `n` is.
    pub fn mount(&self, n: usize) -> PathBuf {
        self.dir.path().join("mnt").join(n.to_string())
    }

    /// Its processes: role and number; the supervising one is not among them.
    pub fn members(&self) -> &[(String, u32)] {
        &self.members
    }

    /// The process of `fsd dev` itself.
    pub fn supervisor(&self) -> u32 {
        self.dev.id()
    }

    /// Sum over the mounts of a counter of `fsd status --json`.
    pub fn counter(&self, name: &str) -> Option<u64> {
        self.counters().and_then(|all| all.get(name).copied())
    }

    /// All counters of `fsd status --json`, those of the kernel extension too, summed over the mounts.
    pub fn counters(&self) -> Option<BTreeMap<String, u64>> {
        counters(&self.fsd, &self.dir.path().join("state/cluster.toml"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.dev.stdin.take());
        if !ended_within(&mut self.dev, PATIENCE) {
            eprintln!(
                "bench: fsd dev did not end within {} s after its command ended; killing it",
                PATIENCE.as_secs()
            );
            for (_, pid) in &self.members {
                kill(*pid);
            }
            if !ended_within(&mut self.dev, PATIENCE) {
                let _ = self.dev.kill();
            }
        }
        let _ = self.dev.wait();
        unmount_under(self.dir.path());
        if std::env::var_os("BENCH_SHOW_LOG").is_some() {
            eprint!("{}", self.log());
        }
    }
}

/// A null FUSE server in a process of its own.
pub struct NullServer {
    child: Child,
    dir: tempfile::TempDir,
}

impl NullServer {
    /// Starts and mounts it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(mode: NullMode) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("bench-null-")
            .tempdir()
            .context("temporary directory")?;
        let mut child = Command::new(std::env::current_exe()?)
            .args(["null-server", clap_name(mode)])
            .arg(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .spawn()
            .context("cannot start the null FUSE server")?;
        let mut ready = [0u8; 1];
        let said = child.stdout.as_mut().map(|out| out.read(&mut ready));
        let server = Self { child, dir };
        match said {
            Some(Ok(1)) => Ok(server),
            _ => bail!("the null FUSE server did not start"),
        }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

fn clap_name(mode: NullMode) -> &'static str {
    match mode {
        NullMode::Direct => "direct",
        NullMode::Writethrough => "writethrough",
        NullMode::Writeback => "writeback",
    }
}

impl Drop for NullServer {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        if !ended_within(&mut self.child, PATIENCE) {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
        unmount_under(self.dir.path());
    }
}

/// The process of [`NullServer`]: serves until its standard input ends.
///
/// # Errors
/// It cannot be mounted.
pub fn serve_null(mode: NullMode, dir: &Path) -> anyhow::Result<()> {
    let session = crate::nullfs::NullFs::new(mode)
        .mount(dir, 2)
        .context("mounting the null FUSE server")?;
    println!("+");
    let mut rest = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut rest);
    session.umount_and_join().context("unmounting")
}

/// All counters of `fsd status --json`, those of the kernel extension too, summed over the mounts.
pub fn counters(fsd: &Path, config: &Path) -> Option<BTreeMap<String, u64>> {
    let report = status(fsd, config)?;
    let mut sums = BTreeMap::new();
    // Of the whole machine: other work counts, too.
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let switches = stat
        .lines()
        .find_map(|l| l.strip_prefix("ctxt ")?.parse::<u64>().ok());
    sums.insert("context switches".to_owned(), switches.unwrap_or(0));
    for mount in report.get("mounts")?.as_array()? {
        let own = mount.get(1)?.get("Ok")?.as_object()?;
        let plain = own
            .iter()
            .filter_map(|(name, n)| Some((name.clone(), n.as_u64()?)));
        let kernel = own.get("kernel").and_then(|k| k.as_array()).into_iter().flatten();
        let kernel =
            kernel.filter_map(|k| Some((format!("kernel {}", k.get(0)?.as_str()?), k.get(1)?.as_u64()?)));
        for (name, n) in plain.chain(kernel) {
            *sums.entry(name).or_default() += n;
        }
    }
    Some(sums)
}
