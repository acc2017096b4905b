//! Whom an inode was looked up for.

use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

/// For so long after a look-up the operation that it was for may still come.
const FRESH: Duration = Duration::from_millis(500);

/// The last two threads that an inode was looked up for, and when.
#[derive(Debug, Default)]
pub struct LookedUp(Mutex<[Option<(u32, Instant)>; 2]>);

impl LookedUp {
    /// A look-up is about to be answered.
    pub fn note(&self, thread: u32) {
        let mut last = self.0.lock();
        if last[0].is_some_and(|(other, _)| other != thread) {
            last[1] = last[0];
        }
        last[0] = Some((thread, Instant::now()));
    }

    /// Was it looked up a moment ago, for another thread than `but`?
    #[must_use]
    pub fn is_fresh(&self, but: Option<u32>) -> bool {
        let last = self.0.lock();
        let mut others = last.iter().flatten().filter(|(thread, _)| Some(*thread) != but);
        others.any(|(_, at)| at.elapsed() < FRESH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_thread_looked_up_is_fresh() {
        let looked_up = LookedUp::default();
        assert!(!looked_up.is_fresh(None));
        looked_up.note(7);
        looked_up.note(7);
        assert!(looked_up.is_fresh(None) && looked_up.is_fresh(Some(8)) && !looked_up.is_fresh(Some(7)));
        // The one that removes the name has looked it up, too.
        looked_up.note(8);
        looked_up.note(8);
        assert!(looked_up.is_fresh(Some(8)) && looked_up.is_fresh(Some(7)));
    }
}
