//! Where a file is, for people.

use crate::cache::Cache;
use fsd_proto::ino::ROOT;

/// Deeper than that is no path: names change while they are looked for.
const DEEPEST: usize = 256;

impl Cache {
    /// A path of an inode below the mount point, as far as the names that are cached tell; else its number. Looks through all names that
    /// are: for people who ask, not for requests.
    #[must_use]
    pub fn path_of(&self, ino: u64) -> String {
        let mut names: Vec<String> = Vec::new();
        let mut at = ino;
        while at != ROOT {
            let Some((dir, name)) = self.place_of(at).filter(|_| names.len() < DEEPEST) else {
                names.push(format!("inode {at:#x}"));
                break;
            };
            names.push(format!("/{}", String::from_utf8_lossy(&name)));
            at = dir;
        }
        if names.is_empty() {
            return "/".into();
        }
        names.iter().rev().map(String::as_str).collect()
    }

    /// A directory that an inode is in, and its name there.
    fn place_of(&self, ino: u64) -> Option<(u64, Vec<u8>)> {
        let known = self.inodes.find(ino)?;
        let place = known.try_lock_raw()?.lasting.place.clone();
        if let Some(place) = place {
            return Some(*place);
        }
        self.inodes.all().iter().find_map(|dir| {
            let state = dir.try_lock_raw()?;
            let mut entries = state.dir.get()?.entries.iter();
            let (name, _) = entries.find(|(_, (number, _, _))| *number == ino)?;
            Some((dir.ino, name.clone()))
        })
    }
}
