//! `fsd launch`: a cluster on several hosts for as long as a command runs, like an MPI job.
//!
//! Either it starts a member on every host of a hostfile over ssh, or mpirun or srun have started it on
//! every host and it finds its rank in the environment. The members meet at a coordinator (in this process,
//! or in that of rank 0), which tells them who plays what, and leads them from step to step; see `talk`.
//!
//! | module | subject |
//! | --- | --- |
//! | `args` | what it is told |
//! | `ranks` | what MPI launchers and Slurm say in the environment |
//! | `roles` | which rank plays what |
//! | `talk`, `rendezvous` | messages, and the coordinator as a state machine |
//! | `coordinator`, `member` | the two sides |
//! | `ssh` | starting members |

mod args;
mod coordinator;
mod member;
mod ranks;
mod rendezvous;
mod roles;
mod ssh;
mod talk;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::TryRecvError;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use rand::Rng;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use args::LaunchArgs;
use coordinator::Coordinator;
use fsd_client::mount::listen::is_here;
use fsd_node::config::{Config, FabricChoice, LeaseConfig, MetaConfig, MountConfig, StorageConfig};
use member::Member;
use rendezvous::{Addresses, Job};
use roles::Roles;

use crate::cmd::defaults::fabric_name;
use crate::cmd::hex::unhex;

/// Where the key of a job is, if not in a file.
const KEY_ENV: &str = "FSD_LAUNCH_KEY";
/// Name that the coordinator and the members of any job go by.
const RENDEZVOUS: &str = "rendezvous";

/// Settings of the endpoints that the members meet at.
fn base(args: &LaunchArgs) -> Config {
    let nowhere = PathBuf::new();
    let mut lease = LeaseConfig::default();
    if let Some(ms) = args.cluster.lease_wait_ms {
        lease.wait_ms = ms;
    }
    Config {
        cluster: RENDEZVOUS.into(),
        key_file: nowhere.clone(),
        fabric: FabricChoice::Tcp,
        spin_us: 0,
        timeout_ms: 10_000,
        lease,
        membership: Default::default(),
        meta: MetaConfig {
            listen: String::new(),
            dir: nowhere,
            memory_dir: "/dev/shm".into(),
        },
        storage: Vec::new(),
        verbs: Default::default(),
        mount: MountConfig {
            cache: args.cluster.cache,
            cache_shared: args.cluster.cache_shared,
            ..MountConfig::default()
        },
    }
}

/// The configuration of a job's cluster, but for paths.
fn config_text(base: &Config, (meta, storage): &Addresses) -> Result<String, String> {
    let mut config = base.clone();
    config.meta.listen.clone_from(meta);
    for (section, listen) in config.storage.iter_mut().zip(storage) {
        section.listen.clone_from(listen);
    }
    toml::to_string(&config).map_err(|e| e.to_string())
}

/// As [`base`], for the cluster.
fn cluster(args: &LaunchArgs, roles: &Roles) -> Config {
    let storage = (0u16..).zip(&roles.storage).map(|(id, _)| StorageConfig {
        id,
        listen: String::new(),
        dir: PathBuf::new(),
        pool: args.cluster.pool,
        memory_dir: "/dev/shm".into(),
        scrub: fsd_node::config::default_scrub(),
        scrub_pause_s: fsd_node::config::default_scrub_pause(),
    });
    Config {
        cluster: "launch".into(),
        fabric: args.cluster.fabric,
        spin_us: fsd_node::config::default_spin(),
        storage: storage.collect(),
        ..base(args)
    }
}

/// The roles in a job of so many ranks, if what is asked for can be.
fn check(args: &LaunchArgs, size: u32) -> anyhow::Result<Roles> {
    ensure!(
        args.cluster.fabric != FabricChoice::Shm,
        "--fabric shm is for one host: use fsd dev, or another fabric"
    );
    Roles::parse(args.cluster.roles.as_deref(), size).map_err(anyhow::Error::msg)
}

/// Opens the coordinator of a job of so many ranks.
fn coordinate(args: &LaunchArgs, size: u32, port: &str, key: Vec<u8>) -> anyhow::Result<Coordinator> {
    let roles = check(args, size)?;
    let settings = cluster(args, &roles);
    let job = Job {
        size,
        roles,
        command: args.command.clone(),
        uuid: format!("{:032x}", rand::random::<u128>()),
    };
    let write = Box::new(move |addresses: &Addresses| config_text(&settings, addresses));
    Coordinator::open(&base(args), format!("0.0.0.0:{port}"), key, job, write)
}

