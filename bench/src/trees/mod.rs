//! Trees of small files as users have them: copied, read on another mount, listed, cloned, unpacked, removed; beside a FUSE server that
//! does nothing, memory, this machine's disk, and an older DistFUSE.

mod phases;
mod source;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::beside::{Beside, BesideArgs, DISK, Effort, NULL, OURS, System, ratio};
use crate::plot::Chart;
use crate::procs;
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;
use phases::{Origin, Phase};

/// Arguments of `bench trees`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Files of the tree, of 1 to 16 KiB; 20 in each directory.
    #[arg(long, default_value_t = 3000)]
    files: usize,
    /// The `fsd` program of an older commit, to take turns with this one.
    #[arg(long)]
    before: Option<PathBuf>,
    #[command(flatten)]
    beside: BesideArgs,
}

/// Samples of a phase, of each system: files a second; requests, messages, and CPU time of a file.
#[derive(Default, Clone)]
struct Samples {
    rate: Vec<f64>,
    costs: [Vec<f64>; 3],
}

impl Samples {
    fn costs(&self) -> impl Iterator<Item = String> {
        self.costs.iter().map(|all| match all.len() {
            0 => "-".to_owned(),
            _ => sig(median(all)),
        })
    }
}

/// All phases, once, on one system.
fn round(
    origin: &Origin,
    system: &System,
    base: &str,
    mut note: impl FnMut(Phase, f64, Option<[f64; 3]>),
) -> anyhow::Result<()> {
    let mounts = [system.mount(0), system.mount(1)];
    let dir = mounts[0].join(base);
    fs::create_dir(&dir).with_context(|| dir.display().to_string())?;
    let settle = |mount: usize| system.settle([mounts[mount].join(base).as_path()]);
    // What asking for the counters costs.
    settle(0)?;
    let before = system.effort()?;
    settle(0)?;
    let asking = system
        .effort()?
        .zip(before)
        .map(|(after, before)| after.since(&before, &Effort::default()));
    for phase in Phase::ALL {
        if phase == Phase::Clone && !origin.has_repository {
            continue;
        }
        check()?;
        let before = system.effort()?;
        let began = Instant::now();
        origin
            .act(phase, mounts, base)
            .with_context(|| phase.name().to_owned())?;
        let took = began.elapsed();
        settle(phase.mount())?;
        let costs = system.effort()?.zip(before).zip(asking);
        let costs =
            costs.map(|((after, before), asking)| after.since(&before, &asking).of_each(origin.files()));
        note(phase, origin.files() as f64 / took.as_secs_f64(), costs);
        origin
            .check(phase, mounts, base)
            .with_context(|| phase.name().to_owned())?;
        settle(phase.mount())?;
    }
    origin.end(mounts, base)
}

fn table(args: &Args, beside: &Beside, samples: &[(Phase, Vec<Samples>)]) -> Table {
    let names = beside.names();
    let mut header = vec!["files a second".to_owned()];
    header.extend(names.iter().cloned());
    header.extend([NULL, DISK].map(|floor| format!("to {}", names[floor])));
    if args.before.is_some() {
        header.push("now/before".into());
    }
    let costs = ["requests", "messages", "CPU us"];
    header.extend(costs.map(|cost| format!("{cost} each")));
    if args.before.is_some() {
        header.extend(costs.map(|cost| format!("{cost} before")));
    }
    let title = format!(
        "Trees over {}, {} files, two mounts, medians of {} rounds; messages and one-sided operations of the mounts, CPU time of all \
         processes of a cluster, of each file",
        args.beside.fabric, args.files, args.beside.rounds
    );
    let mut table = Table::new(title, &header);
    for (phase, of) in samples {
        let rates: Vec<f64> = of.iter().map(|s| median(&s.rate)).collect();
        let mut row = vec![phase.name().to_owned()];
        row.extend(rates.iter().map(|rate| sig(*rate)));
        row.extend([NULL, DISK].map(|floor| ratio(rates[OURS], rates[floor])));
        row.extend(rates.get(OURS + 1).map(|before| ratio(rates[OURS], *before)));
        for cluster in &of[OURS..] {
            row.extend(cluster.costs());
        }
        table.row(row);
    }
    table
}

/// Runs `bench trees`.
///
/// # Errors
/// Something cannot be started or written, a call fails, or a tree is not what it must be.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    ensure!(
        args.files > 0 && args.beside.rounds > 0,
        "at least one file and one round are wanted"
    );
    let origin = Origin::new(args.files)?;
    let mut programs = vec![("DistFUSE", procs::fsd_binary()?)];
    programs.extend(args.before.iter().map(|program| ("before", program.clone())));
    let beside = Beside::start(&args.beside, 2, &programs)?;
    let mut samples: Vec<(Phase, Vec<Samples>)> = Phase::ALL
        .iter()
        .filter(|phase| origin.has_repository || **phase != Phase::Clone)
        .map(|&phase| (phase, vec![Samples::default(); beside.systems.len()]))
        .collect();
    let progress = Progress::new("trees", (args.beside.rounds * beside.systems.len()) as u64);
    for turn in 0..args.beside.rounds {
        for (number, system) in beside.systems.iter().enumerate() {
            progress.step(format!("{}, round {}", system.name, turn + 1));
            let note = |phase, rate, costs: Option<[f64; 3]>| {
                let row = samples.iter_mut().find(|(of, _)| *of == phase);
                let Some(samples) = row.and_then(|(_, all)| all.get_mut(number)) else {
                    return;
                };
                samples.rate.push(rate);
                for (all, cost) in samples.costs.iter_mut().zip(costs.into_iter().flatten()) {
                    all.push(cost);
                }
            };
            round(&origin, system, &format!("trees-{turn}"), note)
                .with_context(|| format!("{}; the cluster said: {}", system.name, system.log()))?;
        }
    }
    drop(progress);
    let table = table(args, &beside, &samples);
    let stem = out.join(format!("trees-{}", args.beside.fabric));
    table.write_csv(&stem.with_extension("csv"))?;
    let names = beside.names();
    let rates = |number: usize| samples.iter().map(|(_, of)| median(&of[number].rate)).collect();
    Chart {
        title: format!("Trees over {}", args.beside.fabric),
        unit: "files/s".into(),
        groups: samples.iter().map(|(phase, _)| phase.name().to_owned()).collect(),
        series: names
            .iter()
            .cloned()
            .enumerate()
            .map(|(n, name)| (name, rates(n)))
            .collect(),
        log: true,
    }
    .write(&stem)?;
    println!("{table}");
    println!("CSV and plots: {}", out.display());
    Ok(())
}
