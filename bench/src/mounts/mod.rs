//! Mounted file systems side by side: DistFUSE over its fabrics, others that serve the same hosts, floors, and the network
//! under them. All of it in one run, in turns; whoever calls this has mounted them.

mod ops;
mod storage;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, bail, ensure};

use crate::fs::micro::Scale;
use crate::nullfs::NullMode;
use crate::procs::{self, NullServer};
use crate::progress::{Progress, check};
use crate::rdma::partner::serve_tool;
use crate::rdma::tools::{Device, Run, Tool};
use crate::stats::{median, sig};
use crate::table::Table;
use ops::{MEASURES, MISSED_READ, Measure, Sample};

/// Share of the network's bandwidth that reads must reach.
const SHARE: f64 = 0.7;

/// Arguments of `bench mounts`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A DistFUSE cluster and two mounts of it. Ratios are those of the first. Stale data is a failure.
    #[arg(long, value_name = "NAME=DIR,DIR", required = true)]
    fsd: Vec<System>,
    /// Another file system, mounted once or twice. Stale data is counted.
    #[arg(long, value_name = "NAME=DIR[,DIR]")]
    other: Vec<System>,
    /// tmpfs and a null FUSE server beside them.
    #[arg(long)]
    floors: bool,
    /// Rounds; medians are shown.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Size of large files, MiB.
    #[arg(long, default_value_t = 16)]
    mib: u64,
    /// Cached reads and stats of a round; of dearer operations there are fewer.
    #[arg(long, default_value_t = 2000)]
    reads: u64,
    /// Only operations with this in their names.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Measure the network with ib_read_bw: the device and GID index of the storage node and its address, and those of
    /// the first mount; all of them are devices of this machine.
    #[arg(long, value_name = "DEVICE:GID,ADDRESS,DEVICE:GID")]
    network: Option<Network>,
    /// The program that checks what two mounts see of each other, to be run on every pair.
    #[arg(long, value_name = "PROGRAM")]
    coherence: Option<PathBuf>,
    /// Its rounds.
    #[arg(long, default_value_t = 3)]
    coherence_rounds: usize,
    /// Watch the only storage node of the first cluster: its configuration …
    #[arg(long, requires = "storage_pid")]
    config: Option<PathBuf>,
    /// … and the storage node's process.
    #[arg(long, requires = "config")]
    storage_pid: Option<u32>,
}

/// A name and where it is mounted.
#[derive(Debug, Clone, PartialEq)]
struct System {
    name: String,
    dirs: Vec<PathBuf>,
    ours: bool,
}

impl FromStr for System {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, dirs) = text.split_once('=').ok_or("NAME=DIR,DIR is expected")?;
        Ok(Self {
            name: name.to_owned(),
            dirs: dirs.split(',').map(PathBuf::from).collect(),
            ours: false,
        })
    }
}

/// Two devices of this machine.
#[derive(Debug, Clone)]
struct Network {
    server: Device,
    address: String,
    client: Device,
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let device = |text: &str| -> Option<Device> {
            let (name, gid) = text.split_once(':')?;
            Some(Device {
                name: name.to_owned(),
                gid: gid.parse().ok()?,
            })
        };
        let parts: Vec<&str> = text.split(',').collect();
        let parsed = match parts[..] {
            [server, address, client] => device(server).zip(device(client)).map(|d| (d, address)),
            _ => None,
        };
        let ((server, client), address) = parsed.ok_or("DEVICE:GID,ADDRESS,DEVICE:GID is expected")?;
        Ok(Self {
            server,
            address: address.to_owned(),
            client,
        })
    }
}

impl Network {
    /// MiB/s of 1 MiB reads.
    fn bandwidth(&self, mib: u64, round: usize) -> anyhow::Result<f64> {
        let run = Run {
            tool: Tool::ReadBandwidth,
            size: 1 << 20,
            iterations: mib,
            // That of the last run may not be free yet.
            port: 18_700 + u16::try_from(round)?,
        };
        let mut server = serve_tool(&self.server, &run)?;
        let result = run.measure(&self.client, &self.address);
        if result.is_err() {
            let _ = server.kill();
        }
        let _ = server.wait();
        result
    }
}

