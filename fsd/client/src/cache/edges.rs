//! Pages that a stock kernel keeps locked for a write, and invalidation beside them.
//!
//! A write through the page cache may keep one folio locked until the daemon has answered it (`edge_of` in `write`). If it
//! has to wait for the exclusive lease while this mount's shared one is being revoked, the invalidation must not wait for
//! that folio. Such writes are noted here when they begin to wait. A folio that one of them keeps locked holds nothing old,
//! so its pages are invalidated aside with a bounded wait. But a folio is locked before the daemon hears of the write: so an
//! invalidation that meets one is left behind when a write begins to wait, and another one goes around its pages.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rt::sync::{Condvar, Mutex};

use crate::cache::pages::{PAGE, page_of};

/// The pages (first, last) that the kernel may keep locked during a write through its page cache: one folio, if the write
/// does not cover it and it was not up to date. That is the last page of a write that begins at the beginning of a page. One
/// that begins elsewhere is sent folio by folio, and since Linux 6.17 a folio may be as large as the write.
#[must_use]
pub fn edge_of(offset: u64, len: u64) -> Option<(u64, u64)> {
    let end = offset.checked_add(len).filter(|_| len > 0)?;
    let last = page_of(end - 1);
    if !offset.is_multiple_of(PAGE) {
        return Some((page_of(offset), last));
    }
    (!end.is_multiple_of(PAGE)).then_some((last, last))
}

/// How long the invalidation of pages that a waiting write may keep locked is waited for.
pub(crate) const EDGE_WAIT: Duration = Duration::from_millis(20);

/// First and last page.
type Pages = (u64, u64);

#[derive(Debug, Default)]
struct State {
    /// How many writes wait that may keep these pages locked.
    waiting: HashMap<Pages, usize>,
    /// Moves with every write that begins to wait.
    arrivals: u64,
}

/// The pages of a file that the kernel may keep locked for writes that wait for the exclusive lease.
#[derive(Debug, Default)]
pub struct Edges {
    state: Mutex<State>,
    changed: Condvar,
}

impl Edges {
    /// A write that may keep these pages locked begins to wait.
    pub fn begin(&self, pages: Pages) {
        let mut state = self.state.lock();
        *state.waiting.entry(pages).or_default() += 1;
        state.arrivals += 1;
        drop(state);
        self.changed.notify_all();
    }

    /// It waits no longer.
    pub fn end(&self, pages: Pages) {
        let mut state = self.state.lock();
        if let Some(count) = state.waiting.get_mut(&pages) {
            *count -= 1;
            if *count == 0 {
                state.waiting.remove(&pages);
            }
        }
    }

    /// Does no write wait?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.state.lock().waiting.is_empty()
    }

    /// The pages, in order, and how many writes had come by then.
    pub(crate) fn now(&self) -> (Vec<Pages>, u64) {
        let state = self.state.lock();
        let mut pages: Vec<Pages> = state.waiting.keys().copied().collect();
        pages.sort_unstable();
        (pages, state.arrivals)
    }

    /// An invalidation has come to its end.
    pub(crate) fn finish(&self, done: &AtomicBool) {
        let state = self.state.lock();
        done.store(true, Ordering::SeqCst);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until an invalidation is `done` or, for [`EDGE_WAIT`] longer, until a write has begun to wait since the
    /// `seen`th. Whether it is done.
    pub(crate) fn wait_for(&self, done: &AtomicBool, seen: u64) -> bool {
        let mut state = self.state.lock();
        while !done.load(Ordering::SeqCst) {
            if state.arrivals == seen {
                self.changed.wait(&mut state);
            } else if self.changed.wait_for(&mut state, EDGE_WAIT).timed_out() {
                return done.load(Ordering::SeqCst);
            }
        }
        true
    }
}

/// The ranges (offset, length; 0: to the end) of a file without these pages, which are in order.
pub(crate) fn around(edges: &[Pages]) -> Vec<(u64, u64)> {
    let mut ranges = Vec::with_capacity(edges.len() + 1);
    let mut from = 0;
    for (first, last) in edges {
        if first * PAGE > from {
            ranges.push((from, first * PAGE - from));
        }
        from = from.max((last + 1) * PAGE);
    }
    ranges.push((from, 0));
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_locked_is_gone_around() {
        assert_eq!(around(&[]), [(0, 0)]);
        assert_eq!(around(&[(0, 0)]), [(PAGE, 0)]);
        assert_eq!(
            around(&[(1, 3), (2, 2), (4, 4), (8, 8)]),
            [(0, PAGE), (5 * PAGE, 3 * PAGE), (9 * PAGE, 0)]
        );
    }

    #[test]
    fn a_write_that_begins_to_wait_ends_the_waiting_for_an_invalidation() {
        let edges = Edges::default();
        let (pages, seen) = edges.now();
        assert!(pages.is_empty() && edges.is_empty());
        edges.begin((1, 2));
        edges.begin((1, 2));
        let done = AtomicBool::new(false);
        assert!(!edges.wait_for(&done, seen));
        edges.finish(&done);
        assert!(edges.wait_for(&done, seen));
        edges.end((1, 2));
        assert_eq!(edges.now().0, [(1, 2)]);
        edges.end((1, 2));
        assert!(edges.is_empty());
    }

    #[test]
    fn what_is_kept_locked_is_the_last_page_or_an_unaligned_write() {
        assert_eq!(edge_of(0, PAGE), None);
        assert_eq!(edge_of(PAGE, 10), Some((1, 1)));
        assert_eq!(edge_of(0, 2 * PAGE + 1), Some((2, 2)));
        assert_eq!(edge_of(5, 0), None);
        // A large folio may hold all of these.
        assert_eq!(edge_of(PAGE + 10, PAGE - 10), Some((1, 1)));
        assert_eq!(edge_of(100, 2 * PAGE - 100), Some((0, 1)));
        assert_eq!(edge_of(100, 2 * PAGE), Some((0, 2)));
    }
}
