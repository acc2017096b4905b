//! Single operations of all systems in turn, several rounds, medians, and the targets.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::micro_ops as ops;
use super::{System, Systems};
use crate::plot::Chart;
use crate::procs::{Cluster, cpu_time};
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;

/// How much of everything.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    /// Rounds; the median counts.
    pub rounds: usize,
    /// Cached reads and stats a round.
    pub reads: u64,
    /// 4 KiB writes a round.
    pub writes: u64,
    /// Bytes of the large file.
    pub stream: u64,
    /// Files a round.
    pub files: u64,
    /// Turns of the alternation a round.
    pub turns: u64,
    /// For how long idle processes are watched.
    pub idle: Duration,
}

impl Scale {
    /// For `--quick`.
    pub fn quick() -> Self {
        Self {
            rounds: 3,
            reads: 20_000,
            writes: 2_000,
            stream: 32 << 20,
            files: 300,
            turns: 500,
            idle: Duration::from_secs(3),
        }
    }

    /// Where nothing is cached, a tenth of the calls is enough.
    fn of(self, system: System) -> Self {
        match system {
            System::NullDirect | System::FsdDirect => Self {
                reads: self.reads / 10,
                ..self
            },
            _ => self,
        }
    }

    /// For numbers to be quoted.
    pub fn full() -> Self {
        Self {
            rounds: 7,
            reads: 100_000,
            writes: 10_000,
            stream: 64 << 20,
            files: 1_000,
            turns: 2_000,
            idle: Duration::from_secs(5),
        }
    }
}

/// Which way is better, and what is asked for.
#[derive(Debug, Clone, Copy)]
enum Goal {
    /// `fsd wt` at most this many times the null server's.
    AtMost(f64),
    /// `fsd wt` at least this share of the null server's.
    AtLeast(f64),
    /// `fsd wt` at least this.
    Rate(f64),
    /// Nothing.
    Any,
}

struct Measure {
    name: &'static str,
    unit: &'static str,
    goal: Goal,
    run: fn(&[PathBuf], &Scale) -> anyhow::Result<f64>,
    floors: bool,
}

const MEASURES: [Measure; 9] = [
    Measure {
        name: "4 KiB cached read",
        unit: "us",
        goal: Goal::AtMost(1.1),
        run: |d, s| Ok(ops::cached_read(&d[0], s)? / 1e3),
        floors: true,
    },
    Measure {
        name: "4 KiB write, lease held",
        unit: "us",
        goal: Goal::AtMost(1.3),
        run: |d, s| Ok(ops::write_4k(&d[0], s)? / 1e3),
        floors: true,
    },
    Measure {
        name: "1 MiB sequential overwrite",
        unit: "MiB/s",
        goal: Goal::AtLeast(0.7),
        run: |d, s| ops::seq_overwrite(&d[0], s),
        floors: true,
    },
    Measure {
        name: "1 MiB sequential write, new file",
        unit: "MiB/s",
        goal: Goal::AtLeast(0.7),
        run: |d, s| ops::seq_write_new(&d[0], s),
        floors: true,
    },
    Measure {
        name: "1 MiB sequential read, not in page cache",
        unit: "MiB/s",
        goal: Goal::AtLeast(0.7),
        run: |d, s| ops::seq_read(&d[0], s),
        floors: true,
    },
    Measure {
        name: "fstat, cached",
        unit: "us",
        goal: Goal::AtMost(1.1),
        run: |d, s| Ok(ops::fstat(&d[0], s)? / 1e3),
        floors: true,
    },
    Measure {
        name: "stat by path, cached",
        unit: "us",
        goal: Goal::Any,
        run: |d, s| Ok(ops::stat(&d[0], s)? / 1e3),
        floors: true,
    },
    Measure {
        name: "create + write 4 KiB + close",
        unit: "1/s",
        goal: Goal::Rate(5_000.0),
        run: |d, s| ops::create(&d[0], s),
        floors: true,
    },
    Measure {
        name: "overwrite on mount 0, read on mount 1",
        unit: "1/s",
        goal: Goal::Rate(10_000.0),
        run: ops::alternate,
        floors: false,
    },
];

