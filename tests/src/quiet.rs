//! How long something took, without the time in which this machine was busy: a limit that only what is slow by itself goes beyond.
//!
//! The kernel says for how long somebody has waited for a processor or a disk (`/proc/pressure`). Where it does not, only [`LONGEST`] counts.

use std::time::{Duration, Instant};

use anyhow::ensure;

/// Longest time of anything, however busy the machine is: longer than any other wait of the tests' clusters.
pub const LONGEST: Duration = Duration::from_secs(40);
/// Pause while something is awaited.
const PAUSE: Duration = Duration::from_millis(20);

/// Since when somebody waits.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    start: Instant,
    busy: Option<Duration>,
}

/// How long somebody has waited for a processor, and for a disk, since the machine was started.
fn busy() -> Option<Duration> {
    let of = |what: &str| total(&std::fs::read_to_string(format!("/proc/pressure/{what}")).ok()?);
    Some(of("cpu")? + of("io")?)
}

fn total(pressure: &str) -> Option<Duration> {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = some.split(' ').find_map(|field| field.strip_prefix("total="))?;
    Some(Duration::from_micros(total.parse().ok()?))
}

fn quiet(all: Duration, before: Option<Duration>, after: Option<Duration>) -> Duration {
    match (before, after) {
        (Some(before), Some(after)) => all.saturating_sub(after.saturating_sub(before)),
        _ => Duration::ZERO,
    }
}

impl Stopwatch {
    /// From now on.
    #[must_use]
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            busy: busy(),
        }
    }

    /// The time since.
    #[must_use]
    pub fn all(&self) -> Duration {
        self.start.elapsed()
    }

    /// That of it in which nobody waited for a processor or a disk.
    #[must_use]
    pub fn quiet(&self) -> Duration {
        // What was waited for between the two looks does not make it longer.
        quiet(self.all(), self.busy, busy())
    }

    /// It has not taken longer than this.
    ///
    /// # Errors
    /// It has.
    pub fn within(&self, limit: Duration, what: &str) -> anyhow::Result<()> {
        let (quiet, all) = (self.quiet(), self.all());
        ensure!(
            quiet < limit && all < LONGEST.max(limit),
            "{what} took {all:?}, {quiet:?} of it while the machine was not busy; the limit is {limit:?}"
        );
        Ok(())
    }

    /// Waits until something holds.
    ///
    /// # Errors
    /// It does not within the limit, or cannot be looked at.
    pub fn until(
        &self,
        what: &str,
        limit: Duration,
        mut holds: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        while !holds()? {
            self.within(limit, what)?;
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read() {
        let text = "some avg10=98.93 avg60=98.02 avg300=82.06 total=598763714\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        assert_eq!(total(text), Some(Duration::from_micros(598_763_714)));
        assert_eq!(total("full avg10=0.00 avg60=0.00 avg300=0.00 total=7\n"), None);
        assert_eq!(total(""), None);
    }

    #[test]
    fn what_a_busy_machine_takes_does_not_count() {
        let seconds = |n| Duration::from_secs(n);
        assert_eq!(quiet(seconds(9), Some(seconds(5)), Some(seconds(5))), seconds(9));
        assert_eq!(quiet(seconds(9), Some(seconds(5)), Some(seconds(12))), seconds(2));
        assert_eq!(quiet(seconds(9), Some(seconds(5)), Some(seconds(25))), seconds(0));
        assert_eq!(quiet(seconds(9), None, None), seconds(0));
    }
}
