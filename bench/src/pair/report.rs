//! The figures of `bench pair`, and what is made of them.

use std::collections::BTreeMap;

use anyhow::ensure;

use crate::names::phases::{Phase, Place};
use crate::stats::{median, sig};
use crate::table::Table;

/// The row of hand-overs.
pub const HAND_OVERS: &str = "hand-overs of a file, 64 B";
/// As many times as fast as the last system DistFUSE is to be, where files and directories go to and fro.
const TARGET: f64 = 3.0;
/// What is counted for the table; everything else is in a file.
const COUNTERS: [&str; 2] = ["requests", "messages"];

/// A row.
struct Row {
    name: String,
    unit: &'static str,
    /// Of each system, by round.
    samples: Vec<Vec<f64>>,
}

/// All figures.
pub struct Report {
    systems: Vec<String>,
    /// So many of them are DistFUSE.
    ours: usize,
    rows: Vec<Row>,
    /// Reads that were checked, and the stale ones among them, of each system.
    stale: Vec<(u64, u64)>,
    /// By row and counter: for one operation, by round.
    costs: BTreeMap<(String, String), Vec<f64>>,
}

/// How many times as fast the first one is.
fn faster(unit: &str, first: f64, other: f64) -> Option<f64> {
    let ratio = if unit == "us" {
        other / first
    } else {
        first / other
    };
    (first > 0.0 && other > 0.0).then_some(ratio)
}

impl Report {
    /// Without figures yet.
    pub fn new(systems: Vec<String>, ours: usize) -> Self {
        Self {
            stale: vec![(0, 0); systems.len()],
            systems,
            ours,
            rows: Vec::new(),
            costs: BTreeMap::new(),
        }
    }

    /// A figure of a round.
    pub fn note(&mut self, name: &str, unit: &'static str, system: usize, value: f64) {
        let count = self.systems.len();
        let at = self.rows.iter().position(|row| row.name == name);
        let at = at.unwrap_or_else(|| {
            self.rows.push(Row {
                name: name.to_owned(),
                unit,
                samples: vec![Vec::new(); count],
            });
            self.rows.len() - 1
        });
        self.rows[at].samples[system].push(value);
    }

    /// What was counted while so many operations were done.
    pub fn cost(&mut self, name: &str, operations: f64, counts: Option<BTreeMap<String, u64>>) {
        for (counter, count) in counts.into_iter().flatten() {
            let each = self.costs.entry((name.to_owned(), counter)).or_default();
            each.push(count as f64 / operations);
        }
    }

    /// Reads that were checked.
    pub fn stale(&mut self, system: usize, all: u64, bad: u64) {
        self.stale[system].0 += all;
        self.stale[system].1 += bad;
    }

    /// For people.
    pub fn table(&self, rounds: usize) -> Table {
        let mut header = vec!["operation".to_owned(), "unit".to_owned()];
        header.extend(self.systems.iter().cloned());
        header.extend(
            self.systems
                .iter()
                .skip(1)
                .map(|name| format!("times as fast as {name}")),
        );
        header.push("target".into());
        let counted = !self.costs.is_empty();
        if counted {
            header.extend(COUNTERS.map(|counter| format!("{counter} each")));
        }
        let title = format!("The same file systems on two hosts, medians of {rounds} rounds");
        let mut table = Table::new(title, &header);
        let shared = format!("{}, {}", Phase::Create.name(), Place::Shared.name());
        for row in &self.rows {
            let values: Vec<f64> = row.samples.iter().map(|all| median(all)).collect();
            let mut cells = vec![row.name.clone(), row.unit.to_owned()];
            cells.extend(values.iter().map(|value| sig(*value)));
            let ratios: Vec<Option<f64>> = values
                .iter()
                .skip(1)
                .map(|other| faster(row.unit, values[0], *other))
                .collect();
            cells.extend(ratios.iter().map(|ratio| ratio.map_or("-".into(), sig)));
            let aimed = row.name == HAND_OVERS || row.name == shared;
            cells.push(match ratios.last() {
                Some(Some(ratio)) if aimed && self.systems.len() > self.ours => {
                    format!("{TARGET}: {}", if *ratio >= TARGET { "met" } else { "MISSED" })
                }
                _ => "-".into(),
            });
            if counted {
                cells.extend(COUNTERS.map(|counter| {
                    let all = self.costs.get(&(row.name.clone(), counter.to_owned()));
                    all.map_or("-".into(), |all| sig(median(all)))
                }));
            }
            table.row(cells);
        }
        if self.stale.iter().any(|(all, _)| *all > 0) {
            let mut cells = vec!["stale reads among the hand-overs".to_owned(), "count".to_owned()];
            cells.extend(self.stale.iter().map(|(all, bad)| format!("{bad} of {all}")));
            cells.resize(header.len(), "-".into());
            table.row(cells);
        }
        table
    }

    /// Everything that was counted for one operation.
    pub fn counters(&self) -> Table {
        let mut table = Table::new("Counters", &["operation", "counter", "each"]);
        for ((name, counter), all) in &self.costs {
            let each = median(all);
            if each > 0.0 {
                table.row(vec![name.clone(), counter.clone(), sig(each)]);
            }
        }
        table
    }

    /// Fails where there is stale data and must be none.
    ///
    /// # Errors
    /// Then.
    pub fn judge(&self) -> anyhow::Result<()> {
        for (name, (all, bad)) in self.systems.iter().zip(&self.stale).take(self.ours) {
            ensure!(*bad == 0, "{name}: {bad} of {all} reads stale");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_and_targets() {
        let mut report = Report::new(vec!["ours".into(), "theirs".into()], 1);
        for (system, rates) in [(0, [90.0, 100.0, 400.0]), (1, [50.0, 20.0, 30.0])] {
            for rate in rates {
                report.note(HAND_OVERS, "1/s", system, rate);
                report.note("write", "us", system, rate);
            }
        }
        report.cost(HAND_OVERS, 10.0, Some([("requests".to_owned(), 25)].into()));
        report.stale(1, 9, 2);
        let text = report.table(3).csv();
        assert!(text.contains(",1/s,100,30.0,3.33,3: met,2.50,-"), "{text}");
        assert!(text.contains("write,us,100,30.0,0.30,-,-,-"), "{text}");
        assert!(text.contains("0 of 0,2 of 9"), "{text}");
        assert!(report.judge().is_ok());
        report.stale(0, 9, 1);
        assert!(report.judge().is_err());
    }
}
