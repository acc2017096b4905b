//! A figure's table and plots.

use std::path::Path;

use anyhow::Context;

use super::figures::{Plan, Point};
use super::measure::{Samples, Settings, measure};
use super::modes::{Mode, Modes};
use crate::plot::Chart;
use crate::progress::Progress;
use crate::stats::{median, sig};
use crate::table::Table;

fn header(unit: &str) -> Vec<String> {
    let of_all = |what: &str| Mode::ALL.map(|mode| format!("{} {what}", mode.name()));
    let mut header = vec!["point".to_owned()];
    header.extend(of_all(unit));
    let ratios = [
        "ratio",
        "paper",
        "ratio/paper",
        "ratio to WT bypass",
        "ratio with fsync after",
    ];
    header.extend(ratios.map(String::from));
    header.extend(of_all("ms"));
    header.extend(["latency ratio", "paper", "verdict"].map(String::from));
    header
}

/// What is said of a point; [`None`] is what was not measured, or is not in the paper.
struct Row {
    cells: Vec<String>,
    /// In the order of [`Mode::ALL`].
    speeds: [Option<f64>; 3],
    /// Of write-back: to WT+OCC, to WT bypass, the paper's.
    ratios: [Option<f64>; 3],
}

/// Ratios and the verdict are to WT+OCC, where nothing else is said, as the paper's are.
fn row(point: &Point, samples: &[(Mode, Samples)]) -> Row {
    let of = |mode, pick: fn(&Samples) -> &Vec<f64>| {
        let samples = samples.iter().find(|(m, _)| *m == mode).map(|(_, s)| pick(s));
        samples.filter(|s| !s.is_empty()).map(|s| median(s))
    };
    let by = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a / b.max(1e-9));
    let to = |baseline, pick| by(of(Mode::Back, pick), of(baseline, pick));
    let text = |value: Option<f64>| value.map_or_else(|| "-".into(), sig);
    let two = |value: Option<f64>| value.map_or_else(|| "-".into(), |v| format!("{v:.2}"));
    let speeds = Mode::ALL.map(|mode| of(mode, |s| &s.speed));
    let ratio = to(Mode::OCC, |s| &s.speed);
    let to_bypass = to(Mode::BYPASS, |s| &s.speed);
    let verdict = match ratio.zip(point.ratio) {
        None => "-",
        Some((here, paper)) if here >= paper => "at least the paper's",
        Some((here, _)) if here >= 1.0 => "ahead, less than the paper's",
        Some(_) => "BEHIND",
    };
    let mut cells = vec![point.name.clone()];
    cells.extend(speeds.map(text));
    cells.extend([
        two(ratio),
        two(point.ratio),
        two(by(ratio, point.ratio)),
        two(to_bypass),
        two(to(Mode::OCC, |s| &s.durable)),
    ]);
    cells.extend(Mode::ALL.map(|mode| text(of(mode, |s| &s.mean_ms))));
    cells.extend([
        two(to(Mode::OCC, |s| &s.mean_ms)),
        two(point.latency_ratio),
        verdict.into(),
    ]);
    Row {
        cells,
        speeds,
        ratios: [ratio, to_bypass, point.ratio],
    }
}

fn say_counters(point: &str, samples: &[(Mode, Samples)]) {
    for (mode, samples) in samples {
        let moved = samples.counters.iter().filter(|(_, n)| **n > 0);
        let list: Vec<String> = moved.map(|(name, n)| format!("{name} {n}")).collect();
        eprintln!("    {point}, {}: {}", mode.name(), list.join(", "));
    }
}

/// The series of a chart that have anything to show.
fn series(
    names: [&str; 3],
    values: impl Iterator<Item = [Option<f64>; 3]> + Clone,
) -> Vec<(String, Vec<f64>)> {
    let one = |(n, name): (usize, &str)| {
        let of_name = values.clone().map(move |v| v[n]);
        let any = of_name.clone().any(|v| v.is_some());
        any.then(|| (name.to_owned(), of_name.map(|v| v.unwrap_or(0.0)).collect()))
    };
    names.into_iter().enumerate().filter_map(one).collect()
}

