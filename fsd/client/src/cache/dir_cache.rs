//! What is known of the names in a directory. Pure.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use fsd_proto::wire::Kind;

/// A listing by cookie: name, inode, type.
pub type Listing = Arc<BTreeMap<u64, (Vec<u8>, u64, Kind)>>;

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
    pub listing: Option<Listing>,
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
    fn a_complete_directory_knows_what_is_absent() {
        let mut dir = DirCache::default();
        assert_eq!(dir.lookup(b"x"), None);
        dir.remove(b"x");
        assert_eq!(dir.lookup(b"x"), Some(None));
        dir.complete = true;
        assert_eq!(dir.lookup(b"y"), Some(None));
    }
}
