//! Names as mdtest has them: made, looked at, renamed, removed; in directories of their own and in one that is shared, by several
//! mounts; beside a FUSE server that does nothing, memory, and this machine's disk.

pub mod phases;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::ValueEnum;

use crate::nullfs::NullMode;
use crate::plot::Chart;
use crate::procs::{self, Cluster, ClusterSpec, NullServer};
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;
use phases::{Phase, Place, Tasks};

/// Arguments of `bench names`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Numbers of mounts to go through; each has one task.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    mounts: Vec<usize>,
    /// Files, and directories, of each task.
    #[arg(long, default_value_t = 1000)]
    files: usize,
    /// Rounds in turns; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Fabric of the clusters.
    #[arg(long, default_value = "shm")]
    fabric: String,
    /// Kernel caching of the clusters, and of the null FUSE server.
    #[arg(long, value_enum, default_value_t = NullMode::Writethrough)]
    cache: NullMode,
    /// A directory on the disk that is to be beside them.
    #[arg(long, default_value = ".")]
    disk: PathBuf,
    /// Pool of each of a cluster's two storage nodes, MiB.
    #[arg(long, default_value_t = 512)]
    pool_mib: u64,
}

/// How long is waited for what was written to be stored, between two phases.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is measured: the floors, then the cluster.
struct Systems {
    floors: Vec<(String, PathBuf)>,
    cluster: Cluster,
    mounts: Vec<PathBuf>,
    _kept: (tempfile::TempDir, tempfile::TempDir, NullServer),
}

/// Which of them the null FUSE server is, and which one DistFUSE.
const NULL: usize = 2;
const OURS: usize = 3;

impl Systems {
    fn start(args: &Args, mounts: usize) -> anyhow::Result<Self> {
        let temporary = |dir: &Path| {
            let made = tempfile::Builder::new().prefix("bench-names-").tempdir_in(dir);
            made.with_context(|| format!("a directory in {}", dir.display()))
        };
        let (memory, disk) = (temporary(Path::new("/dev/shm"))?, temporary(&args.disk)?);
        let null = NullServer::start(args.cache)?;
        let cache = args.cache.to_possible_value().context("a cache mode")?;
        let spec = ClusterSpec {
            mounts,
            cache: cache.get_name().to_owned(),
            cache_shared: false,
            fabric: args.fabric.clone(),
            pool_mib: args.pool_mib,
        };
        let cluster = Cluster::start(&procs::fsd_binary()?, &spec)?;
        Ok(Self {
            floors: vec![
                ("tmpfs".into(), memory.path().to_owned()),
                (kind_of(disk.path())?.into(), disk.path().to_owned()),
                ("null FUSE".into(), null.path().to_owned()),
            ],
            mounts: (0..mounts).map(|n| cluster.mount(n)).collect(),
            cluster,
            _kept: (memory, disk, null),
        })
    }

    fn names(&self) -> Vec<String> {
        let floors = self.floors.iter().map(|(name, _)| name.clone());
        floors.chain(["DistFUSE".to_owned()]).collect()
    }

    /// Where one of them is mounted.
    fn dirs(&self, system: usize) -> Vec<PathBuf> {
        match self.floors.get(system) {
            Some((_, dir)) => vec![dir.clone()],
            None => self.mounts.clone(),
        }
    }