/// Runs `fsd launch`.
///
/// # Errors
/// The job cannot be set up, or was stopped.
pub fn run(args: &LaunchArgs) -> anyhow::Result<ExitCode> {
    if let (Some(rank), Some(size)) = (args.member.member, args.member.size) {
        return remote_member(args, rank, size);
    }
    let hosts = match &args.hosts.hostfile {
        Some(file) => ssh::hosts(file)?,
        None => args.hosts.hosts.clone(),
    };
    if !hosts.is_empty() {
        return over_ssh(args, &hosts);
    }
    match ranks::from_env(|name| std::env::var(name).ok()) {
        Some(rank) => as_rank(args, &rank),
        None => bail!("no hosts: name them with --hostfile or --hosts, or start this with mpirun or srun"),
    }
}

fn over_ssh(args: &LaunchArgs, hosts: &[String]) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).context("signal handlers")?;
    let size = u32::try_from(hosts.len()).context("too many hosts")?;
    let key = match &args.meeting.key_file {
        Some(file) => fsd_node::config::read_key(file)?,
        None => {
            let mut key = vec![0; 32];
            rand::rng().fill(&mut key[..]);
            key
        }
    };
    let port = match &args.meeting.rendezvous {
        Some(addr) => addr.rsplit_once(':').context("--rendezvous is not HOST:PORT")?.1,
        None => "0",
    };
    // Where the members meet on another host than this, the first member leads the job.
    let afar = args
        .meeting
        .rendezvous
        .as_deref()
        .is_some_and(|addr| !is_here(addr));
    let coordinator = if afar {
        // Wrong arguments are told here and now.
        check(args, size)?;
        None
    } else {
        Some(coordinate(args, size, port, key.clone())?)
    };
    let mut options = vec!["--wait".to_owned(), args.meeting.wait.to_string()];
    for (name, path) in [("--dir", &args.dirs.dir), ("--state", &args.dirs.state)] {
        if let Some(path) = path {
            options.extend([name.to_owned(), path.to_string_lossy().into_owned()]);
        }
    }
    let start = ssh::Start {
        ssh: &args.hosts.ssh,
        fsd: match &args.hosts.fsd {
            Some(path) => path.clone(),
            None => std::env::current_exe().context("the path of fsd")?,
        },
        rendezvous: match (&args.meeting.rendezvous, &coordinator) {
            (Some(addr), _) => addr.clone(),
            (None, Some(coordinator)) => format!(":{}", coordinator.port()?),
            (None, None) => bail!("nobody leads the job"),
        },
        options,
        lead: afar.then(|| lead_options(args)),
        key: &key,
        tag: args.hosts.tag,
    };
    let mut remotes = ssh::Remotes::start(&start, hosts)?;
    let Some(coordinator) = coordinator else {
        return led_from_afar(args, &mut signals, remotes);
    };
    let status = coordinator.run(Duration::from_secs(args.meeting.wait), |c| {
        if signals.pending().next().is_some() {
            ensure!(args.command.is_empty(), "interrupted");
            c.finish();
        }
        remotes.check(&c.missing())
    })?;
    Ok(ExitCode::from(status))
}

/// What the member that leads the job must be told: what is to be run, and how.
fn lead_options(args: &LaunchArgs) -> Vec<String> {
    let cache = args.cluster.cache.to_possible_value();
    let cache = cache.as_ref().map_or("auto", |value| value.get_name());
    let mut words: Vec<String> = [
        "--lead",
        "--fabric",
        fabric_name(args.cluster.fabric),
        "--cache",
        cache,
    ]
    .map(str::to_owned)
    .into();
    words.extend(["--pool".to_owned(), args.cluster.pool.to_string()]);
    if args.cluster.cache_shared {
        words.push("--cache-shared".into());
    }
    if let Some(roles) = &args.cluster.roles {
        words.extend(["--roles".to_owned(), roles.clone()]);
    }
    if let Some(ms) = args.cluster.lease_wait_ms {
        words.extend(["--lease-wait-ms".to_owned(), ms.to_string()]);
    }
    words.push("--".into());
    words.extend(args.command.iter().cloned());
    words
}

