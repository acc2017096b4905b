//! Another mount goes through files whose data is here only.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

/// So many files asked for in so short a time make it likely that others follow.
const MANY: u32 = 4;
/// How short.
const SHORT: Duration = Duration::from_millis(100);

/// Whether what is dirty is to be written back at once, many files together: else each costs requests of its own when it is asked for.
#[derive(Debug, Default)]
pub struct Hurry {
    /// Since when files were asked for, and how many.
    asked: Mutex<Option<(Instant, u32)>>,
    begun: AtomicBool,
}

impl Hurry {
    /// Another mount has asked for a file with data that is here only. True: that was one too many.
    pub fn asked(&self) -> bool {
        let mut asked = self.asked.lock();
        let (since, count) = asked
            .filter(|(since, _)| since.elapsed() < SHORT)
            .unwrap_or_else(|| (Instant::now(), 0));
        let begins = count + 1 >= MANY;
        *asked = (!begins).then_some((since, count + 1));
        if begins {
            self.begun.store(true, Ordering::SeqCst);
        }
        begins
    }

    /// Is everything to be written back? Told once.
    pub fn take(&self) -> bool {
        self.begun.swap(false, Ordering::SeqCst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_in_a_short_time_begin_it_once() {
        let hurry = Hurry::default();
        let mut begun: Vec<bool> = (0..MANY).map(|_| hurry.asked()).collect();
        assert_eq!((begun.pop(), begun.contains(&true)), (Some(true), false));
        assert!(hurry.take() && !hurry.take());
        assert!(!hurry.asked());
        *hurry.asked.lock() = Instant::now()
            .checked_sub(SHORT * 2)
            .map(|since| (since, MANY - 1));
        assert!(!hurry.asked() && !hurry.take());
    }
}