    /// Waits until everything that was done is done at the servers, too.
    fn settle(&self, tasks: &Tasks, system: usize) -> anyhow::Result<()> {
        for dir in tasks.dirs() {
            File::open(dir)?.sync_all()?;
        }
        let start = Instant::now();
        while system == OURS
            && self
                .cluster
                .counter("dirty_files")
                .context("the cluster's status")?
                > 0
        {
            check()?;
            ensure!(start.elapsed() < PATIENCE, "what was written is not stored");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Requests of the kernel; messages and one-sided operations.
    fn counters(&self) -> anyhow::Result<[u64; 2]> {
        let all = self.cluster.counters().context("the cluster's status")?;
        Ok(["requests", "messages"].map(|name| all.get(name).copied().unwrap_or(0)))
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

/// Samples of a phase: of each system operations a second, and of the cluster what it cost a file.
#[derive(Default)]
struct Samples {
    rates: [Vec<f64>; OURS + 1],
    costs: [Vec<f64>; 2],
}

/// All phases in one place, once, on one of the systems.
fn round(
    systems: &Systems,
    (system, place): (usize, Place),
    name: &str,
    args: &Args,
    mut note: impl FnMut(Phase, f64, Option<[f64; 2]>),
) -> anyhow::Result<()> {
    let count = systems.mounts.len();
    let tasks = Tasks::new(&systems.dirs(system), count, place, name, args.files)?;
    let ours = system == OURS;
    // What asking for the counters costs.
    let asking = || -> anyhow::Result<[u64; 2]> {
        let before = systems.counters()?;
        systems.settle(&tasks, system)?;
        let after = systems.counters()?;
        Ok([0, 1].map(|n| after[n] - before[n]))
    };
    systems.settle(&tasks, system)?;
    let asked = if ours { asking()? } else { [0; 2] };
    let mut measured = |phase| -> anyhow::Result<()> {
        check()?;
        let before = ours.then(|| systems.counters()).transpose()?;
        let took = tasks.run(phase)?;
        systems.settle(&tasks, system)?;
        let after = ours.then(|| systems.counters()).transpose()?;
        let files = tasks.count() as f64;
        let costs = before.zip(after).map(|(before, after)| {
            [0, 1].map(|n| (after[n] - before[n]).saturating_sub(asked[n]) as f64 / files)
        });
        note(phase, files / took.as_secs_f64(), costs);
        Ok(())
    };
    Phase::OWN.into_iter().try_for_each(&mut measured)?;
    if count > 1 {
        tasks.run(Phase::Create)?;
        systems.settle(&tasks, system)?;
        Phase::OTHERS.into_iter().try_for_each(&mut measured)?;
        tasks.run(Phase::Rename)?;
        tasks.run(Phase::Remove)?;
    }
    tasks.end()
}

fn ratio(ours: f64, floor: f64) -> String {
    if floor > 0.0 {
        format!("{:.2}", ours / floor)
    } else {
        "-".into()
    }
}

/// One number of mounts.
fn with_mounts(args: &Args, count: usize, out: &Path) -> anyhow::Result<Table> {
    let systems = Systems::start(args, count)?;
    let plural = if count == 1 { "mount" } else { "mounts" };
    let title = format!("Names over {}, {count} {plural}", args.fabric);
    let names = systems.names();
    let steps = args.rounds * Place::ALL.len() * names.len();
    let progress = Progress::new(&title, steps as u64);
    let mut samples: Vec<(Place, Phase, Samples)> = Vec::new();
    for place in Place::ALL {
        let others = if count > 1 { &Phase::OTHERS[..] } else { &[] };
        let phases = Phase::OWN.iter().chain(others);
        samples.extend(phases.map(|&phase| (place, phase, Samples::default())));
    }
    for turn in 0..args.rounds {
        for place in Place::ALL {
            for (system, name) in names.iter().enumerate() {
                progress.step(format!("{}, {name}, round {}", place.name(), turn + 1));
                let below = format!("names-{turn}-{}", place as u8);
                let note = |phase, rate, costs: Option<[f64; 2]>| {
                    let row = samples
                        .iter_mut()
                        .find(|(at, of, _)| *at == place && *of == phase);
                    if let Some((.., samples)) = row {
                        samples.rates[system].push(rate);
                        for (all, cost) in samples.costs.iter_mut().zip(costs.into_iter().flatten()) {
                            all.push(cost);
                        }
                    }
                };
                round(&systems, (system, place), &below, args, note).with_context(|| {
                    format!(
                        "{name}, {}; the cluster said: {}",
                        place.name(),
                        systems.cluster.log()
                    )
                })?;
            }
        }
    }
    drop(progress);
    let mut header = vec!["operations a second".to_owned()];
    header.extend(names.iter().cloned());
    for beside in [NULL, 0, 1] {
        header.push(format!("to {}", names[beside]));
    }
    header.extend(["requests each", "messages each"].map(String::from));
    let full = format!(
        "{title}, {} files each, medians of {} rounds; messages and one-sided operations of the mounts, with those sent later",
        args.files, args.rounds
    );
    let mut table = Table::new(full, &header);
    let mut series: Vec<(String, Vec<f64>)> = names.iter().map(|n| (n.clone(), Vec::new())).collect();
    for (place, phase, samples) in &samples {
        let rates: Vec<f64> = samples.rates.iter().map(|all| median(all)).collect();
        let mut row = vec![format!("{}, {}", phase.name(), place.name())];
        row.extend(rates.iter().map(|rate| sig(*rate)));
        row.extend([NULL, 0, 1].map(|beside| ratio(rates[OURS], rates[beside])));
        row.extend(samples.costs.iter().map(|all| sig(median(all))));
        table.row(row);
        series
            .iter_mut()
            .zip(&rates)
            .for_each(|((_, all), rate)| all.push(*rate));
    }
    let stem = out.join(format!("names-{}-{count}", args.fabric));
    table.write_csv(&stem.with_extension("csv"))?;
    Chart {
        title,
        unit: "1/s".into(),
        groups: samples
            .iter()
            .map(|(place, phase, _)| format!("{} {}", place.name().replace(" directory", ":"), phase.name()))
            .collect(),
        series,
        log: true,
    }
    .write(&stem)?;
    Ok(table)
}

/// Runs `bench names`.
///
/// # Errors
/// Something cannot be started or written, a file system call fails, or a file is not what it must be.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    ensure!(
        args.files > 0 && args.rounds > 0 && !args.mounts.contains(&0),
        "at least one file, one round and one mount are wanted"
    );
    fs::create_dir_all(out)?;
    for &count in &args.mounts {
        println!("{}", with_mounts(args, count, out)?);
    }
    println!("CSV and plots: {}", out.display());
    Ok(())
}
