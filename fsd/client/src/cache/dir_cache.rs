//! What is known of the names in a directory. Pure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::cache::follow::{Deed, Follow, Listing};
use fsd_proto::wire::{Kind, Mark};

/// Instead of asking for the so-manieth name by itself, so many of the directory's names are read: if that is all of
/// them, nothing has to be asked any more, and if not, what was read in vain has cost no more than what was asked.
const WORTH: [(u32, usize); 4] = [(2, 64), (8, 512), (64, 2048), (512, 16384)];
/// Who asks for fewer names than that under each lease has no use for all of many.
const FEW: u32 = WORTH[1].0;
/// Where others have changed more names than that, which ones do not exist is not remembered any longer.
const MOST_CHANGED: usize = 4096;
/// The order of more names than that is not made out for a program that has not listed them.
const MOST_ORDERED: usize = 4096;

/// Cached contents of a directory.
#[derive(Debug, Default)]
pub struct DirCache {
    /// Names known to exist: inode, type, cookie.
    pub entries: HashMap<Vec<u8>, (u64, Kind, u64)>,
    /// Names known not to exist (only where `complete` is false).
    pub absent: HashSet<Vec<u8>>,
    /// `entries` is everything there is, but for `changed`.
    complete: bool,
    /// Names that other mounts have changed, of which nothing is known.
    changed: HashSet<Vec<u8>>,
    /// What others have changed since is not known; set when the lease was given up.
    pub heard: Option<Mark>,
    /// The complete listing by cookie, built on demand.
    listing: Option<Listing>,
    /// How many names the server was asked for one by one.
    asked: u32,
    /// How far a program has come that goes through the names.
    follow: Follow,
}

impl DirCache {
    /// What is known of a name: `None` nothing, `Some(None)` that it does not exist.
    #[must_use]
    pub fn lookup(&self, name: &[u8]) -> Option<Option<(u64, Kind, u64)>> {
        match self.entries.get(name) {
            Some(&entry) => Some(Some(entry)),
            None if self.changed.contains(name) => None,
            None if self.complete || self.absent.contains(name) => Some(None),
            None => None,
        }
    }

