//! What reads have brought into a stock kernel's page cache since that was emptied for another mount's sake.
//!
//! Through its page cache such a kernel takes a write before the daemon hears of it. A revocation may drop those pages, and a read
//! bring them back as they were, before the write has got its lease: then they are old as soon as it is answered, and are dropped once
//! more before that.

use rt::sync::Mutex;

/// Nobody is kept waiting for a lease longer than this, nanoseconds: what was emptied before a write came by more does not matter to it.
const LATE: u64 = 60_000_000_000;
/// Ranges that are kept apart.
const MOST: usize = 32;

#[derive(Debug, Clone, Copy)]
struct Range {
    from: u64,
    end: u64,
    /// When it was last brought, in the order of reads.
    number: u64,
}

#[derive(Debug, Default)]
struct State {
    emptied: Option<u64>,
    ranges: Vec<Range>,
    number: u64,
}

impl State {
    fn emptied_lately(&self, came: u64) -> bool {
        self.emptied.is_some_and(|at| at.saturating_add(LATE) > came)
    }
}

/// What reads have brought into the page cache since it was emptied.
#[derive(Debug, Default)]
pub struct Refills(Mutex<State>);

impl Refills {
    /// The page cache is about to be emptied, at a time in nanoseconds. The number for [`Refills::dropped`], when that is done: until then
    /// what was read before is still there.
    pub fn emptying(&self, now: u64) -> u64 {
        let mut state = self.0.lock();
        state.emptied = Some(now);
        state.number
    }

    /// A read is answered that fills these pages.
    pub fn filled(&self, offset: u64, len: u64) {
        let mut state = self.0.lock();
        if state.emptied.is_none() {
            return;
        }
        state.number += 1;
        let new = Range {
            from: offset,
            end: offset.saturating_add(len),
            number: state.number,
        };
        state.ranges.retain(|r| r.from < new.from || r.end > new.end);
        state.ranges.push(new);
        if state.ranges.len() > MOST {
            let all = state.ranges.iter().fold(new, |all, r| Range {
                from: all.from.min(r.from),
                end: all.end.max(r.end),
                number: new.number,
            });
            state.ranges = vec![all];
        }
    }

    /// Was it emptied since a write that came at a time may have begun?
    #[must_use]
    pub fn emptied_lately(&self, came: u64) -> bool {
        self.0.lock().emptied_lately(came)
    }

    /// May a write that came at a time find old pages there? Then the number for [`Refills::dropped`].
    #[must_use]
    pub fn may_be_old(&self, came: u64, offset: u64, len: u64) -> Option<u64> {
        let state = self.0.lock();
        let end = offset.saturating_add(len);
        let meets = state.ranges.iter().any(|r| r.from < end && offset < r.end);
        (meets && state.emptied_lately(came)).then_some(state.number)
    }

    /// What was there of these pages at that number is dropped.
    pub fn dropped(&self, number: u64, offset: u64, len: u64) {
        let end = offset.saturating_add(len);
        let within = |r: &Range| r.from >= offset && r.end <= end && r.number <= number;
        self.0.lock().ranges.retain(|r| !within(r));
    }
}

#[cfg(test)]
mod tests {
    use super::{LATE, MOST, Refills};

    #[test]
    fn what_was_read_after_pages_were_dropped_may_be_old() {
        let refills = Refills::default();
        refills.filled(0, 4096);
        assert_eq!(refills.may_be_old(5, 0, 10), None, "never emptied");
        assert_eq!(refills.emptying(10), 0);
        assert_eq!(refills.may_be_old(11, 0, 10), None, "nothing read since");
        refills.filled(4096, 8192);
        assert_eq!(refills.may_be_old(11, 0, 4096), None);
        let number = refills.may_be_old(11, 0, 4097).unwrap();
        assert_eq!(refills.may_be_old(11 + LATE, 0, 4097), None);
        // Read again meanwhile: that may be old for a write that came meanwhile.
        refills.filled(4096, 8192);
        refills.dropped(number, 0, 1 << 20);
        let number = refills.may_be_old(12, 4096, 1).unwrap();
        refills.dropped(number, 0, 1 << 20);
        assert_eq!(refills.may_be_old(12, 4096, 1), None);
        // Emptied again: what was read before is there until that is done, what is read meanwhile stays.
        refills.filled(0, 4096);
        let number = refills.emptying(20);
        refills.filled(4096, 4096);
        assert!(refills.may_be_old(21, 0, 1).is_some());
        refills.dropped(number, 0, u64::MAX);
        assert_eq!(refills.may_be_old(21, 0, 1), None);
        assert!(refills.may_be_old(21, 4096, 1).is_some());
    }

    #[test]
    fn many_ranges_become_one() {
        let refills = Refills::default();
        assert_eq!(refills.emptying(1), 0);
        (0..=MOST as u64).for_each(|n| refills.filled(n * 8192, 4096));
        assert!(refills.may_be_old(1, 4096, 4096).is_some());
    }
}