/// All figures of one system, by operation.
type Figures = Vec<Vec<Sample>>;

fn value(samples: &[Sample]) -> Option<f64> {
    let values: Vec<f64> = samples.iter().map(|s| s.value).collect();
    (!values.is_empty()).then(|| median(&values))
}

fn cell(value: Option<f64>) -> String {
    value.map_or("-".into(), sig)
}

/// How many times as fast as another the first one is.
fn faster(unit: &str, first: Option<f64>, other: Option<f64>) -> String {
    match first.zip(other) {
        Some((first, other)) if first > 0.0 && other > 0.0 => sig(if unit == "us" {
            other / first
        } else {
            first / other
        }),
        _ => "-".into(),
    }
}

/// Lets what is still to be written be written, so that it disturbs nobody else.
fn settle(dirs: &[PathBuf]) -> anyhow::Result<()> {
    for dir in dirs {
        rustix::fs::syncfs(std::fs::File::open(dir)?)?;
    }
    Ok(())
}

fn stale(samples: &[Sample]) -> (u64, u64) {
    samples
        .iter()
        .fold((0, 0), |sum, s| (sum.0 + s.stale.0, sum.1 + s.stale.1))
}

/// Rounds and violations of the coherence program on two mounts; what it printed goes to `log`.
fn coherence(program: &Path, rounds: usize, dirs: &[PathBuf], log: &Path) -> anyhow::Result<(u64, u64)> {
    let out = Command::new(program)
        .args(dirs)
        .args(["--rounds", &rounds.to_string()])
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    std::fs::write(log, text.as_bytes())?;
    counted(&text).with_context(|| format!("{}: {}", program.display(), String::from_utf8_lossy(&out.stderr)))
}

/// From its last line, "N rounds, N violations".
fn counted(text: &str) -> Option<(u64, u64)> {
    let (rounds, rest) = text.lines().last()?.split_once(" rounds, ")?;
    let violations = rest.strip_suffix(" violations")?;
    Some((rounds.parse().ok()?, violations.parse().ok()?))
}

struct Comparison {
    systems: Vec<System>,
    figures: Vec<Figures>,
    network: Vec<f64>,
    coherence: Vec<Option<(u64, u64)>>,
    wrong: Vec<String>,
}

impl Comparison {
    fn measure(&mut self, args: &Args, scale: &Scale, progress: &Progress) -> anyhow::Result<()> {
        for round in 0..args.rounds {
            for (n, measure) in MEASURES.iter().enumerate() {
                if !measure.name.contains(&args.only) {
                    continue;
                }
                progress.step(format!("round {}: {}", round + 1, measure.name));
                for (system, figures) in self.systems.iter().zip(&mut self.figures) {
                    check()?;
                    if measure.two && system.dirs.len() < 2 {
                        continue;
                    }
                    let sample = (measure.run)(&system.dirs, scale)
                        .with_context(|| format!("{}, {}", measure.name, system.name))?;
                    figures[n].push(sample);
                    settle(&system.dirs)?;
                }
                if measure.name == MISSED_READ
                    && let Some(network) = &args.network
                {
                    self.network.push(network.bandwidth(args.mib, round)?);
                }
            }
        }
        Ok(())
    }

    fn check_coherence(&mut self, args: &Args, progress: &Progress, out: &Path) -> anyhow::Result<()> {
        let Some(program) = &args.coherence else {
            return Ok(());
        };
        for (system, found) in self.systems.iter().zip(&mut self.coherence) {
            if system.dirs.len() < 2 {
                continue;
            }
            progress.step(format!("coherence of {}", system.name));
            let plain: String = system
                .name
                .chars()
                .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
                .collect();
            let log = out.join(format!("coherence-{plain}.txt"));
            let counts = coherence(program, args.coherence_rounds, &system.dirs, &log)?;
            if system.ours && counts.1 > 0 {
                self.wrong
                    .push(format!("{}: {} violations of coherence", system.name, counts.1));
            }
            *found = Some(counts);
        }
        Ok(())
    }