    /// Is every name known?
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.complete && self.changed.is_empty()
    }

    /// The names that are known now are all there are, but perhaps for these.
    pub fn completed(&mut self, left_out: Vec<Vec<u8>>) {
        let absent = std::mem::take(&mut self.absent);
        let unknown = |name: &Vec<u8>| !self.entries.contains_key(name) && !absent.contains(name);
        self.changed = left_out.into_iter().filter(unknown).collect();
        self.complete = self.changed.len() <= MOST_CHANGED;
        if !self.complete {
            self.changed.clear();
            self.absent = absent;
        }
    }

    /// What was known under an earlier lease is known again, but for the names that others have changed meanwhile. What has been asked
    /// for since stays.
    pub fn come_back(&mut self, mut former: Self, changed: Vec<Vec<u8>>) {
        for name in changed {
            former.entries.remove(&name);
            former.absent.remove(&name);
            former.listing = None;
            if former.complete {
                former.changed.insert(name);
            }
        }
        if former.changed.len() > MOST_CHANGED {
            former.complete = false;
            former.changed.clear();
        }
        // Of a directory that is known only those are asked for that others change: it is worth reading again when they are many. And
        // whoever asks for a few under each lease has no use for all.
        if former.complete {
            former.asked = 0;
        } else if former.asked < FEW {
            former.asked = former.asked.min(WORTH[0].0);
        }
        let asked = std::mem::replace(self, former);
        for (name, (ino, kind, cookie)) in asked.entries {
            self.add(&name, ino, kind, cookie);
        }
        for name in asked.absent {
            self.remove(&name);
        }
    }

    /// Another name is to be asked for: how many names had better be read before. Not for the first, for many a directory is only passed,
    /// unless a program goes through one directory after the other (`foreseen`).
    pub fn worth_reading(&mut self, foreseen: bool) -> Option<usize> {
        if foreseen && self.asked == 0 {
            self.asked = WORTH[0].0 - 1;
            self.follow.foreseen();
        }
        self.asked = self.asked.saturating_add(1);
        let most = WORTH.iter().find(|(asked, _)| *asked == self.asked)?.1;
        // Of a directory that is known but for some names a part says little.
        (!self.complete || self.entries.len() < most).then_some(most)
    }

    /// What was read cannot be taken in, for names have changed meanwhile: it is worth another try, but not at once.
    pub fn read_in_vain(&mut self) {
        self.asked = WORTH[0].0;
    }

    /// The listing of a directory that is known completely.
    pub fn list(&mut self) -> Listing {
        if let Some(listing) = &self.listing {
            return Arc::clone(listing);
        }
        let names = self.entries.iter();
        let by_cookie = names.map(|(name, &(ino, kind, cookie))| (cookie, (name.clone(), ino, kind)));
        let listing = Arc::new(by_cookie.collect());
        self.follow.listed(&listing);
        self.listing = Some(Arc::clone(&listing));
        listing
    }

    /// A name was looked up, or is being removed: inodes of which the same is likely to be wanted next.
    pub fn follow(&mut self, deed: Deed, name: &[u8]) -> Vec<u64> {
        let Some(&(_, _, cookie)) = self.entries.get(name) else {
            return Vec::new();
        };
        if self.complete && self.entries.len() <= MOST_ORDERED && self.follow.lacks_order(deed, cookie) {
            self.list();
        }
        self.follow.done(deed, cookie)
    }

    /// A name now exists.
    pub fn add(&mut self, name: &[u8], ino: u64, kind: Kind, cookie: u64) {
        self.absent.remove(name);
        self.changed.remove(name);
        self.entries.insert(name.to_vec(), (ino, kind, cookie));
        self.listing = None;
    }

    /// A name does not exist (any more).
    pub fn remove(&mut self, name: &[u8]) {
        self.entries.remove(name);
        self.changed.remove(name);
        self.listing = None;
        if !self.complete {
            // Bounded: somebody who probes for random names must not fill the memory.
            if self.absent.len() >= 4096 {
                self.absent.clear();
            }
            self.absent.insert(name.to_vec());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_read_when_many_of_its_names_were_asked_for() {
        let mut dir = DirCache::default();
        let read: Vec<usize> = (0..2000).filter_map(|_| dir.worth_reading(false)).collect();
        assert_eq!(read, [64, 512, 2048, 16384]);
        assert_eq!(DirCache::default().worth_reading(true), Some(64));
        dir.read_in_vain();
        assert_eq!((0..6).filter_map(|_| dir.worth_reading(false)).count(), 1);
    }

    #[test]
    fn of_what_was_left_out_only_what_was_asked_for_is_known() {
        let mut dir = DirCache::default();
        dir.add(b"asked", 1, Kind::File, 1);
        dir.remove(b"gone");
        dir.add(b"read", 2, Kind::File, 2);
        dir.completed(vec![b"asked".to_vec(), b"gone\0".to_vec(), b"other".to_vec()]);
        assert_eq!(dir.lookup(b"gone\0"), None);
        assert_eq!(
            (dir.lookup(b"other"), dir.lookup(b"elsewhere")),
            (None, Some(None))
        );
        assert_eq!(
            (dir.lookup(b"asked").is_some(), dir.lookup(b"gone")),
            (true, Some(None))
        );
        assert!(!dir.is_complete());
        let many = (0..=MOST_CHANGED).map(|n| n.to_string().into_bytes());
        dir.completed(many.collect());
        assert_eq!(
            (dir.lookup(b"elsewhere"), dir.lookup(b"asked").is_some()),
            (None, true)
        );
    }

    #[test]
    fn a_complete_directory_knows_what_is_absent() {
        let mut dir = DirCache::default();
        assert_eq!(dir.lookup(b"x"), None);
        dir.remove(b"x");
        assert_eq!(dir.lookup(b"x"), Some(None));
        dir.completed(Vec::new());
        assert_eq!(dir.lookup(b"y"), Some(None));
    }

    #[test]
    fn what_others_have_not_changed_is_still_known() {
        let mut former = DirCache::default();
        for (name, ino) in [(b"a", 1), (b"b", 2)] {
            former.add(name, ino, Kind::File, ino);
        }
        former.completed(Vec::new());
        let mut dir = DirCache::default();
        // Asked for under the new lease.
        dir.add(b"d", 4, Kind::File, 4);
        dir.remove(b"e");
        let changed = [b"b", b"c", b"d", b"e"].map(|name| name.to_vec()).to_vec();
        dir.come_back(former, changed);
        let known = |dir: &DirCache, name: &[u8]| dir.lookup(name).map(|found| found.map(|(ino, _, _)| ino));
        assert_eq!(known(&dir, b"a"), Some(Some(1)));
        assert_eq!(known(&dir, b"b"), None);
        assert_eq!(known(&dir, b"c"), None);
        assert_eq!(known(&dir, b"d"), Some(Some(4)));
        assert_eq!(known(&dir, b"e"), Some(None));
        assert_eq!(known(&dir, b"elsewhere"), Some(None));
        assert!(!dir.is_complete());
        dir.remove(b"b");
        dir.add(b"c", 3, Kind::File, 5);
        assert!(dir.is_complete());
        assert_eq!(dir.list().len(), 3);
    }

    #[test]
    fn of_a_directory_that_was_not_known_completely_only_the_names_come_back() {
        let mut former = DirCache::default();
        former.add(b"a", 1, Kind::File, 1);
        former.remove(b"b");
        former.remove(b"c");
        let mut dir = DirCache::default();
        dir.come_back(former, vec![b"c".to_vec()]);
        assert_eq!((dir.lookup(b"a").is_some(), dir.lookup(b"b")), (true, Some(None)));
        assert_eq!((dir.lookup(b"c"), dir.lookup(b"d")), (None, None));
    }
}
