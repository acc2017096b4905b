//! `fsd dev`: a cluster of separate processes on this machine, in one command.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, bail};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::children::{Children, code_of, signal, wait_for};
use super::temporary::Temporary;
use fsd_node::config::{
    CacheMode, Config, FabricChoice, LeaseConfig, MetaConfig, MountConfig, Size, StorageConfig,
};
use fsd_storage::label::Label;

/// Arguments of `fsd dev`.
#[derive(Debug, clap::Args)]
pub struct DevArgs {
    /// Mounts.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub mounts: u16,
    /// Storage nodes.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub storage: u16,
    /// Fabric.
    #[arg(long, default_value = "shm")]
    pub fabric: FabricChoice,
    /// Kernel caching.
    #[arg(long, default_value = "auto")]
    pub cache: CacheMode,
    /// With --cache writethrough, as mount.cache_shared in the configuration: for comparisons, not coherent.
    #[arg(long)]
    pub cache_shared: bool,
    /// Pool of each storage node.
    #[arg(long, default_value_t = super::defaults::DEV_POOL)]
    pub pool: Size,
    /// Mount at DIR/0, DIR/1… (default: a temporary directory).
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Keep the servers' stores here and use them again (default: a temporary directory, removed at the end).
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Longest wait for a lease, milliseconds.
    #[arg(long)]
    pub lease_wait_ms: Option<u64>,
    /// How long a progress thread spins before it sleeps, microseconds.
    #[arg(long)]
    pub spin_us: Option<u64>,
    /// With a command: say where the mounts are, and what the servers and mounts log.
    #[arg(long)]
    pub verbose: bool,
    /// Run this with `FSD_DIR` set, then take everything down and exit with its status.
    #[arg(last = true)]
    pub command: Vec<String>,
}

