//! What came of a soak so far.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::schedule::Turn;
use crate::error::{Result, Trouble};
use crate::report::{self, Outcome};

/// The runs of one scenario, counted.
#[derive(Debug, Clone, Default, Serialize)]
struct Row {
    scenario: String,
    rounds: u64,
    passed: u64,
    /// Whatever the reason: the next two are among these.
    failed: u64,
    kernel_warnings: u64,
    hangs: u64,
    seconds: f64,
}

impl Row {
    fn count(&mut self, outcome: &Outcome) {
        self.rounds += 1;
        self.passed += u64::from(outcome.error.is_none());
        self.failed += u64::from(outcome.error.is_some());
        self.kernel_warnings += u64::from(outcome.trouble == Some(Trouble::Warning));
        self.hangs += u64::from(outcome.trouble == Some(Trouble::Hang));
        self.seconds += outcome.seconds;
    }

    fn line(&self) -> String {
        format!(
            "{:<28} {:>7} {:>7} {:>7} {:>9} {:>6} {:>8.0}\n",
            self.scenario,
            self.rounds,
            self.passed,
            self.failed,
            self.kernel_warnings,
            self.hangs,
            self.seconds
        )
    }
}

/// A run that failed.
#[derive(Debug, Clone, Serialize)]
struct Failure {
    round: u64,
    scenario: String,
    /// What its tests drew their random numbers from.
    seed: u64,
    trouble: Option<Trouble>,
    error: String,
    logs: PathBuf,
}

/// All that is told of a soak.
#[derive(Debug, Clone, Serialize)]
pub struct Tally {
    seed: u64,
    minutes: u64,
    seconds: f64,
    interrupted: bool,
    scenarios: Vec<Row>,
    failures: Vec<Failure>,
    #[serde(skip)]
    folder: PathBuf,
}

impl Tally {
    /// Of a soak that begins, of these scenarios.
    pub fn new(seed: u64, minutes: u64, folder: &Path, names: Vec<String>) -> Tally {
        let row = |scenario| Row {
            scenario,
            ..Row::default()
        };
        Tally {
            seed,
            minutes,
            seconds: 0.0,
            interrupted: false,
            scenarios: names.into_iter().map(row).collect(),
            failures: Vec::new(),
            folder: folder.to_owned(),
        }
    }

    /// Counts a run, and writes down what came of all so far: a soak may be ended by whatever.
    ///
    /// # Errors
    /// That cannot be written.
    pub fn count(&mut self, turn: Turn, outcome: &Outcome, logs: &Path, elapsed: Duration) -> Result<()> {
        if let Some(row) = self.scenarios.get_mut(turn.job) {
            row.count(outcome);
        }
        if let Some(error) = &outcome.error {
            self.failures.push(Failure {
                round: turn.round,
                scenario: outcome.name.clone(),
                seed: turn.seed,
                trouble: outcome.trouble,
                error: error.clone(),
                logs: logs.join(&outcome.name),
            });
        }
        self.seconds = elapsed.as_secs_f64();
        report::save(self, &self.folder)
    }

    /// Notes that it was ended before its time.
    ///
    /// # Errors
    /// That cannot be written.
    pub fn interrupt(&mut self) -> Result<()> {
        self.interrupted = true;
        report::save(self, &self.folder)
    }

    /// Whether something was run, and all that was passed.
    pub fn good(&self) -> bool {
        self.failures.is_empty() && self.scenarios.iter().any(|row| row.rounds > 0)
    }

    /// For people: the failures, then the table.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for failure in &self.failures {
            let Failure {
                round,
                scenario,
                seed,
                error,
                logs,
                ..
            } = failure;
            // Writing into a string does not fail.
            let _ = writeln!(
                text,
                "round {round}: {scenario} FAILED with --seed {seed} (logs: {})\n    {}",
                logs.display(),
                error.replace('\n', "\n    ")
            );
        }
        let _ = writeln!(
            text,
            "\n{:<28} {:>7} {:>7} {:>7} {:>9} {:>6} {:>8}",
            "scenario", "rounds", "passed", "failed", "warnings", "hangs", "seconds"
        );
        let mut all = Row {
            scenario: "all".into(),
            ..Row::default()
        };
        for row in &self.scenarios {
            text += &row.line();
            all.rounds += row.rounds;
            all.passed += row.passed;
            all.failed += row.failed;
            all.kernel_warnings += row.kernel_warnings;
            all.hangs += row.hangs;
            all.seconds += row.seconds;
        }
        text += &all.line();
        let _ = write!(
            text,
            "{}{:.1} of {} minutes, --seed {}, {}",
            if self.interrupted { "interrupted: " } else { "" },
            self.seconds / 60.0,
            self.minutes,
            self.seed,
            self.folder.join("result.json").display()
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Tally;
    use crate::error::Error;
    use crate::report::Outcome;
    use crate::soak::schedule::Turn;

    #[test]
    fn failures_are_counted_by_kind_and_named_with_their_seed() {
        let folder = tempfile::tempdir().unwrap();
        let mut tally = Tally::new(5, 1, folder.path(), vec!["a".into(), "b".into()]);
        assert!(!tally.good());
        let time = Duration::from_secs(10);
        let late = Error::TimeOut {
            what: "the end".into(),
            seconds: 9,
        };
        let warned = Error::Kernel {
            guest: "guest 1".into(),
            line: "BUG: x".into(),
            console: "/c".into(),
        };
        let results = [Ok(()), Err(Error::check("no")), Err(late), Err(warned)];
        for (round, result) in (1..).zip(results) {
            let turn = Turn {
                round,
                job: 0,
                seed: 70 + round,
            };
            let outcome = Outcome::new("a-single-6.12", &result, time, time, vec![]);
            tally
                .count(turn, &outcome, folder.path(), time * round as u32)
                .unwrap();
            assert_eq!(tally.good(), round == 1);
        }
        tally.interrupt().unwrap();
        let text = tally.text();
        assert!(
            text.contains("round 3: a-single-6.12 FAILED with --seed 73"),
            "{text}"
        );
        let cells = |name: &str| -> Vec<String> {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} ")));
            line.unwrap()
                .split_whitespace()
                .skip(1)
                .map(str::to_owned)
                .collect()
        };
        assert_eq!(cells("a"), ["4", "1", "3", "1", "1", "40"]);
        assert_eq!(cells("b"), ["0", "0", "0", "0", "0", "0"]);
        assert_eq!(cells("all"), cells("a"));
        let saved = std::fs::read_to_string(folder.path().join("result.json")).unwrap();
        let saved: serde_json::Value = serde_json::from_str(&saved).unwrap();
        assert_eq!(saved["failures"][1]["trouble"], "hang");
        assert_eq!(saved["interrupted"], true);
    }
}
