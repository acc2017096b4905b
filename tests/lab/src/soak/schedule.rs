//! What a soak runs when: pure, so that it can be tried without waiting.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// One run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// In which round, from 1.
    pub round: u64,
    /// Which of the jobs.
    pub job: usize,
    /// What its tests draw their random numbers from.
    pub seed: u64,
}

/// The order of jobs, round after round.
#[derive(Debug)]
pub struct Schedule {
    seed: u64,
    time: Duration,
    /// How long each takes: as expected, until one has passed.
    takes: Vec<Duration>,
    measured: Vec<bool>,
    round: u64,
    left: Vec<usize>,
    begun: bool,
}

/// Numbers of a round, or of one job in it: the same for a seed whatever there was time for before.
fn numbers(seed: u64, round: u64, job: u64) -> StdRng {
    let mut bytes = [0; 32];
    for (to, number) in bytes.chunks_exact_mut(8).zip([seed, round, job]) {
        to.copy_from_slice(&number.to_le_bytes());
    }
    StdRng::from_seed(bytes)
}

impl Schedule {
    /// For jobs of which each is expected to take so long.
    pub fn new(seed: u64, time: Duration, takes: Vec<Duration>) -> Schedule {
        Schedule {
            seed,
            time,
            measured: vec![false; takes.len()],
            takes,
            round: 0,
            left: Vec::new(),
            begun: false,
        }
    }

    /// What to run next, after so much time. Jobs that would end too late are left out, but the very first: a soak that has
    /// run nothing says nothing.
    pub fn next(&mut self, elapsed: Duration) -> Option<Turn> {
        // What of this round does not fit any more keeps nothing of the next from being run that does.
        for _ in 0..2 {
            let fits = |job: &usize| {
                !self.begun
                    || self
                        .takes
                        .get(*job)
                        .is_some_and(|takes| elapsed + *takes <= self.time)
            };
            if let Some(at) = self.left.iter().position(fits) {
                let job = self.left.remove(at);
                self.begun = true;
                return Some(Turn {
                    round: self.round,
                    job,
                    seed: numbers(self.seed, self.round, job as u64 + 1).random(),
                });
            }
            self.round += 1;
            self.left = (0..self.takes.len()).collect();
            self.left.shuffle(&mut numbers(self.seed, self.round, 0));
        }
        None
    }

    /// A job passed in so much time. Those that failed say nothing: one that hangs takes all that it is given.
    pub fn passed(&mut self, job: usize, time: Duration) {
        if let (Some(takes), Some(measured)) = (self.takes.get_mut(job), self.measured.get_mut(job)) {
            *takes = if *measured { time.max(*takes) } else { time };
            *measured = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Schedule, Turn};

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Plays a soak in which jobs take what they are expected to.
    fn play(seed: u64, time: u64, takes: &[u64]) -> (Vec<Turn>, u64) {
        let mut schedule = Schedule::new(seed, seconds(time), takes.iter().map(|s| seconds(*s)).collect());
        let (mut turns, mut now) = (Vec::new(), 0);
        while let Some(turn) = schedule.next(seconds(now)) {
            now += takes[turn.job];
            schedule.passed(turn.job, seconds(takes[turn.job]));
            turns.push(turn);
        }
        (turns, now)
    }

    #[test]
    fn every_round_has_every_job_once_in_an_order_of_its_own() {
        let (turns, end) = play(1, 1000, &[10; 5]);
        assert_eq!((turns.len(), end), (100, 1000));
        let mut orders = Vec::new();
        for (round, of_it) in (1..).zip(turns.chunks(5)) {
            assert!(of_it.iter().all(|turn| turn.round == round));
            let order: Vec<_> = of_it.iter().map(|turn| turn.job).collect();
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            orders.push(order);
        }
        orders.dedup();
        assert!(orders.len() > 10);
        let mut seeds: Vec<_> = turns.iter().map(|turn| turn.seed).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 100);
    }

    #[test]
    fn the_same_seed_gives_the_same_soak() {
        assert_eq!(play(7, 500, &[10, 20, 30]), play(7, 500, &[10, 20, 30]));
        assert_ne!(play(7, 500, &[10, 20, 30]), play(8, 500, &[10, 20, 30]));
        // Also where there was time for less: what is run in a round has the same seeds.
        let (long, _) = play(7, 500, &[10, 20, 30]);
        assert!(
            play(7, 100, &[10, 20, 30])
                .0
                .iter()
                .all(|turn| long.contains(turn))
        );
    }

    #[test]
    fn nothing_is_begun_that_would_end_too_late() {
        for seed in 0..50 {
            let (turns, end) = play(seed, 100, &[60, 15]);
            assert!(end <= 100, "{turns:?}");
            // The long one once, and what is left for the short one, in whatever round.
            assert_eq!(turns.iter().filter(|turn| turn.job == 0).count(), 1, "{turns:?}");
            assert_eq!(turns.iter().filter(|turn| turn.job == 1).count(), 2, "{turns:?}");
        }
    }

    #[test]
    fn something_is_run_in_any_case() {
        assert_eq!(play(1, 5, &[60, 60]).0.len(), 1);
        assert_eq!(play(1, 5, &[]).0.len(), 0);
    }

    #[test]
    fn what_was_measured_counts_instead_of_what_was_expected() {
        let mut schedule = Schedule::new(1, seconds(100), vec![seconds(60)]);
        assert!(schedule.next(seconds(0)).is_some());
        schedule.passed(0, seconds(30));
        assert!(schedule.next(seconds(70)).is_some());
        schedule.passed(0, seconds(20));
        assert!(schedule.next(seconds(75)).is_none());
    }
}