/// Measures a figure, prints its table, writes that and the plots.
///
/// # Errors
/// A file system call fails, contents are not what they must be, or a file cannot be written.
pub fn figure(
    modes: &Modes,
    settings: &Settings,
    plan: &Plan,
    counters: bool,
    out: &Path,
) -> anyhow::Result<()> {
    let progress = Progress::new(&plan.title, plan.points.len() as u64);
    let mut table = Table::new(plan.title.clone(), &header(plan.unit));
    let mut rows = Vec::new();
    for point in &plan.points {
        progress.step(point.name.clone());
        let samples = measure(modes, settings, &point.work)
            .with_context(|| format!("{}, {}", plan.title, point.name))?;
        if counters {
            say_counters(&point.name, &samples);
        }
        let row = row(point, &samples);
        table.row(row.cells.clone());
        rows.push(row);
    }
    drop(progress);
    table.write_csv(&out.join(format!("{}.csv", plan.stem)))?;
    let groups: Vec<String> = plan.points.iter().map(|p| p.name.clone()).collect();
    Chart {
        title: plan.title.clone(),
        unit: plan.unit.into(),
        groups: groups.clone(),
        series: series(Mode::ALL.map(Mode::name), rows.iter().map(|r| r.speeds)),
        log: false,
    }
    .write(&out.join(plan.stem))?;
    Chart {
        title: format!("{}: write-back by WT+OCC", plan.title),
        unit: "ratio".into(),
        groups,
        series: series(
            ["here", "here by WT bypass", "paper"],
            rows.iter().map(|r| r.ratios),
        ),
        log: false,
    }
    .write(&out.join(format!("{}-ratio", plan.stem)))?;
    println!("{table}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::figures;
    use super::super::tests::arguments;
    use super::*;

    fn samples(mode: Mode, speed: f64, ms: f64) -> (Mode, Samples) {
        let samples = Samples {
            speed: vec![speed],
            durable: vec![speed / 2.0],
            mean_ms: vec![ms],
            ..Samples::default()
        };
        (mode, samples)
    }

    fn point() -> Point {
        let mut plan = figures::plans(&arguments(&["--only", "fig6"])).swap_remove(0);
        plan.points.swap_remove(0)
    }

    #[test]
    fn a_row_has_ratios_to_both_baselines_and_of_the_paper() {
        let all = [
            samples(Mode::OCC, 2.0, 1.0),
            samples(Mode::BYPASS, 4.0, 0.8),
            samples(Mode::Back, 5.0, 0.5),
        ];
        let row = row(&point(), &all);
        assert_eq!(row.cells.len(), header("MiB/s").len());
        assert_eq!(row.cells[4..9], ["2.50", "1.68", "1.49", "1.25", "2.50"]);
        assert_eq!(row.cells[12..], ["0.50", "0.60", "at least the paper's"]);
        assert_eq!(row.speeds, [Some(2.0), Some(4.0), Some(5.0)]);
        assert_eq!(row.ratios[..2], [Some(2.5), Some(1.25)]);
    }

    #[test]
    fn what_was_left_out_is_a_dash() {
        let row = row(
            &point(),
            &[samples(Mode::BYPASS, 4.0, 0.8), samples(Mode::Back, 5.0, 0.5)],
        );
        assert_eq!(row.cells[1], "-");
        assert_eq!(row.cells[4..9], ["-", "1.68", "-", "1.25", "-"]);
        assert_eq!(row.cells.last().unwrap(), "-");
        let drawn = series(["a", "b", "c"], [row.speeds].into_iter());
        assert_eq!(drawn, [("b".to_owned(), vec![4.0]), ("c".to_owned(), vec![5.0])]);
    }
}
