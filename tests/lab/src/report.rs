//! What came of a set of runs.

use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use crate::error::{At, Error, Result, Trouble};

/// What came of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// Scenario, tier and kernel.
    pub name: String,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// Of what kind that is.
    pub trouble: Option<Trouble>,
    /// How long it took in all, in seconds.
    pub seconds: f64,
    /// How long of that the cluster took to come up.
    pub boot_seconds: f64,
    /// What else is to be told.
    pub notes: Vec<String>,
}

impl Outcome {
    /// From the result of a run.
    pub fn new(
        name: &str,
        result: &Result<()>,
        whole: Duration,
        boot: Duration,
        notes: Vec<String>,
    ) -> Outcome {
        Outcome {
            name: name.to_owned(),
            error: result.as_ref().err().map(Error::to_string),
            trouble: result.as_ref().err().map(Error::trouble),
            seconds: whole.as_secs_f64(),
            boot_seconds: boot.as_secs_f64(),
            notes,
        }
    }

    /// In a line, or a few where it failed.
    pub fn line(&self) -> String {
        let verdict = if self.error.is_some() { "FAILED" } else { "passed" };
        let times = format!(
            "{:6.1} s, {:.1} s of it to come up",
            self.seconds, self.boot_seconds
        );
        let error = self.error.as_ref().map_or(String::new(), |error| {
            format!("\n    {}", error.replace('\n', "\n    "))
        });
        format!("{:<28} {verdict} in {times}{error}", self.name)
    }

    /// Writes it down in the folder of its logs.
    ///
    /// # Errors
    /// That cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        save(self, folder)
    }
}

/// Writes down what came of something, as `result.json` in the folder of its logs.
///
/// # Errors
/// That cannot be written.
pub fn save(result: &impl Serialize, folder: &Path) -> Result<()> {
    let path = folder.join("result.json");
    let text = serde_json::to_string_pretty(result)
        .map_err(|error| Error::check(format!("a result cannot be written as JSON: {error}")))?;
    fs::create_dir_all(folder).at(|| format!("make the folder {}", folder.display()))?;
    fs::write(&path, text).at(|| format!("write {}", path.display()))
}

/// All outcomes; the last line counts them.
pub fn summary(outcomes: &[Outcome]) -> String {
    let failed = outcomes.iter().filter(|outcome| outcome.error.is_some()).count();
    let lines: String = outcomes.iter().map(|outcome| outcome.line() + "\n").collect();
    format!("{lines}{} passed, {failed} failed", outcomes.len() - failed)
}

#[cfg(test)]
mod tests {
    use super::{Outcome, summary};
    use crate::error::Error;
    use std::time::Duration;

    #[test]
    fn the_last_line_counts() {
        let time = Duration::from_millis(1500);
        let good = Outcome::new("devices-single-6.12", &Ok(()), time, time, vec![]);
        let bad = Outcome::new(
            "faults-multi-6.1",
            &Err(Error::check("it broke\ntwice")),
            time,
            time,
            vec![],
        );
        let text = summary(&[good, bad]);
        assert!(text.ends_with("\n1 passed, 1 failed"));
        assert!(text.contains("faults-multi-6.1             FAILED in    1.5 s, 1.5 s of it to come up\n    it broke\n    twice\n"));
    }
}
