//! Names that were changed lately, by directory: a mount that comes back to the lease of a directory keeps what it knew of all others.

use std::collections::{HashMap, HashSet, VecDeque};

use rt::sync::Mutex;

use fsd_proto::wire::{Mark, Time};

/// Most changes that are remembered; the oldest ones go first.
const MOST: usize = 1 << 16;
/// Where more names were changed, what is known of the others is not worth the answer.
const WORTH_TELLING: usize = 1024;

/// The last changes of names, in memory: those of an earlier process are not known to this one.
#[derive(Debug)]
pub struct Recent {
    life: u64,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Changes so far.
    number: u64,
    /// Those up to this one are not remembered any more.
    forgotten: u64,
    /// The directory of each that is remembered, in order.
    order: VecDeque<u64>,
    /// Number and name, by directory.
    names: HashMap<u64, VecDeque<(u64, Vec<u8>)>>,
}

impl Kept {
    fn forget_oldest(&mut self) {
        let Some(dir) = self.order.pop_front() else {
            return;
        };
        self.forgotten += 1;
        if let Some(names) = self.names.get_mut(&dir) {
            names.pop_front();
            if names.is_empty() {
                self.names.remove(&dir);
            }
        }
    }
}

impl Default for Recent {
    /// None yet. The moment tells this process from others, whose numbers mean something else.
    fn default() -> Self {
        Self {
            life: Time::now().0.unsigned_abs(),
            kept: Mutex::default(),
        }
    }
}

impl Recent {
    /// A name in a directory has been changed.
    pub fn note(&self, dir: u64, name: &[u8]) {
        let kept = &mut *self.kept.lock();
        if kept.order.len() == MOST {
            kept.forget_oldest();
        }
        kept.number += 1;
        kept.order.push_back(dir);
        let of_dir = kept.names.entry(dir).or_default();
        of_dir.push_back((kept.number, name.to_vec()));
    }

    /// Stands for everything up to now.
    pub fn mark(&self) -> Mark {
        Mark {
            life: self.life,
            number: self.kept.lock().number,
        }
    }

    /// The names in a directory that were changed after a mark, each once; none if that is not known any more, or not worth telling.
    pub fn since(&self, dir: u64, mark: Mark) -> Option<Vec<Vec<u8>>> {
        let kept = self.kept.lock();
        if mark.life != self.life || mark.number < kept.forgotten {
            return None;
        }
        let of_dir = kept.names.get(&dir).into_iter().flatten();
        let after = of_dir.rev().take_while(|(number, _)| *number > mark.number);
        let names: HashSet<&Vec<u8>> = after.take(WORTH_TELLING + 1).map(|(_, name)| name).collect();
        (names.len() <= WORTH_TELLING).then(|| names.into_iter().cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn since(recent: &Recent, dir: u64, mark: Mark) -> Option<Vec<String>> {
        let names = recent.since(dir, mark)?;
        let mut names: Vec<String> = names
            .iter()
            .map(|name| String::from_utf8_lossy(name).into())
            .collect();
        names.sort();
        Some(names)
    }

    #[test]
    fn what_was_changed_since_is_told_by_directory() {
        let recent = Recent::default();
        recent.note(1, b"before");
        let mark = recent.mark();
        for (dir, name) in [(1, "b"), (2, "c"), (1, "a"), (1, "b")] {
            recent.note(dir, name.as_bytes());
        }
        assert_eq!(since(&recent, 1, mark).unwrap(), ["a", "b"]);
        assert_eq!(since(&recent, 2, mark).unwrap(), ["c"]);
        assert!(since(&recent, 3, mark).unwrap().is_empty());
        assert!(since(&recent, 1, recent.mark()).unwrap().is_empty());
        let other = Mark {
            life: mark.life + 1,
            ..mark
        };
        assert_eq!(recent.since(1, other), None, "another process");
    }

    #[test]
    fn what_is_forgotten_is_not_said_to_be_unchanged() {
        let recent = Recent::default();
        let mark = recent.mark();
        for _ in 0..MOST {
            recent.note(7, b"a");
        }
        assert_eq!(recent.since(8, mark), Some(Vec::new()));
        recent.note(8, b"b");
        assert_eq!(recent.since(8, mark), None);
        let kept = recent.kept.lock();
        assert_eq!((kept.order.len(), kept.names[&7].len()), (MOST, MOST - 1));
    }

    #[test]
    fn many_changes_are_not_told() {
        let recent = Recent::default();
        let mark = recent.mark();
        for number in 0..WORTH_TELLING {
            recent.note(7, number.to_string().as_bytes());
        }
        assert_eq!(
            recent.since(7, mark).map(|names| names.len()),
            Some(WORTH_TELLING)
        );
        recent.note(7, b"more");
        assert_eq!(recent.since(7, mark), None);
    }
}