    fn header(&self) -> Vec<String> {
        let mut header = vec!["operation".to_owned(), "unit".to_owned()];
        header.extend(self.systems.iter().map(|s| s.name.clone()));
        header.extend(
            self.systems
                .iter()
                .skip(1)
                .map(|s| format!("times as fast as {}", s.name)),
        );
        header
    }

    fn row(&self, table: &mut Table, measure: &Measure, n: usize) {
        let values: Vec<Option<f64>> = self.figures.iter().map(|f| value(&f[n])).collect();
        let mut row = vec![measure.name.to_owned(), measure.unit.to_owned()];
        row.extend(values.iter().map(|v| cell(*v)));
        row.extend(values.iter().skip(1).map(|v| faster(measure.unit, values[0], *v)));
        table.row(row);
        if measure.name == MISSED_READ && !self.network.is_empty() {
            self.network_rows(table, &values);
        }
        let counts: Vec<(u64, u64)> = self.figures.iter().map(|f| stale(&f[n])).collect();
        if counts.iter().any(|c| c.0 > 0) {
            let some = |c: (u64, u64)| (c.0 > 0).then_some(c);
            self.count_row(
                table,
                "    stale reads among them",
                counts.into_iter().map(some).collect(),
            );
        }
    }

    fn network_rows(&self, table: &mut Table, values: &[Option<f64>]) {
        let network = median(&self.network);
        let blanks = || vec!["-".to_owned(); self.systems.len() - 1];
        let mut row = vec!["    ib_read_bw between the same devices".into(), "MiB/s".into()];
        row.push(sig(network));
        row.extend(blanks());
        row.extend(blanks());
        table.row(row);
        let mut row = vec![
            format!(
                "    share of ib_read_bw (the first: >= {SHARE}, {})",
                match values[0] {
                    Some(v) if v / network >= SHARE => "met",
                    _ => "MISSED",
                }
            ),
            "x".into(),
        ];
        row.extend(values.iter().map(|v| cell(v.map(|v| v / network))));
        row.extend(blanks());
        table.row(row);
    }

    fn count_row(&self, table: &mut Table, name: &str, counts: Vec<Option<(u64, u64)>>) {
        let mut row = vec![name.to_owned(), "count".to_owned()];
        row.extend(
            counts
                .iter()
                .map(|c| c.map_or("-".into(), |(all, bad)| format!("{bad} of {all}"))),
        );
        row.extend(vec!["-".to_owned(); self.systems.len() - 1]);
        table.row(row);
    }

    /// Stale data where there must be none.
    fn judge(&mut self) {
        for (system, figures) in self.systems.iter().zip(&self.figures) {
            for (measure, samples) in MEASURES.iter().zip(figures) {
                let (all, bad) = stale(samples);
                if system.ours && bad > 0 {
                    let what = format!("{}, {}: {bad} of {all} reads stale", system.name, measure.name);
                    self.wrong.push(what);
                }
            }
        }
    }

    fn table(&self, rounds: usize) -> Table {
        let title = format!("Mounted file systems, medians of {rounds} rounds");
        let mut table = Table::new(title, &self.header());
        for (n, measure) in MEASURES.iter().enumerate() {
            if self.figures.iter().any(|f| !f[n].is_empty()) {
                self.row(&mut table, measure, n);
            }
        }
        if self.coherence.iter().any(Option::is_some) {
            self.count_row(
                &mut table,
                "violations of the coherence program",
                self.coherence.clone(),
            );
        }
        table
    }
}

