//! Groups of threads: simulated processes, which can be stopped for a while, and whose clocks may go at rates of their own.

use std::collections::{BTreeMap, BTreeSet};

use super::task::{Task, TaskId};

/// Parts of a million.
const MILLION: i128 = 1_000_000;

/// What a clock shows when so much time has passed; it gains so many parts of a million.
pub(super) fn shown(time: u64, rate: i64) -> u64 {
    if rate == 0 {
        return time;
    }
    let gained = (i128::from(time) * i128::from(rate)).div_euclid(MILLION);
    u64::try_from(i128::from(time) + gained).unwrap_or(0)
}

/// When a clock of that rate first shows so much.
pub(super) fn when(shows: u64, rate: i64) -> u64 {
    if rate == 0 {
        return shows;
    }
    let about = i128::from(shows) * MILLION / (MILLION + i128::from(rate).max(1 - MILLION));
    let mut time = u64::try_from(about).unwrap_or(u64::MAX).saturating_sub(1);
    while shown(time, rate) < shows && time < u64::MAX {
        time += 1;
    }
    time
}

/// What there is to know of groups.
#[derive(Default)]
pub(super) struct Groups {
    stopped: BTreeSet<u32>,
    /// Threads of those that would run.
    parked: Vec<TaskId>,
    rates: BTreeMap<u32, i64>,
}

impl Groups {
    /// May a thread run? If not, it is kept until its group goes on.
    pub(super) fn admits(&mut self, id: TaskId, task: &Task) -> bool {
        let waits = self.is_stopped(task);
        if waits {
            self.parked.push(id);
        }
        !waits
    }

    /// A thread that is killed ends also where its group is stopped.
    pub(super) fn is_stopped(&self, task: &Task) -> bool {
        !task.killed && self.stopped.contains(&task.group)
    }

    pub(super) fn stop(&mut self, group: u32) {
        self.stopped.insert(group);
    }

    pub(super) fn go_on(&mut self, group: u32) {
        self.stopped.remove(&group);
    }

    /// Those that were kept and may run now.
    pub(super) fn released(&mut self, tasks: &[Task]) -> Vec<TaskId> {
        let parked = std::mem::take(&mut self.parked);
        let (still, free) = parked.into_iter().partition(|id| self.is_stopped(&tasks[*id]));
        self.parked = still;
        free
    }

    /// By how many parts of a million the clock of a group is too fast.
    pub(super) fn rate(&self, group: u32) -> i64 {
        self.rates.get(&group).copied().unwrap_or(0)
    }

    pub(super) fn set_rate(&mut self, group: u32, rate: i64) {
        self.rates.insert(group, rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_comes_when_the_clock_shows_it() {
        for rate in [-500_000, -10_000, -1, 0, 1, 10_000, 500_000] {
            for shows in [0, 1, 999, 1_000_000, 12_345_678_901, 3_600_000_000_000] {
                let time = when(shows, rate);
                assert!(shown(time, rate) >= shows, "{rate} {shows}");
                assert!(time == 0 || shown(time - 1, rate) < shows, "{rate} {shows}");
            }
        }
        assert_eq!(shown(1_000_000_000, 10_000), 1_010_000_000);
        assert_eq!(shown(1_000_000_000, -10_000), 990_000_000);
    }
}
