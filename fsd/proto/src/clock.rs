//! How far two nodes' clocks are apart, as far as messages can tell.
//!
//! Leases know no time, and time limits are those of one node's own monotonic clock. What clocks that are apart do harm to are the times of
//! files, which come from the mounts: they would run backwards where a file goes from one mount to another.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::time::Time;

/// Mounts whose clock is certainly further from the metadata server's than this are not let in.
pub const MOST_APART: Duration = Duration::from_secs(2);

fn nanos(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX)
}

/// Bounds of how far the metadata server's clock is ahead of a mount's, in nanoseconds; negative where it is behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skew {
    /// It is ahead by at least so much,
    pub least: i64,
    /// and by at most so much.
    pub most: i64,
}

/// What [`MOST_APART`] says to a skew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Certainly within it.
    Close,
    /// It cannot be told: the exchanges took too long.
    Unsure,
    /// Certainly beyond it.
    Apart,
}

impl Skew {
    /// Nothing is known.
    pub const UNKNOWN: Self = Self {
        least: i64::MIN,
        most: i64::MAX,
    };

    /// By an exchange: `theirs` was read at some time between `sent`, by this node's clock, and the answer's coming `took` later.
    #[must_use]
    pub fn of_exchange(sent: Time, theirs: Time, took: Duration) -> Self {
        let most = theirs.0.saturating_sub(sent.0);
        Self {
            least: most.saturating_sub(nanos(took)),
            most,
        }
    }

    /// By this and a later exchange. Where they contradict each other a clock was set meanwhile, and the later one counts.
    #[must_use]
    pub fn and(self, later: Self) -> Self {
        let both = Self {
            least: self.least.max(later.least),
            most: self.most.min(later.most),
        };
        if both.least <= both.most { both } else { later }
    }

    /// How far the server's clock is ahead, as well as it is known, nanoseconds; 0 where it may be nothing, or is known too badly.
    #[must_use]
    pub fn estimate(self) -> i64 {
        let known = self.verdict() == Verdict::Close && (self.least > 0 || self.most < 0);
        if known { self.least.midpoint(self.most) } else { 0 }
    }

    /// Whether the clocks are close enough.
    #[must_use]
    pub fn verdict(self) -> Verdict {
        let limit = nanos(MOST_APART);
        if self.least > limit || self.most < -limit {
            Verdict::Apart
        } else if self.least >= -limit && self.most <= limit {
            Verdict::Close
        } else {
            Verdict::Unsure
        }
    }
}

/// Where the mount's clock is, seen from the metadata server's.
impl std::fmt::Display for Skew {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let millis = |nanos: i64| nanos.unsigned_abs() / 1_000_000;
        let Self { least, most } = *self;
        if least > 0 {
            write!(f, "{} to {} ms behind", millis(least), millis(most))
        } else if most < 0 {
            write!(f, "{} to {} ms ahead of", millis(most), millis(least))
        } else {
            write!(
                f,
                "at most {} ms behind or {} ms ahead of",
                millis(most),
                millis(least)
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Skew, Verdict};
    use crate::time::Time;

    const MS: i64 = 1_000_000;

    #[test]
    fn what_is_missing_is_added() {
        // 700 ms ahead, as an exchange of 10 ms tells.
        let known = exchange(700, 6, 4);
        assert!((known.estimate() - 700 * MS).abs() <= 5 * MS);
        assert!((exchange(-700, 5, 5).estimate() + 700 * MS).abs() <= 5 * MS);
        // Perhaps nothing, and by more than would be let in.
        assert_eq!(exchange(3, 10, 10).estimate(), 0);
        assert_eq!(exchange(5000, 1, 1).estimate(), 0);
        assert_eq!(Skew::UNKNOWN.estimate(), 0);
    }

    /// An exchange with a server whose clock is ahead by this, in milliseconds: the way there, and the way back.
    fn exchange(ahead: i64, there: i64, back: i64) -> Skew {
        let sent = 1_700_000_000_000;
        let took = Duration::from_millis((there + back) as u64);
        Skew::of_exchange(Time(sent * MS), Time((sent + ahead + there) * MS), took)
    }

    #[test]
    fn the_true_skew_is_within_the_bounds_wherever_the_time_went() {
        for ahead in [-5000, -2001, -2000, -10, 0, 10, 2000, 2001, 5000] {
            for (there, back) in [(0, 0), (1, 1), (0, 4389), (4389, 0), (3000, 3000)] {
                let skew = exchange(ahead, there, back);
                assert!((skew.least..=skew.most).contains(&(ahead * MS)), "{skew:?}");
            }
        }
    }

    #[test]
    fn short_exchanges_tell() {
        for (ahead, verdict) in [
            (0, Verdict::Close),
            (1990, Verdict::Close),
            (-1990, Verdict::Close),
            (1999, Verdict::Unsure),
            (-1999, Verdict::Unsure),
            (2010, Verdict::Apart),
            (-2010, Verdict::Apart),
            (3_600_000, Verdict::Apart),
        ] {
            assert_eq!(exchange(ahead, 2, 2).verdict(), verdict, "{ahead}");
        }
    }

    #[test]
    fn a_slow_answer_is_no_wrong_clock() {
        assert_eq!(exchange(0, 4389, 0).verdict(), Verdict::Unsure);
        assert_eq!(exchange(0, 0, 4389).verdict(), Verdict::Unsure);
        // Nor does it hide one.
        assert_eq!(exchange(60_000, 4389, 4389).verdict(), Verdict::Apart);
        assert_eq!(exchange(-60_000, 4389, 4389).verdict(), Verdict::Apart);
        assert_eq!(Skew::UNKNOWN.verdict(), Verdict::Unsure);
    }

    #[test]
    fn exchanges_add_up() {
        assert_eq!(Skew::UNKNOWN.and(exchange(0, 1, 1)), exchange(0, 1, 1));
        // One was slow on the way there, the other on the way back: together they tell.
        let both = exchange(0, 4000, 10).and(exchange(0, 10, 4000));
        assert_eq!((both.least, both.most), (-10 * MS, 10 * MS));
        // A clock was set in between.
        assert_eq!(exchange(60_000, 1, 1).and(exchange(0, 1, 1)), exchange(0, 1, 1));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let far = Skew::of_exchange(Time(i64::MIN), Time(i64::MAX), Duration::MAX);
        assert_eq!(far.and(Skew::UNKNOWN).verdict(), Verdict::Unsure);
        assert!(!Skew::UNKNOWN.to_string().is_empty());
    }

    #[test]
    fn it_is_said_from_the_mount_s_side() {
        assert_eq!(exchange(5000, 3, 4).to_string(), "4996 to 5003 ms behind");
        assert_eq!(exchange(-5000, 3, 4).to_string(), "4997 to 5004 ms ahead of");
        assert_eq!(
            exchange(0, 3, 4).to_string(),
            "at most 3 ms behind or 4 ms ahead of"
        );
    }
}