/// Waits for a job that its first member leads.
fn led_from_afar(
    args: &LaunchArgs,
    signals: &mut Signals,
    mut remotes: ssh::Remotes,
) -> anyhow::Result<ExitCode> {
    loop {
        if let Some(status) = remotes.ended()? {
            remotes.check(&[])?;
            return Ok(ExitCode::from(status));
        }
        remotes.check(&[])?;
        if signals.pending().next().is_some() {
            ensure!(args.command.is_empty(), "interrupted");
            remotes.finish();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What the first member hears of the `fsd launch` that has started it.
fn listen_to_head() -> anyhow::Result<impl FnMut(&Coordinator) -> anyhow::Result<()> + Send> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("head".into())
        .spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(move |c: &Coordinator| match told.try_recv() {
        Ok(line) if line == ssh::FINISH => {
            c.finish();
            Ok(())
        }
        Ok(_) | Err(TryRecvError::Empty) => Ok(()),
        Err(TryRecvError::Disconnected) => bail!("the fsd launch that has started this has ended"),
    })
}

/// A member that `fsd launch` has started over ssh.
fn remote_member(args: &LaunchArgs, rank: u32, size: u32) -> anyhow::Result<ExitCode> {
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .context("the key of the job")?;
    let told = args
        .meeting
        .rendezvous
        .clone()
        .context("--member needs --rendezvous")?;
    let rendezvous = match told.strip_prefix(':') {
        None => told,
        Some(port) => {
            let from = std::env::var("SSH_CONNECTION").unwrap_or_default();
            let host = from.split_whitespace().next().context(
                "ssh does not tell where it comes from (SSH_CONNECTION): name the rendezvous with --rendezvous HOST:PORT",
            )?;
            let ip: std::net::IpAddr = host.parse().context("SSH_CONNECTION")?;
            format!(
                "{}",
                std::net::SocketAddr::new(ip, port.parse().context("--rendezvous")?)
            )
        }
    };
    if args.member.lead {
        return lead(args, size, rendezvous, unhex(&line)?, listen_to_head()?);
    }
    part(args, rank, size, rendezvous, unhex(&line)?).map(|(status, _)| ExitCode::from(status))
}

/// The first member's part, and leading the job.
fn lead(
    args: &LaunchArgs,
    size: u32,
    rendezvous: String,
    key: Vec<u8>,
    poll: impl FnMut(&Coordinator) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<ExitCode> {
    ensure!(
        is_here(&rendezvous),
        "the members are to meet at {rendezvous}, but that is not an address of the first one's host ({}): put --rendezvous right",
        rustix::system::uname().nodename().to_string_lossy()
    );
    let (_, own_port) = rendezvous
        .rsplit_once(':')
        .context("--rendezvous is not HOST:PORT")?;
    let coordinator = coordinate(args, size, own_port, key.clone())?;
    let patience = Duration::from_secs(args.meeting.wait);
    let coordinating = std::thread::Builder::new()
        .name("coordinator".into())
        .spawn(move || coordinator.run(patience, poll))
        .context("cannot start a thread")?;
    let own = part(args, 0, size, rendezvous, key);
    let all = coordinating
        .join()
        .map_err(|_| anyhow::anyhow!("the coordinator has failed"))?;
    let (_, worst) = own?;
    Ok(ExitCode::from(all?.max(worst)))
}

fn part(
    args: &LaunchArgs,
    rank: u32,
    size: u32,
    rendezvous: String,
    key: Vec<u8>,
) -> anyhow::Result<(u8, u8)> {
    member::run(&Member {
        base: &base(args),
        rank,
        size,
        rendezvous,
        key,
        dir: args.dirs.dir.clone(),
        state: args.dirs.state.clone(),
        patience: Duration::from_secs(args.meeting.wait),
        own_stdin: args.member.lead,
    })
}

/// One of several processes that mpirun or srun have started.
fn as_rank(args: &LaunchArgs, rank: &ranks::Rank) -> anyhow::Result<ExitCode> {
    let key = match (&args.meeting.key_file, std::env::var(KEY_ENV)) {
        (Some(file), _) => fsd_node::config::read_key(file)?,
        (None, Ok(text)) => unhex(&text)?,
        (None, Err(_)) => bail!(
            "the ranks share no secret: export {KEY_ENV}=$(fsd keygen -) and pass it on (mpirun -x {KEY_ENV}), or name a file with --key-file"
        ),
    };
    let port = |number: u64| 20_000 + number % 20_000;
    let parent = rustix::process::getppid().map_or(0, |p| p.as_raw_nonzero().get());
    let rendezvous = match (&args.meeting.rendezvous, &rank.first_host) {
        (Some(addr), _) => addr.clone(),
        // All have the same parent.
        (None, _) if rank.local => format!("127.0.0.1:{}", port(parent as u64)),
        (None, Some(host)) => format!("{host}:{}", port(rank.job.unwrap_or(0))),
        (None, None) => {
            bail!("where do the ranks meet? Name a free port of rank 0's host: --rendezvous HOST:PORT")
        }
    };
    if rank.rank != 0 {
        let (status, _) = part(args, rank.rank, rank.size, rendezvous, key)?;
        return Ok(ExitCode::from(status));
    }
    lead(args, rank.size, rendezvous, key, |_| Ok(()))
}
