//! The paper's sweeps: read:write ratio, contention, nodes; every mode beside its floor.

use std::path::Path;
use std::time::Duration;

use super::pattern::Workload;
use super::{Args, Section, System, Systems, runner};
use crate::plot::Chart;
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;

struct Sweep {
    name: &'static str,
    title: String,
    points: Vec<(String, Workload)>,
    systems: Vec<System>,
}

/// 4096 → `4 KiB`.
fn size(bytes: usize) -> String {
    if bytes >= 1 << 20 {
        format!("{} MiB", bytes >> 20)
    } else {
        format!("{} KiB", bytes >> 10)
    }
}

fn base(args: &Args) -> Workload {
    Workload {
        random: true,
        reads: 50,
        block: 4096,
        contention: 0,
        nodes: 2,
        threads: args.threads,
        files: if args.quick { 4 } else { 8 },
        file_size: 4 << 20,
    }
}

fn sweeps(args: &Args) -> Vec<Sweep> {
    let thin = |all: &[u32]| -> Vec<u32> {
        if args.quick && all.len() > 3 {
            vec![all[0], all[all.len() / 2], all[all.len() - 1]]
        } else {
            all.to_vec()
        }
    };
    let mut sweeps = Vec::new();
    if args.section.contains(&Section::Ratio) {
        for &block in &args.blocks {
            for random in [true, false] {
                let kind = if random { "random" } else { "sequential" };
                if args.quick && (block != args.blocks[0] || !random) {
                    continue;
                }
                let points = thin(&args.ratios)
                    .into_iter()
                    .map(|reads| {
                        (
                            format!("{}:{}", reads, 100 - reads),
                            Workload {
                                random,
                                reads,
                                block,
                                ..base(args)
                            },
                        )
                    })
                    .collect();
                sweeps.push(Sweep {
                    name: match (random, block >= 1 << 20) {
                        (true, false) => "ratio-random-small",
                        (false, false) => "ratio-sequential-small",
                        (true, true) => "ratio-random-large",
                        (false, true) => "ratio-sequential-large",
                    },
                    title: format!("{kind} {}, by read:write, 2 nodes, no contention", size(block)),
                    points,
                    systems: System::ALL.to_vec(),
                });
            }
        }
    }
    let ours = vec![System::FsdDirect, System::FsdWt];
    if args.section.contains(&Section::Contention) {
        let points = thin(&args.contention)
            .into_iter()
            .map(|contention| {
                (
                    format!("{contention} %"),
                    Workload {
                        contention,
                        ..base(args)
                    },
                )
            })
            .collect();
        sweeps.push(Sweep {
            name: "contention",
            title: "random 4 KiB 50:50, by contention, 2 nodes".into(),
            points,
            systems: ours.clone(),
        });
    }
    if args.section.contains(&Section::Nodes) {
        let points = args
            .nodes
            .iter()
            .filter(|n| !args.quick || **n <= 2)
            .map(|&nodes| {
                (
                    format!("{nodes} nodes"),
                    Workload {
                        nodes,
                        contention: 50,
                        ..base(args)
                    },
                )
            })
            .collect();
        sweeps.push(Sweep {
            name: "nodes",
            title: "random 4 KiB 50:50, 50 % contention, by nodes".into(),
            points,
            systems: ours,
        });
    }
    sweeps
}

/// Runs the sweeps that were asked for.
///
/// # Errors
/// A system does not start, a call fails, a file cannot be written.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let sweeps = sweeps(args);
    let mounts = sweeps
        .iter()
        .flat_map(|s| &s.points)
        .map(|(_, w)| w.nodes)
        .max()
        .unwrap_or(2);
    let systems = Systems::start(mounts, &args.fabric, 512)?;
    let (rounds, duration) = if args.quick {
        (1, Duration::from_millis(150))
    } else {
        (3, Duration::from_millis(500))
    };
    for sweep in &sweeps {
        let progress = Progress::new(&sweep.title, sweep.points.len() as u64);
        let mut header = vec!["point".to_owned()];
        for s in &sweep.systems {
            header.extend([format!("{} MiB/s", s.name()), format!("{} us", s.name())]);
        }
        header.extend(["fsd wt p99 us", "wt/direct"].map(String::from));
        let mut table = Table::new(format!("{}, {}", sweep.title, args.fabric), &header);
        let mut series: Vec<(String, Vec<f64>)> = sweep
            .systems
            .iter()
            .map(|s| (s.name().to_owned(), Vec::new()))
            .collect();
        for (name, workload) in &sweep.points {
            progress.step(name.clone());
            let mut speed = vec![Vec::new(); sweep.systems.len()];
            let mut mean = speed.clone();
            let mut p99 = Vec::new();
            for round in 0..rounds {
                for (n, system) in sweep.systems.iter().enumerate() {
                    check()?;
                    let outcome =
                        runner::run(*workload, &systems.dirs(*system), duration, round + 1 == rounds)
                            .map_err(|e| e.context(format!("{}, {name}, {}", sweep.title, system.name())))?;
                    speed[n].push(outcome.mib_per_s);
                    mean[n].push(outcome.latency.mean() / 1e3);
                    if *system == System::FsdWt {
                        p99.push(outcome.latency.at(0.99) / 1e3);
                    }
                }
            }
            let mut row = vec![name.clone()];
            for n in 0..sweep.systems.len() {
                row.extend([sig(median(&speed[n])), sig(median(&mean[n]))]);
                series[n].1.push(median(&speed[n]));
            }
            let last = sweep.systems.len() - 1;
            row.push(sig(median(&p99)));
            row.push(format!(
                "{:.2}",
                median(&speed[last]) / median(&speed[last - 1]).max(1e-9)
            ));
            table.row(row);
        }
        drop(progress);
        let stem = format!("fs-{}-{}", sweep.name, args.fabric);
        table.write_csv(&out.join(format!("{stem}.csv")))?;
        Chart {
            title: sweep.title.clone(),
            unit: "MiB/s".into(),
            groups: sweep.points.iter().map(|(n, _)| n.clone()).collect(),
            series,
            log: true,
        }
        .write(&out.join(stem))?;
        println!("{table}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!([size(4096), size(1 << 20)], ["4 KiB", "1 MiB"]);
    }
}
