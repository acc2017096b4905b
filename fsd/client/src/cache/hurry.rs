//! Another mount goes through files whose data is here only.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rt::sync::Mutex;
use rt::time::Instant;

/// So many files asked for in so short a time make it likely that others follow.
const MANY: usize = 4;
/// How short; and how long nothing more comes of it then.
const SHORT: Duration = Duration::from_millis(100);

/// Files that were asked for.
#[derive(Debug)]
struct Asked {
    since: Instant,
    /// Each once: one that two mounts pass to and fro says nothing of others.
    files: Vec<u64>,
}

/// Whether what is dirty is to be written back at once, many files together: else each costs requests of its own when it is asked for.
#[derive(Debug, Default)]
pub struct Hurry {
    asked: Mutex<Option<Asked>>,
    begun: AtomicBool,
}

impl Hurry {
    /// Another mount has asked for a file with data that is here only. True: with that there are many.
    pub fn asked(&self, ino: u64) -> bool {
        let mut asked = self.asked.lock();
        if asked.as_ref().is_none_or(|asked| asked.since.elapsed() >= SHORT) {
            *asked = None;
        }
        let files = &mut asked
            .get_or_insert_with(|| Asked {
                since: Instant::now(),
                files: Vec::with_capacity(MANY),
            })
            .files;
        if files.len() == MANY || files.contains(&ino) {
            return false;
        }
        files.push(ino);
        let begins = files.len() == MANY;
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

    fn later(hurry: &Hurry) {
        if let Some(asked) = hurry.asked.lock().as_mut()
            && let Some(since) = asked.since.checked_sub(SHORT)
        {
            asked.since = since;
        }
    }

    #[test]
    fn many_files_in_a_short_time_begin_it_once() {
        let hurry = Hurry::default();
        let begun: Vec<u64> = (1..20).filter(|&ino| hurry.asked(ino)).collect();
        assert_eq!(begun, [4]);
        assert!(hurry.take() && !hurry.take());
        later(&hurry);
        assert_eq!((1..20).filter(|&ino| hurry.asked(ino)).count(), 1);
    }

    #[test]
    fn few_files_and_slow_ones_do_not() {
        let hurry = Hurry::default();
        assert!(!(0..1000).any(|n| hurry.asked(n % 3)), "passed to and fro");
        for ino in 10..20 {
            later(&hurry);
            assert!(!hurry.asked(ino), "one now and then");
        }
        assert!(!hurry.take());
    }
}
