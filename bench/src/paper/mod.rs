//! The paper's figures 2, 6, 7, 8 and 9: write-through with optimistic revocation (its baseline, "WT+OCC") and
//! write-back with leases in the kernel, of the same code, in turns. Only ratios are claims; nodes are mounts of one
//! cluster on this machine.

mod figures;
mod floor;
mod mix;
mod published;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;

use crate::fs::runner;
use crate::plot::Chart;
use crate::procs::{self, Cluster, ClusterSpec};
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;
use figures::{Plan, Work};

/// Arguments of `bench paper`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fewer points, one short round: shapes, not figures.
    #[arg(long)]
    quick: bool,
    /// Figures (default: all).
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Figure>,
    /// Nodes of figures 6, 7 and 9.
    #[arg(long, default_value_t = 4)]
    nodes: usize,
    /// Nodes to go through in figure 8.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    scale_nodes: Vec<usize>,
    /// Threads a node (the paper: 4).
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Files a node in figures 6 to 8 (the paper: 100).
    #[arg(long, default_value_t = 8)]
    files: usize,
    /// Size of each (the paper: 16 MiB).
    #[arg(long, default_value = "256KiB", value_parser = bytes)]
    file_size: u64,
    /// Of the paper's numbers of files in figure 9, for each node.
    #[arg(long, default_value_t = 0.0005)]
    count_scale: f64,
    /// Of the paper's sizes of files and of calls in figure 9.
    #[arg(long, default_value_t = 0.125)]
    size_scale: f64,
    /// Length of a run.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Rounds; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Fabric of both clusters.
    #[arg(long, default_value = "tcp")]
    fabric: String,
    /// Pool of each of a cluster's two storage nodes, MiB.
    #[arg(long, default_value_t = 96)]
    pool_mib: u64,
    /// Say what the clusters' counters did in each point.
    #[arg(long)]
    counters: bool,
}

/// A figure of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Figure {
    /// A write on a null file system.
    Fig2,
    /// Read:write ratios.
    Fig6,
    /// Contention.
    Fig7,
    /// Nodes.
    Fig8,
    /// Fileserver, webserver, netsfs.
    Fig9,
}

impl Args {
    fn wants(&self, figure: Figure) -> bool {
        self.only.is_empty() || self.only.contains(&figure)
    }
}

/// `256KiB`, `1MiB`, `4096`.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        _ => return Err("a number of B, KiB or MiB is wanted".into()),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{e}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// A mode of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// The paper's baseline.
    Through,
    /// What it proposes.
    Back,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Through => "WT+OCC",
            Self::Back => "write-back",
        }
    }
}

/// The clusters.
struct Modes {
    through: Cluster,
    back: Option<Cluster>,
    mounts: usize,
}

impl Modes {
    fn start(args: &Args, back: bool) -> anyhow::Result<Self> {
        let fsd = procs::fsd_binary()?;
        let mounts = args
            .scale_nodes
            .iter()
            .copied()
            .max()
            .unwrap_or(0)
            .max(args.nodes);
        let cluster = |cache: &str| {
            check()?;
            let spec = ClusterSpec {
                mounts,
                cache: cache.to_owned(),
                fabric: args.fabric.clone(),
                pool_mib: args.pool_mib,
            };
            Cluster::start(&fsd, &spec).with_context(|| format!("a cluster in mode {cache}"))
        };
        Ok(Self {
            through: cluster("writethrough")?,
            back: back.then(|| cluster("writeback")).transpose()?,
            mounts,
        })
    }

    fn cluster(&self, mode: Mode) -> Option<&Cluster> {
        match mode {
            Mode::Through => Some(&self.through),
            Mode::Back => self.back.as_ref(),
        }
    }

    fn there(&self) -> Vec<Mode> {
        let all = [Mode::Through, Mode::Back];
        all.into_iter().filter(|m| self.cluster(*m).is_some()).collect()
    }

    fn dirs(&self, mode: Mode) -> Vec<PathBuf> {
        let cluster = self.cluster(mode).into_iter();
        cluster
            .flat_map(|c| (0..self.mounts).map(|n| c.mount(n)))
            .collect()
    }

    /// Modes in an order that changes from round to round, so that what drifts meets both alike.
    fn turns(&self, round: usize) -> Vec<Mode> {
        let mut modes = self.there();
        if round % 2 == 1 {
            modes.reverse();
        }
        modes
    }
}

/// How long, how often.
struct Settings {
    duration: Duration,
    rounds: usize,
    calls: u64,
    calls_rounds: usize,
}

/// Samples of one mode at one point.
#[derive(Default)]
struct Samples {
    speed: Vec<f64>,
    durable: Vec<f64>,
    mean_ms: Vec<f64>,
    counters: BTreeMap<String, u64>,
}

