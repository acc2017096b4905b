//! Finding out that this server itself was stopped for a while, so that it takes nobody for dead whom it could not hear.

use std::time::Duration;

use rt::time::Instant;

use fsd_proto::wire::Terms;

/// Looks at the mounts at regular times, and finds out when it was late.
pub struct Pulse {
    last: Instant,
    period: Duration,
    /// So much later than it should be is no pause.
    slack: Duration,
}

impl Pulse {
    /// For these terms.
    pub fn new(terms: Terms) -> Self {
        let slack = Duration::from_millis(terms.margin_ms / 3).min(Duration::from_secs(1));
        Self {
            last: Instant::now(),
            period: (slack / 2).max(Duration::from_millis(10)),
            slack,
        }
    }

    /// Between two beats.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// It beats; how long it had stopped before, if it had.
    pub fn beat(&mut self, now: Instant) -> Option<Duration> {
        let gap = now.saturating_duration_since(self.last);
        self.last = now;
        (gap > self.period + self.slack).then_some(gap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_is_noticed_and_a_small_delay_is_none() {
        let mut pulse = Pulse::new(Terms {
            term_ms: 10_000,
            margin_ms: 1_500,
            heartbeat_ms: 1_000,
        });
        let (t, period) = (pulse.last, pulse.period());
        assert_eq!(pulse.beat(t + period), None);
        assert_eq!(pulse.beat(t + period * 3), None);
        let pause = Duration::from_secs(30);
        assert_eq!(pulse.beat(t + period * 3 + pause), Some(pause));
        assert_eq!(pulse.beat(t + period * 4 + pause), None);
    }
}