/// The verdict on `ours` beside the floor.
fn verdict(goal: Goal, ours: f64, floor: f64) -> (String, String) {
    let word = |ok: bool| if ok { "met" } else { "MISSED" }.to_owned();
    match goal {
        Goal::AtMost(x) => (format!("<= {x}x null"), word(ours <= x * floor)),
        Goal::AtLeast(x) => (format!(">= {x}x null"), word(ours >= x * floor)),
        Goal::Rate(x) => (format!(">= {}", sig(x)), word(ours >= x)),
        Goal::Any => ("-".into(), "-".into()),
    }
}

fn ratio(a: f64, b: f64) -> String {
    if b > 0.0 && a > 0.0 {
        format!("{:.2}", a / b)
    } else {
        "-".into()
    }
}

/// Measures everything; prints nothing but progress.
///
/// # Errors
/// A system does not start, or a call fails.
pub fn run(place: &str, fabric: &str, scale: Scale, out: &Path) -> anyhow::Result<Table> {
    let systems = Systems::start(2, fabric, 512)?;
    let progress = Progress::new(
        &format!("file system, {place}"),
        (MEASURES.len() * scale.rounds) as u64 + 3,
    );
    let header = [
        "operation",
        "unit",
        "tmpfs",
        "null direct",
        "null wt",
        "fsd direct",
        "fsd wt",
        "direct/null",
        "wt/null",
        "wt/tmpfs",
        "target (wt)",
        "verdict",
    ];
    let mut table = Table::new(
        format!("File system over {fabric}, {place} (medians of {})", scale.rounds),
        &header,
    );
    let mut plotted = Vec::new();
    for m in &MEASURES {
        let mut samples = vec![Vec::new(); System::ALL.len()];
        for round in 0..scale.rounds {
            progress.step(format!("{} {}/{}", m.name, round + 1, scale.rounds));
            for (n, system) in System::ALL.into_iter().enumerate() {
                check()?;
                if m.floors || system.is_fsd() {
                    samples[n].push((m.run)(&systems.dirs(system), &scale.of(system)).map_err(|e| {
                        e.context(format!(
                            "{}, {}; the cluster said: {}",
                            m.name,
                            system.name(),
                            log(&systems, system)
                        ))
                    })?);
                }
            }
        }
        let v: Vec<f64> = samples.iter().map(|s| median(s)).collect();
        let (target, word) = verdict(m.goal, v[4], v[2]);
        let mut row = vec![m.name.to_owned(), m.unit.to_owned()];
        row.extend(v.iter().map(|x| if *x > 0.0 { sig(*x) } else { "-".into() }));
        row.extend([
            ratio(v[3], v[1]),
            ratio(v[4], v[2]),
            ratio(v[4], v[0]),
            target,
            word,
        ]);
        table.row(row);
        plotted.push((m, v));
    }
    progress.step("requests of cached operations");
    cached_requests(&systems, &scale, &mut table)?;
    for (n, system) in [System::FsdDirect, System::FsdWt].into_iter().enumerate() {
        progress.step("idle processes");
        idle(&systems.clusters[n], system, scale.idle, &mut table);
    }
    let stem = format!("fs-micro-{}-{fabric}", place.replace(' ', "-"));
    table.write_csv(&out.join(format!("{stem}.csv")))?;
    for unit in ["us", "MiB/s", "1/s"] {
        let some: Vec<_> = plotted.iter().filter(|(m, _)| m.unit == unit).collect();
        let series = System::ALL
            .iter()
            .enumerate()
            .map(|(n, s)| (s.name().to_owned(), some.iter().map(|(_, v)| v[n]).collect()))
            .collect();
        let chart = Chart {
            title: format!("DistFUSE beside its floors, {fabric}, {place}"),
            unit: unit.into(),
            groups: some.iter().map(|(m, _)| m.name.to_owned()).collect(),
            series,
            log: unit != "MiB/s",
        };
        let name = match unit {
            "us" => "latency",
            "MiB/s" => "bandwidth",
            _ => "rate",
        };
        chart.write(&out.join(format!("{stem}-{name}")))?;
    }
    Ok(table)
}