/// Runs `bench mounts`.
///
/// # Errors
/// A call fails, or a DistFUSE cluster is not what it promises to be.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let mut systems: Vec<System> = args
        .fsd
        .iter()
        .map(|s| System {
            ours: true,
            ..s.clone()
        })
        .chain(args.other.iter().cloned())
        .collect();
    ensure!(
        args.fsd.iter().all(|s| s.dirs.len() == 2),
        "--fsd needs two mounts of a cluster"
    );
    let (memory, null) = if args.floors {
        let memory = tempfile::Builder::new().prefix("bench-").tempdir_in("/dev/shm")?;
        let null = NullServer::start(NullMode::Writethrough)?;
        for (name, dir) in [("null FUSE", null.path()), ("tmpfs", memory.path())] {
            systems.push(System {
                name: name.to_owned(),
                dirs: vec![dir.to_owned()],
                ours: false,
            });
        }
        (Some(memory), Some(null))
    } else {
        (None, None)
    };
    let scale = Scale {
        rounds: args.rounds,
        reads: args.reads,
        writes: args.reads / 5,
        stream: args.mib << 20,
        files: args.reads / 40,
        turns: args.reads / 20,
        ..Scale::quick()
    };
    let measured = MEASURES.iter().filter(|m| m.name.contains(&args.only)).count();
    ensure!(measured > 0, "no operation has '{}' in its name", args.only);
    let steps = args.rounds * measured + systems.len() + 1;
    let progress = Progress::new("mounts", steps as u64);
    let mut all = Comparison {
        figures: vec![vec![Vec::new(); MEASURES.len()]; systems.len()],
        network: Vec::new(),
        coherence: vec![None; systems.len()],
        wrong: Vec::new(),
        systems,
    };
    all.measure(args, &scale, &progress)?;
    all.judge();
    // What goes wrong from here on shall not cost the figures.
    if let Some((config, pid)) = args.config.clone().zip(args.storage_pid) {
        progress.step("the storage node");
        if let Err(error) = watch_storage(&mut all, args.mib, config, pid, out) {
            all.wrong.push(format!("the storage node: {error:#}"));
        }
    }
    if let Err(error) = all.check_coherence(args, &progress, out) {
        all.wrong.push(format!("coherence: {error:#}"));
    }
    drop((progress, null, memory));
    let table = all.table(args.rounds);
    table.write_csv(&out.join("mounts.csv"))?;
    println!("{table}\nCSV: {}", out.display());
    if !all.wrong.is_empty() {
        bail!("not as promised:\n  {}", all.wrong.join("\n  "));
    }
    Ok(())
}

fn watch_storage(
    all: &mut Comparison,
    mib: u64,
    config: PathBuf,
    pid: u32,
    out: &Path,
) -> anyhow::Result<()> {
    let fsd = procs::fsd_binary()?;
    let watched = storage::Watched { fsd, config, pid };
    let (table, wrong) = storage::run(&watched, &all.systems[0].dirs, mib)?;
    println!("{table}");
    all.wrong.extend(wrong);
    table.write_csv(&out.join("storage-node.csv"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_understood() {
        let system: System = "NFS/RDMA=/a,/b".parse().unwrap();
        assert_eq!(system.name, "NFS/RDMA");
        assert_eq!(system.dirs, [Path::new("/a"), Path::new("/b")]);
        assert!("no".parse::<System>().is_err());
        let network: Network = "rxe1:1,10.0.0.1,rxe2:2".parse().unwrap();
        assert_eq!((network.server.gid, network.client.name.as_str()), (1, "rxe2"));
        assert!("rxe1,10.0.0.1,rxe2".parse::<Network>().is_err());
    }

    #[test]
    fn the_coherence_program_is_understood() {
        assert_eq!(counted("kind\nx\n72 rounds, 58 violations\n"), Some((72, 58)));
        assert_eq!(counted("failed\n"), None);
    }

    #[test]
    fn faster_is_more() {
        assert_eq!(faster("us", Some(10.0), Some(20.0)), "2.00");
        assert_eq!(faster("MiB/s", Some(10.0), Some(20.0)), "0.50");
        assert_eq!(faster("1/s", Some(10.0), None), "-");
    }
}