fn measure(modes: &Modes, settings: &Settings, work: &Work) -> anyhow::Result<Vec<(Mode, Samples)>> {
    let mut all: Vec<(Mode, Samples)> = modes
        .there()
        .into_iter()
        .map(|m| (m, Samples::default()))
        .collect();
    if let Work::Loop(mix) = work {
        for mode in modes.there() {
            mix::fill(mix, &modes.dirs(mode)).context(mode.name())?;
        }
    }
    for round in 0..settings.rounds {
        for mode in modes.turns(round) {
            check()?;
            let dirs = modes.dirs(mode);
            let counters = || {
                modes
                    .cluster(mode)
                    .and_then(Cluster::counters)
                    .unwrap_or_default()
            };
            let before = counters();
            let (speed, blocks) = match work {
                Work::Blocks(workload) => {
                    let last = round + 1 == settings.rounds;
                    let out = runner::run(*workload, &dirs[..workload.nodes], settings.duration, last);
                    let out = out.context(mode.name())?;
                    (
                        out.mib_per_s,
                        Some((out.durable_mib_per_s, out.latency.mean() / 1e6)),
                    )
                }
                Work::Loop(mix) => {
                    let dirs = &dirs[..mix.nodes];
                    (mix::run(mix, dirs, settings.duration).context(mode.name())?, None)
                }
            };
            for (_, samples) in all.iter_mut().filter(|(m, _)| *m == mode) {
                samples.speed.push(speed);
                samples.durable.extend(blocks.map(|b| b.0));
                samples.mean_ms.extend(blocks.map(|b| b.1));
                for (name, now) in counters() {
                    let grown = now.saturating_sub(before.get(&name).copied().unwrap_or(0));
                    *samples.counters.entry(name).or_default() += grown;
                }
            }
        }
    }
    if let Work::Loop(mix) = work {
        for mode in modes.there() {
            mix::verify(mix, &modes.dirs(mode)[..mix.nodes]).context(mode.name())?;
            mix::clear(mix, &modes.dirs(mode)).context(mode.name())?;
        }
    }
    Ok(all)
}

const HEADER: [&str; 12] = [
    "point",
    "WT+OCC",
    "write-back",
    "ratio",
    "paper",
    "ratio/paper",
    "ratio with fsync after",
    "WT+OCC ms",
    "write-back ms",
    "latency ratio",
    "paper",
    "verdict",
];

/// A line of a figure's table, and what is drawn of it: both speeds, both ratios.
fn row(point: &figures::Point, samples: &[(Mode, Samples)]) -> (Vec<String>, [f64; 4]) {
    let of = |mode| samples.iter().find(|(m, _)| *m == mode).map(|(_, s)| s);
    let speed = |mode| of(mode).map(|s| median(&s.speed));
    let mean = |mode| {
        of(mode)
            .filter(|s| !s.mean_ms.is_empty())
            .map(|s| median(&s.mean_ms))
    };
    let durable = |mode| {
        let samples = of(mode).filter(|s| !s.durable.is_empty());
        samples.map(|s| median(&s.durable))
    };
    let by = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a / b.max(1e-9));
    let (through, back) = (speed(Mode::Through), speed(Mode::Back));
    let ratio = by(back, through);
    let text = |value: Option<f64>| value.map_or_else(|| "-".into(), sig);
    let two = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
    let verdict = match ratio.zip(point.ratio) {
        None => "-",
        Some((here, paper)) if here >= paper => "at least the paper's",
        Some((here, _)) if here >= 1.0 => "ahead, less than the paper's",
        Some(_) => "BEHIND",
    };
    let cells = vec![
        point.name.clone(),
        text(through),
        text(back),
        two(ratio),
        two(point.ratio),
        two(by(ratio, point.ratio)),
        two(by(durable(Mode::Back), durable(Mode::Through))),
        text(mean(Mode::Through)),
        text(mean(Mode::Back)),
        two(by(mean(Mode::Back), mean(Mode::Through))),
        two(point.latency_ratio),
        verdict.into(),
    ];
    let drawn = [through, back, ratio, point.ratio].map(|v| v.unwrap_or(0.0));
    (cells, drawn)
}

fn say_counters(point: &str, samples: &[(Mode, Samples)]) {
    for (mode, samples) in samples {
        let moved = samples.counters.iter().filter(|(_, n)| **n > 0);
        let list: Vec<String> = moved.map(|(name, n)| format!("{name} {n}")).collect();
        eprintln!("    {point}, {}: {}", mode.name(), list.join(", "));
    }
}

