//! Names as mdtest has them: made, looked at, renamed, removed; in directories of their own and in one that is shared, by several
//! mounts; beside a FUSE server that does nothing, memory, and this machine's disk.

pub mod phases;

use std::fs;
use std::path::Path;

use anyhow::{Context, ensure};

use crate::beside::{Beside, BesideArgs, DISK, Effort, NULL, OURS, System, TMPFS, ratio};
use crate::plot::Chart;
use crate::procs;
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
    #[command(flatten)]
    beside: BesideArgs,
}

/// Samples of a phase: of each system operations a second, and of the cluster what it cost a file.
#[derive(Default)]
struct Samples {
    rates: [Vec<f64>; OURS + 1],
    costs: [Vec<f64>; 2],
}

/// All phases in one place, once, on one of the systems.
fn round(
    (system, count): (&System, usize),
    place: Place,
    name: &str,
    args: &Args,
    mut note: impl FnMut(Phase, f64, Option<[f64; 3]>),
) -> anyhow::Result<()> {
    let tasks = Tasks::new(&system.mounts, count, place, name, args.files)?;
    // What asking for the counters costs.
    system.settle(tasks.dirs())?;
    let before = system.effort()?;
    system.settle(tasks.dirs())?;
    let after = system.effort()?;
    let asking = before
        .zip(after)
        .map(|(before, after)| after.since(&before, &Effort::default()));
    let mut measured = |phase| -> anyhow::Result<()> {
        check()?;
        let before = system.effort()?;
        let took = tasks.run(phase)?;
        system.settle(tasks.dirs())?;
        let after = system.effort()?;
        let costs = after.zip(before).zip(asking);
        let costs =
            costs.map(|((after, before), asking)| after.since(&before, &asking).of_each(tasks.count()));
        note(phase, tasks.count() as f64 / took.as_secs_f64(), costs);
        Ok(())
    };
    Phase::OWN.into_iter().try_for_each(&mut measured)?;
    if count > 1 {
        tasks.run(Phase::Create)?;
        system.settle(tasks.dirs())?;
        Phase::OTHERS.into_iter().try_for_each(&mut measured)?;
        tasks.run(Phase::Rename)?;
        tasks.run(Phase::Remove)?;
    }
    tasks.end()
}

/// One number of mounts.
fn with_mounts(args: &Args, count: usize, out: &Path) -> anyhow::Result<Table> {
    let beside = Beside::start(&args.beside, count, &[("DistFUSE", procs::fsd_binary()?)])?;
    let plural = if count == 1 { "mount" } else { "mounts" };
    let title = format!("Names over {}, {count} {plural}", args.beside.fabric);
    let names = beside.names();
    let steps = args.beside.rounds * Place::ALL.len() * names.len();
    let progress = Progress::new(&title, steps as u64);
    let mut samples: Vec<(Place, Phase, Samples)> = Vec::new();
    for place in Place::ALL {
        let others = if count > 1 { &Phase::OTHERS[..] } else { &[] };
        let phases = Phase::OWN.iter().chain(others);
        samples.extend(phases.map(|&phase| (place, phase, Samples::default())));
    }
    for turn in 0..args.beside.rounds {
        for place in Place::ALL {
            for (number, system) in beside.systems.iter().enumerate() {
                let name = &system.name;
                progress.step(format!("{}, {name}, round {}", place.name(), turn + 1));
                let below = format!("names-{turn}-{}", place as u8);
                let note = |phase, rate, costs: Option<[f64; 3]>| {
                    let row = samples
                        .iter_mut()
                        .find(|(at, of, _)| *at == place && *of == phase);
                    if let Some((.., samples)) = row {
                        samples.rates[number].push(rate);
                        for (all, cost) in samples.costs.iter_mut().zip(costs.into_iter().flatten()) {
                            all.push(cost);
                        }
                    }
                };
                round((system, count), place, &below, args, note).with_context(|| {
                    format!("{name}, {}; the cluster said: {}", place.name(), system.log())
                })?;
            }
        }
    }
    drop(progress);
    let mut header = vec!["operations a second".to_owned()];
    header.extend(names.iter().cloned());
    for beside in [NULL, TMPFS, DISK] {
        header.push(format!("to {}", names[beside]));
    }
    header.extend(["requests each", "messages each"].map(String::from));
    let full = format!(
        "{title}, {} files each, medians of {} rounds; messages and one-sided operations of the mounts, with those sent later",
        args.files, args.beside.rounds
    );
    let mut table = Table::new(full, &header);
    let mut series: Vec<(String, Vec<f64>)> = names.iter().map(|n| (n.clone(), Vec::new())).collect();
    for (place, phase, samples) in &samples {
        let rates: Vec<f64> = samples.rates.iter().map(|all| median(all)).collect();
        let mut row = vec![format!("{}, {}", phase.name(), place.name())];
        row.extend(rates.iter().map(|rate| sig(*rate)));
        row.extend([NULL, TMPFS, DISK].map(|beside| ratio(rates[OURS], rates[beside])));
        row.extend(samples.costs.iter().map(|all| sig(median(all))));
        table.row(row);
        series
            .iter_mut()
            .zip(&rates)
            .for_each(|((_, all), rate)| all.push(*rate));
    }
    let stem = out.join(format!("names-{}-{count}", args.beside.fabric));
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
        args.files > 0 && args.beside.rounds > 0 && !args.mounts.contains(&0),
        "at least one file, one round and one mount are wanted"
    );
    fs::create_dir_all(out)?;
    for &count in &args.mounts {
        println!("{}", with_mounts(args, count, out)?);
    }
    println!("CSV and plots: {}", out.display());
    Ok(())
}