fn log(systems: &Systems, system: System) -> String {
    match system {
        System::FsdDirect => systems.clusters[0].log(),
        System::FsdWt => systems.clusters[1].log(),
        _ => String::new(),
    }
}

fn extra(table: &mut Table, name: String, unit: &str, system: System, value: String, target: &str, ok: bool) {
    let mut row = vec![name, unit.to_owned()];
    row.extend(
        System::ALL
            .iter()
            .map(|s| if *s == system { value.clone() } else { "-".into() }),
    );
    row.extend(["-".into(), "-".into(), "-".into(), target.to_owned()]);
    let verdict = match target {
        "-" => "-",
        _ if ok => "met",
        _ => "MISSED",
    };
    row.push(verdict.into());
    table.row(row);
}

/// How many requests of the kernel, and messages and batches of operations on the fabric, cached reads and
/// stats cause. The kernel asks for every name in a path (see docs/architecture.md), but no server is asked.
fn cached_requests(systems: &Systems, scale: &Scale, table: &mut Table) -> anyhow::Result<()> {
    let dirs = systems.dirs(System::FsdWt);
    let cluster = &systems.clusters[1];
    for (what, run, asked_for) in [
        (
            "cached stats by path",
            ops::stat as fn(&Path, &Scale) -> anyhow::Result<f64>,
            false,
        ),
        ("cached fstats", ops::fstat, true),
        ("cached reads", ops::cached_read, true),
    ] {
        // Once to warm up; what opening the file costs is in both counts and vanishes in the division.
        run(&dirs[0], scale)?;
        let count = || Some((cluster.counter("requests")?, cluster.counter("messages")?));
        let before = count();
        run(&dirs[0], scale)?;
        let Some((before, after)) = before.zip(count()) else {
            continue;
        };
        for (name, before, after, asked_for) in [
            ("requests", before.0, after.0, asked_for),
            ("messages", before.1, after.1, true),
        ] {
            let each = after.saturating_sub(before) as f64 / scale.reads as f64;
            extra(
                table,
                format!("{name} of {what}"),
                "per call",
                System::FsdWt,
                format!("{each:.4}"),
                if asked_for { "0" } else { "-" },
                each < 0.01 || !asked_for,
            );
        }
    }
    Ok(())
}

/// CPU time of all processes of a cluster that has nothing to do.
fn idle(cluster: &Cluster, system: System, watch: Duration, table: &mut Table) {
    std::thread::sleep(Duration::from_millis(1_500));
    let pids: Vec<u32> = cluster
        .members()
        .iter()
        .map(|(_, pid)| *pid)
        .chain([cluster.supervisor()])
        .collect();
    let before: Vec<Duration> = pids.iter().map(|p| cpu_time(*p)).collect();
    let start = Instant::now();
    std::thread::sleep(watch);
    let used: Duration = pids
        .iter()
        .zip(before)
        .map(|(p, b)| cpu_time(*p).saturating_sub(b))
        .sum();
    let percent = used.as_secs_f64() / start.elapsed().as_secs_f64() * 100.0;
    let name = format!("idle, {} processes", pids.len());
    extra(
        table,
        name,
        "% of a core",
        system,
        format!("{percent:.2}"),
        "< 1",
        percent < 1.0,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts() {
        assert_eq!(
            verdict(Goal::AtMost(1.1), 10.9, 10.0),
            ("<= 1.1x null".into(), "met".into())
        );
        assert_eq!(verdict(Goal::AtMost(1.1), 11.1, 10.0).1, "MISSED");
        assert_eq!(verdict(Goal::AtLeast(0.7), 71.0, 100.0).1, "met");
        assert_eq!(verdict(Goal::AtLeast(0.7), 69.0, 100.0).1, "MISSED");
        assert_eq!(
            verdict(Goal::Rate(5000.0), 5001.0, 0.0),
            (">= 5000".into(), "met".into())
        );
        assert_eq!([ratio(1.0, 2.0), ratio(1.0, 0.0)], ["0.50", "-"]);
    }
}