fn settings(args: &DevArgs, state: &Path) -> anyhow::Result<Config> {
    // No port is given to two roles, for none is free again before all have one.
    let mut held = Vec::new();
    let mut address = |name: &str| -> anyhow::Result<String> {
        Ok(match args.fabric {
            FabricChoice::Shm => state.join(format!("{name}.sock")).to_string_lossy().into_owned(),
            FabricChoice::Tcp | FabricChoice::Verbs => {
                // Free now; somebody could take it before the child does, and then it says so.
                let probe = std::net::TcpListener::bind("127.0.0.1:0").context("no free port")?;
                let address = probe.local_addr()?.to_string();
                held.push(probe);
                address
            }
        })
    };
    let storage = (0..args.storage)
        .map(|id| {
            Ok(StorageConfig {
                id,
                listen: address(&format!("storage{id}"))?,
                dir: state.join(format!("storage{id}")),
                pool: args.pool,
                memory_dir: "/dev/shm".into(),
                scrub: fsd_node::config::default_scrub(),
                scrub_pause_s: fsd_node::config::default_scrub_pause(),
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let mut lease = LeaseConfig::default();
    if let Some(ms) = args.lease_wait_ms {
        lease.wait_ms = ms;
    }
    Ok(Config {
        cluster: "dev".into(),
        key_file: state.join("cluster.key"),
        fabric: args.fabric,
        spin_us: args.spin_us.unwrap_or_else(fsd_node::config::default_spin),
        timeout_ms: 10_000,
        verbs: Default::default(),
        lease,
        membership: Default::default(),
        meta: MetaConfig {
            listen: address("meta")?,
            dir: state.join("meta"),
            memory_dir: "/dev/shm".into(),
        },
        storage,
        mount: MountConfig {
            cache: args.cache,
            cache_shared: args.cache_shared,
            ..MountConfig::default()
        },
    })
}

/// Runs `fsd dev`.
///
/// # Errors
/// A member cannot start, or died.
pub fn run(args: &DevArgs) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGCHLD]).context("signal handlers")?;
    // The children report their own readiness; this process has nothing to say to systemd.
    let temporary = Temporary::new("dev")?;
    let base = args.dir.clone().unwrap_or_else(|| temporary.path().join("mnt"));
    std::fs::create_dir_all(&base).with_context(|| format!("cannot make {}", base.display()))?;
    let base = base.canonicalize()?;
    let points: Vec<PathBuf> = (0..args.mounts).map(|i| base.join(i.to_string())).collect();
    let mut made = Vec::new();
    for point in &points {
        if !point.exists() {
            std::fs::create_dir(point).with_context(|| format!("cannot make {}", point.display()))?;
            made.push(point.clone());
        }
        fsd_client::mount::mountpoint::check_point(point, false)?;
    }
    let state = match &args.state {
        Some(dir) => {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
            dir.canonicalize()?
        }
        None => temporary.path().to_owned(),
    };
    let file = state.join("cluster.toml");
    let mut config = settings(args, &state)?;
    let fresh = !state.join("meta").exists();
    if !fresh {
        // Sizes are fixed at format time; addresses may be new.
        config
            .storage
            .iter_mut()
            .zip(Config::load(&file)?.storage)
            .for_each(|(new, old)| new.pool = old.pool);
    }
    std::fs::write(&file, toml::to_string(&config)?).context("cluster.toml")?;
    if fresh {
        super::format::keygen(&config.key_file)?;
        let uuid = format!("{:032x}", rand::random::<u128>());
        fsd_meta::server::format(&config, &uuid)?;
        for s in &config.storage {
            fsd_storage::label::format(&s.dir, &Label::new(&config, s))?;
        }
    }
    let quiet = !args.command.is_empty() && !args.verbose;
    let mut cluster = Children::new(file.clone(), temporary).quiet(quiet);
    for id in 0..args.storage {
        let id = id.to_string();
        cluster.spawn(
            &format!("storage node {id}"),
            &["storage", "--forget", "--id", &id],
            None,
        )?;
    }
    cluster.spawn("metadata server", &["meta"], None)?;
    for (i, point) in points.iter().enumerate() {
        cluster.spawn(&format!("mount {i}"), &["mount", "--auto-unmount"], Some(point))?;
    }
    if !quiet {
        let points: Vec<String> = points.iter().map(|p| p.display().to_string()).collect();
        eprintln!(
            "fsd dev: {} mounts over {} at {}",
            args.mounts,
            super::defaults::fabric_name(args.fabric),
            points.join(", ")
        );
        eprintln!("fsd dev: ask it with  fsd status --config {}", file.display());
    }
    let code = if args.command.is_empty() {
        eprintln!("fsd dev: Ctrl-C ends it");
        until_signal(&mut cluster, &mut signals)?
    } else {
        run_command(args, &base, &file, &mut cluster, &mut signals)?
    };
    let clean = cluster.take_down();
    for point in made {
        // Only what we made, and only if it is empty.
        let _ = std::fs::remove_dir(point);
    }
    if !clean {
        bail!("a process did not end in time and was killed");
    }
    Ok(code)
}

fn until_signal(cluster: &mut Children, signals: &mut Signals) -> anyhow::Result<ExitCode> {
    loop {
        if is_told_to_end(signals.pending()) {
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(dead) = cluster.dead() {
            bail!("{dead}");
        }
        // The end of a child is a signal, too.
        if is_told_to_end(signals.wait()) {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

fn is_told_to_end(mut signals: impl Iterator<Item = i32>) -> bool {
    signals.any(|signal| signal != SIGCHLD)
}

fn run_command(
    args: &DevArgs,
    base: &Path,
    config: &Path,
    cluster: &mut Children,
    signals: &mut Signals,
) -> anyhow::Result<ExitCode> {
    let pids: Vec<String> = cluster
        .pids()
        .map(|(what, pid)| format!("{}={pid}", what.replace(' ', "")))
        .collect();
    let mut child = Command::new(&args.command[0])
        .args(&args.command[1..])
        .env("FSD_DIR", base)
        .env("FSD_CONFIG", config)
        .env("FSD_PIDS", pids.join(" "))
        .spawn()
        .with_context(|| format!("cannot run {}", args.command[0]))?;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(ExitCode::from(code_of(status)));
        }
        if is_told_to_end(signals.wait()) {
            signal(&child, rustix::process::Signal::TERM);
            wait_for(&mut child, Duration::from_secs(5));
            return Ok(ExitCode::from(130));
        }
    }
}
