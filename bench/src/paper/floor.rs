//! Figure 2: what a 4 KiB write costs on a FUSE file system that does nothing, and beside it on ours under a lease
//! that is held.

use std::path::{Path, PathBuf};

use super::measure::Settings;
use super::modes::{Mode, Modes};
use super::published::WRITE_US;
use crate::fs::micro_ops as ops;
use crate::nullfs::NullMode;
use crate::plot::Chart;
use crate::procs::NullServer;
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;

/// Pages that are dirty already are written again, so that neither the kernel's limits for dirty memory nor
/// writing back are in the figure: they differ from mount to mount.
const HOT: u64 = 256 << 10;
/// Ours at most this many times the null server with write-back.
const TARGET: f64 = 1.10;

type Measure = fn(&Path, u64) -> anyhow::Result<f64>;
const MEASURES: [(&str, Measure); 2] = [
    ("4 KiB write", |d, n| ops::write_4k_within(d, HOT, n)),
    ("4 KiB cached read", |d, n| ops::cached_read_within(d, HOT, n)),
];

/// Measures and prints it.
///
/// # Errors
/// A server does not start, a call fails, a file cannot be written.
pub fn run(modes: &Modes, settings: &Settings, out: &Path) -> anyhow::Result<()> {
    let null = [
        NullServer::start(NullMode::Writethrough)?,
        NullServer::start(NullMode::Writeback)?,
    ];
    let mut systems: Vec<(&str, PathBuf, Option<Mode>)> = vec![
        ("null write-through", null[0].path().to_owned(), None),
        ("null write-back", null[1].path().to_owned(), None),
    ];
    let there = modes.there();
    // The baselines differ only in files that others have open too.
    let through = there.iter().find(|m| **m != Mode::Back);
    let back = there.iter().find(|m| **m == Mode::Back);
    for mode in through.into_iter().chain(back).copied() {
        systems.push((mode.name(), modes.dirs(mode)[0].clone(), Some(mode)));
    }
    let title = "Figure 2: us a call, the lease held";
    let progress = Progress::new(title, (MEASURES.len() * settings.calls_rounds) as u64);
    let mut header = vec!["call".to_owned()];
    header.extend(systems.iter().map(|s| format!("{} us", s.0)));
    header.extend(
        [
            "wb/null wb",
            "target",
            "verdict",
            "null wb/wt",
            "paper",
            "wb/wt here",
            "requests a call (wb)",
        ]
        .map(String::from),
    );
    let mut table = Table::new(title, &header);
    let mut series: Vec<(String, Vec<f64>)> = systems.iter().map(|s| (s.0.to_owned(), vec![])).collect();
    for (name, measure) in MEASURES {
        let mut samples = vec![Vec::new(); systems.len()];
        let mut requests = Vec::new();
        for round in 0..settings.calls_rounds {
            progress.step(format!("{name}, round {}", round + 1));
            for (n, (system, dir, mode)) in systems.iter().enumerate() {
                check()?;
                // What goes through takes many times as long.
                let through = matches!(mode, Some(Mode::Through(_))) || system.contains("through");
                let calls = if through && name.ends_with("write") {
                    settings.calls / 20
                } else {
                    settings.calls
                };
                ops::renew_hot(dir, HOT)?;
                let count = || mode.and_then(|m| modes.cluster(m)?.counter("requests"));
                let before = count();
                samples[n].push(measure(dir, calls)? / 1e3);
                if *mode == Some(Mode::Back) {
                    let made = before.zip(count()).map(|(a, b)| (b - a) as f64 / calls as f64);
                    requests.extend(made);
                }
            }
        }
        let medians: Vec<f64> = samples.iter().map(|s| median(s)).collect();
        for (n, value) in medians.iter().enumerate() {
            series[n].1.push(*value);
        }
        let mut row = vec![name.to_owned()];
        row.extend(medians.iter().map(|us| sig(*us)));
        let back = medians.get(3);
        let ratio = back.map(|us| us / medians[1]);
        let dash = || "-".to_owned();
        row.push(ratio.map_or_else(dash, |r| format!("{r:.2}")));
        row.push(format!("<= {TARGET:.2}"));
        row.push(match ratio {
            Some(r) if r <= TARGET => "met".into(),
            Some(_) => "MISSED".into(),
            None => dash(),
        });
        row.push(format!("{:.2}", medians[1] / medians[0]));
        row.push(if name.ends_with("write") {
            format!("{:.2}", WRITE_US.ratio())
        } else {
            dash()
        });
        row.push(back.map_or_else(dash, |us| format!("{:.2}", us / medians[2])));
        row.push(if requests.is_empty() {
            dash()
        } else {
            sig(median(&requests))
        });
        table.row(row);
    }
    drop(progress);
    table.write_csv(&out.join("paper-fig2.csv"))?;
    Chart {
        title: title.into(),
        unit: "us".into(),
        groups: MEASURES.iter().map(|m| m.0.to_owned()).collect(),
        series,
        log: true,
    }
    .write(&out.join("paper-fig2"))?;
    println!("{table}");
    Ok(())
}
