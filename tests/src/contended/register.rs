//! What may be read of a place that many tasks write to: each place is a register of its own.
//!
//! A read may return a write that had begun when the read ended, unless another write of the same place began after that one
//! had ended and ended before the read began. So an acknowledged write that is lost, or a stale read, has no write that
//! explains it.

use std::collections::HashMap;

/// An operation, from before its call to after its return, on a clock that all tasks share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Before the call.
    pub start: u64,
    /// After the return.
    pub end: u64,
}

/// What was written to places, each `size` long, from `first` on.
#[derive(Debug, Clone, Copy)]
pub struct Write {
    /// The first place.
    pub first: usize,
    /// The place behind the last.
    pub end: usize,
    /// What all of them then held; 0: zeros.
    pub stamp: u64,
    /// When.
    pub span: Span,
}

/// What was found at a place.
#[derive(Debug, Clone, Copy)]
pub struct Read {
    /// The place.
    pub place: usize,
    /// What was there.
    pub stamp: u64,
    /// When.
    pub span: Span,
}

/// The places at which something was read that no write explains, each with what was wrong.
#[must_use]
pub fn violations(places: usize, writes: &[Write], reads: &[Read]) -> Vec<String> {
    const BEGINNING: Span = Span { start: 0, end: 0 };
    // Everything is zero in the beginning.
    let mut of: Vec<Vec<(u64, Span)>> = vec![vec![(0, BEGINNING)]; places];
    for write in writes {
        for place in of.iter_mut().take(write.end).skip(write.first) {
            place.push((write.stamp, write.span));
        }
    }
    let mut known: HashMap<(usize, u64), Vec<Span>> = HashMap::new();
    for (place, writes) in of.iter().enumerate() {
        for (stamp, span) in writes {
            known.entry((place, *stamp)).or_default().push(*span);
        }
    }
    let explained = |read: &Read| {
        let candidates = known
            .get(&(read.place, read.stamp))
            .map_or(&[][..], Vec::as_slice);
        candidates.iter().any(|write| {
            let over = |(_, other): &(u64, Span)| other.start > write.end && other.end < read.span.start;
            write.start < read.span.end && !of.get(read.place).is_some_and(|all| all.iter().any(over))
        })
    };
    reads
        .iter()
        .filter(|read| !explained(read))
        .map(|read| {
            let Read { place, stamp, span } = read;
            let about: Vec<_> = of.get(*place).into_iter().flatten().rev().take(6).collect();
            format!(
                "place {place}: {stamp:#x} read at {}..{}, written last: {about:?}",
                span.start, span.end
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(stamp: u64, start: u64, end: u64) -> Write {
        let span = Span { start, end };
        Write {
            first: 0,
            end: 2,
            stamp,
            span,
        }
    }

    fn bad(writes: &[Write], stamp: u64, start: u64, end: u64) -> bool {
        let span = Span { start, end };
        !violations(
            2,
            writes,
            &[Read {
                place: 1,
                stamp,
                span,
            }],
        )
        .is_empty()
    }

    #[test]
    fn what_was_overwritten_before_is_not_read() {
        let writes = [write(7, 1, 2), write(8, 3, 4)];
        assert!(!bad(&writes, 8, 5, 6));
        assert!(bad(&writes, 7, 5, 6), "lost");
        assert!(bad(&writes, 0, 5, 6), "zeros");
        assert!(bad(&writes, 9, 5, 6), "never written");
        // While the second one is under way either will do.
        let writes = [write(7, 1, 2), write(8, 3, 6)];
        assert!(!bad(&writes, 7, 4, 5) && !bad(&writes, 8, 4, 5));
    }

    #[test]
    fn writes_at_the_same_time_come_in_any_order() {
        let writes = [write(7, 1, 4), write(8, 2, 3)];
        assert!(!bad(&writes, 7, 5, 6) && !bad(&writes, 8, 5, 6));
    }

    #[test]
    fn what_is_written_later_is_not_read_before() {
        assert!(bad(&[write(7, 5, 6)], 7, 1, 2));
    }
}
