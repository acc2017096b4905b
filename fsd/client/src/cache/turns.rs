//! Mounts that change names in one directory take turns: each keeps the exclusive lease for a while as long as it goes on changing names,
//! instead of passing it on after each. Pure.
//!
//! Moving the lease costs some five messages and what is written back; a change under it costs none. How long a turn lasts is a matter of
//! what others wait for, and of how long moving the lease takes: [`Pace`]. A mount that has changed fewer than two names by the first look would
//! have others wait for nothing: it gives the lease up then, and keeps it no longer than it must for the next turns, twice as many each time
//! that a turn was in vain.

use rt::time::Instant;
use std::time::Duration;

/// The lease was lost to others, and names were changed here, so short a time ago: mounts take turns.
const CONTENDED: Duration = Duration::from_millis(200);
/// When it is first looked whether names are being changed, at the least and at the most: whoever gets the lease may have to ask the server
/// first what others have changed.
const FIRST_LOOK: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(8));
/// Most turns that are left out before another one is tried.
const MOST_LEFT_OUT: u32 = 16;

/// How long turns last. Where messages take long, one change takes long, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pace {
    /// When it is first looked whether names are being changed.
    first: Duration,
}

impl Pace {
    /// Where the lease was back after this time, when it came back the soonest.
    fn of(soonest: Option<Duration>) -> Self {
        let (least, most) = FIRST_LOOK;
        Self {
            first: soonest.unwrap_or(least).clamp(least, most),
        }
    }

    /// How often it is looked after the first time.
    fn look(self) -> Duration {
        self.first / 2
    }

    /// Longest turn.
    fn longest(self) -> Duration {
        self.first * 4
    }
}

/// What is known of the turns in one directory.
#[derive(Debug, Default)]
pub struct Turns {
    /// When the lease was last given up to somebody who wanted it exclusively: not to one who only looks.
    lost: Option<Instant>,
    /// The shortest time between that and when the lease was here again, since mounts take turns.
    soonest: Option<Duration>,
    /// When a name was last changed here.
    changed: Option<Instant>,
    /// Changes here.
    changes: u64,
    /// How many there were when it was last looked.
    seen: u64,
    /// Turns that are left out next time one is in vain.
    penalty: u32,
    /// Turns still to be left out.
    left_out: u32,
}

impl Turns {
    /// A name is being changed here.
    pub fn change(&mut self, now: Instant) {
        self.changed = Some(now);
        self.changes += 1;
    }

    /// Somebody else has asked for the exclusive lease, and gets it.
    pub fn lose(&mut self, now: Instant) {
        self.lost = Some(now);
    }

    /// Do mounts take turns here, of which this one is likely to change more?
    #[must_use]
    pub fn is_contended(&self, now: Instant) -> bool {
        let lately = |at: Option<Instant>| at.is_some_and(|at| now.saturating_duration_since(at) < CONTENDED);
        lately(self.lost) && lately(self.changed)
    }

    /// The exclusive lease is here, since so long: how much longer it is kept whoever asks for it.
    pub fn keep(&mut self, now: Instant, since: Duration) -> Duration {
        let changes = self.changes - std::mem::replace(&mut self.seen, self.changes);
        if since.is_zero() {
            return self.begin(now);
        }
        let pace = Pace::of(self.soonest);
        if since < pace.first + pace.look() && changes < 2 {
            self.penalty = (self.penalty * 2).clamp(1, MOST_LEFT_OUT);
            self.left_out = self.penalty;
            return Duration::ZERO;
        }
        self.penalty = 0;
        if changes == 0 || since + pace.look() > pace.longest() {
            return Duration::ZERO;
        }
        pace.look()
    }

    fn begin(&mut self, now: Instant) -> Duration {
        if !self.is_contended(now) {
            self.soonest = None;
            return Duration::ZERO;
        }
        if let Some(lost) = self.lost {
            let away = now.saturating_duration_since(lost);
            self.soonest = Some(self.soonest.map_or(away, |soonest| soonest.min(away)));
        }
        if self.left_out > 0 {
            self.left_out -= 1;
            return Duration::ZERO;
        }
        Pace::of(self.soonest).first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shortest turns there are.
    const SHORT: Pace = Pace { first: FIRST_LOOK.0 };

    /// A mount that has just changed a name, and lost the lease to another one.
    fn contended(now: Instant) -> Turns {
        let mut turns = Turns::default();
        turns.change(now);
        turns.lose(now);
        turns
    }

    #[test]
    fn who_changes_names_keeps_the_lease_for_a_while() {
        let mut now = Instant::now();
        let mut turns = contended(now);
        assert!(turns.is_contended(now));
        let mut since = Duration::ZERO;
        loop {
            let keep = turns.keep(now, since);
            if keep.is_zero() {
                break;
            }
            now += keep;
            since += keep;
            (0..3).for_each(|_| turns.change(now));
        }
        assert_eq!(since, SHORT.longest());
    }

    #[test]
    fn who_has_done_gives_it_up() {
        let now = Instant::now();
        let mut turns = contended(now);
        assert_eq!(turns.keep(now, Duration::ZERO), SHORT.first);
        (0..3).for_each(|_| turns.change(now));
        assert_eq!(turns.keep(now, SHORT.first), SHORT.look());
        turns.change(now);
        assert_eq!(turns.keep(now, SHORT.first + SHORT.look()), SHORT.look());
        assert!(turns.keep(now, SHORT.first + SHORT.look() * 2).is_zero());
        assert_eq!(
            turns.keep(now, Duration::ZERO),
            SHORT.first,
            "and may have another turn"
        );
    }

    #[test]
    fn where_nobody_else_changes_names_nothing_is_kept() {
        let now = Instant::now();
        let mut turns = Turns::default();
        turns.change(now);
        assert!(turns.keep(now, Duration::ZERO).is_zero());
        turns.lose(now);
        let later = now + CONTENDED;
        assert!(!turns.is_contended(later) && turns.keep(later, Duration::ZERO).is_zero());
    }

    /// Of two that wait for each other's names each changes one, and then waits.
    #[test]
    fn who_changes_one_name_a_turn_mostly_gives_it_up_at_once() {
        let now = Instant::now();
        let mut turns = contended(now);
        let mut kept = 0;
        for _ in 0..100 {
            if !turns.keep(now, Duration::ZERO).is_zero() {
                kept += 1;
                turns.change(now);
                assert!(turns.keep(now, SHORT.first).is_zero());
            }
            turns.change(now);
        }
        assert!((5..12).contains(&kept), "{kept} turns of 100");
    }

    #[test]
    fn where_moving_the_lease_takes_long_turns_do_as_well() {
        let began = Instant::now();
        let mut turns = contended(began);
        let away =
            |turns: &mut Turns, millis| turns.keep(began + Duration::from_millis(millis), Duration::ZERO);
        assert_eq!(away(&mut turns, 6), Duration::from_millis(6));
        let pace = Pace::of(Some(Duration::from_millis(6)));
        assert_eq!((pace.look().as_millis(), pace.longest().as_millis()), (3, 24));
        // What others do meanwhile makes it no longer: the soonest counts, as long as mounts take turns.
        assert_eq!(away(&mut turns, 40), Duration::from_millis(6));
        assert_eq!(away(&mut turns, 3), Duration::from_millis(3));
        turns.lose(began + CONTENDED * 2);
        turns.change(began + CONTENDED * 3);
        assert_eq!(away(&mut turns, 620), Duration::ZERO, "not contended");
        turns.lose(began + Duration::from_millis(620));
        assert_eq!(away(&mut turns, 720), FIRST_LOOK.1, "at the most");
    }
}