fn figure(modes: &Modes, settings: &Settings, plan: &Plan, counters: bool, out: &Path) -> anyhow::Result<()> {
    let progress = Progress::new(&plan.title, plan.points.len() as u64);
    let mut header = HEADER.map(String::from);
    for column in &mut header[1..3] {
        *column = format!("{column} {}", plan.unit);
    }
    let mut table = Table::new(plan.title.clone(), &header);
    let mut drawn = Vec::new();
    for point in &plan.points {
        progress.step(point.name.clone());
        let samples = measure(modes, settings, &point.work)
            .with_context(|| format!("{}, {}", plan.title, point.name))?;
        if counters {
            say_counters(&point.name, &samples);
        }
        let (cells, values) = row(point, &samples);
        table.row(cells);
        drawn.push(values);
    }
    drop(progress);
    table.write_csv(&out.join(format!("{}.csv", plan.stem)))?;
    let series = |name: &str, n: usize| (name.to_owned(), drawn.iter().map(|d| d[n]).collect());
    let groups: Vec<String> = plan.points.iter().map(|p| p.name.clone()).collect();
    Chart {
        title: plan.title.clone(),
        unit: plan.unit.into(),
        groups: groups.clone(),
        series: vec![series(Mode::Through.name(), 0), series(Mode::Back.name(), 1)],
        log: false,
    }
    .write(&out.join(plan.stem))?;
    Chart {
        title: format!("{}: write-back by WT+OCC", plan.title),
        unit: "ratio".into(),
        groups,
        series: vec![series("here", 2), series("paper", 3)],
        log: false,
    }
    .write(&out.join(format!("{}-ratio", plan.stem)))?;
    println!("{table}");
    Ok(())
}

/// Why there is no write-back here, if so.
fn missing() -> Option<String> {
    match distfuse_abi::kernel_version(Path::new(distfuse_abi::DEVICE)) {
        Ok(distfuse_abi::ABI_VERSION) => None,
        Ok(kernel) => Some(distfuse_abi::Error::Version { kernel }.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// Runs `bench paper`.
///
/// # Errors
/// Something cannot be started or written, a file system call fails, contents are not what they must be, or the
/// kernel extension is not there: then only write-through has been measured.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    ensure!(
        args.nodes > 0 && args.threads > 0 && args.files > 0 && args.scale_nodes.iter().all(|n| *n > 0),
        "nodes, threads and files are at least one"
    );
    let missing = missing();
    if let Some(why) = &missing {
        eprintln!("only write-through: {why}");
    }
    let settings = if args.quick {
        Settings {
            duration: Duration::from_secs_f64(args.seconds.min(0.5)),
            rounds: 1,
            calls: 2_000,
            calls_rounds: 9,
        }
    } else {
        Settings {
            duration: Duration::from_secs_f64(args.seconds),
            rounds: args.rounds.max(1),
            calls: 4_000,
            calls_rounds: args.rounds.max(1) * 9,
        }
    };
    let modes = Modes::start(args, missing.is_none())?;
    if args.wants(Figure::Fig2) {
        floor::run(&modes, &settings, out)?;
    }
    for plan in figures::plans(args) {
        figure(&modes, &settings, &plan, args.counters, out)?;
    }
    println!(
        "Contents were verified at every point. CSV and plots: {}",
        out.display()
    );
    match missing {
        Some(why) => bail!("write-back was not measured: {why}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    pub fn arguments(args: &[&str]) -> Args {
        Line::parse_from([&["bench"], args].concat()).args
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("256KiB"), Ok(256 << 10));
        assert_eq!(bytes("1MiB"), Ok(1 << 20));
        assert!(bytes("1GB").is_err() && bytes("").is_err());
    }

    #[test]
    fn a_row_has_ratios_of_both() {
        let plan = figures::plans(&arguments(&["--only", "fig6"])).swap_remove(0);
        let samples = |mode, speed, ms| {
            let samples = Samples {
                speed: vec![speed],
                durable: vec![speed / 2.0],
                mean_ms: vec![ms],
                ..Samples::default()
            };
            (mode, samples)
        };
        let both = [samples(Mode::Through, 2.0, 1.0), samples(Mode::Back, 5.0, 0.5)];
        let (cells, drawn) = row(&plan.points[0], &both);
        assert_eq!(cells.len(), HEADER.len());
        assert_eq!(cells[3..6], ["2.50", "1.68", "1.49"]);
        assert_eq!(cells[6], "2.50");
        assert_eq!(cells[9..], ["0.50", "0.60", "at least the paper's"]);
        assert!((drawn[2] - 2.5).abs() < 1e-9);
        let (cells, _) = row(&plan.points[0], &both[..1]);
        assert_eq!(cells[2..6], ["-", "-", "1.68", "-"]);
    }
}
