//! What is known of the names in a directory. Pure.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::cache::follow::{Deed, Follow, Listing};
use fsd_proto::wire::Kind;

/// After so many names that the server was asked for one by one, so many pages of the directory's names are read: if that is all of
/// them, nothing has to be asked any more, and if not, what was read in vain has cost no more than what was asked.
const WORTH: [(u32, usize); 3] = [(8, 1), (64, 4), (512, 32)];

/// Cached contents of a directory.
#[derive(Debug, Default)]
pub struct DirCache {
    /// Names known to exist: inode, type, cookie.
    pub entries: HashMap<Vec<u8>, (u64, Kind, u64)>,
    /// Names known not to exist (only where `complete` is false).
    pub absent: HashSet<Vec<u8>>,
    /// `entries` is everything there is.
    pub complete: bool,
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
            None if self.complete || self.absent.contains(name) => Some(None),
            None => None,
        }
    }

    /// Another name is to be asked for: how many pages of names had better be read before. Not for the first few: who reads
    /// a directory waits until all that others have changed in it is durable.
    pub fn worth_reading(&mut self) -> Option<usize> {
        self.asked = self.asked.saturating_add(1);
        WORTH.iter().find(|(asked, _)| *asked == self.asked).map(|w| w.1)
    }

    /// What was read cannot be taken in, for names have changed meanwhile: it is worth another try soon.
    pub fn read_in_vain(&mut self) {
        self.asked = 0;
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
        let cookie = self.entries.get(name).map(|&(_, _, cookie)| cookie);
        cookie.map_or_else(Vec::new, |cookie| self.follow.done(deed, cookie))
    }

    /// A name now exists.
    pub fn add(&mut self, name: &[u8], ino: u64, kind: Kind, cookie: u64) {
        self.absent.remove(name);
        self.entries.insert(name.to_vec(), (ino, kind, cookie));
        self.listing = None;
    }

    /// A name does not exist (any more).
    pub fn remove(&mut self, name: &[u8]) {
        self.entries.remove(name);
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
        let read: Vec<usize> = (0..2000).filter_map(|_| dir.worth_reading()).collect();
        assert_eq!(read, [1, 4, 32]);
        dir.read_in_vain();
        assert_eq!((0..8).filter_map(|_| dir.worth_reading()).count(), 1);
    }

    #[test]
    fn a_complete_directory_knows_what_is_absent() {
        let mut dir = DirCache::default();
        assert_eq!(dir.lookup(b"x"), None);
        dir.remove(b"x");
        assert_eq!(dir.lookup(b"x"), Some(None));
        dir.complete = true;
        assert_eq!(dir.lookup(b"y"), Some(None));
    }
}
