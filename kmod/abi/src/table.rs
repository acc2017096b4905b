//! The lease table, as the daemon uses it.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Error;
use crate::layout::{self, Entry, WAYS, set_of};
use crate::sync::{Ordering, fence};
use crate::sys::Map;
use crate::word::{self, Mode, Revoked, Word};

/// Locks for what only one thread of the daemon may do to a set at a time.
const LOCKS: usize = 64;

/// A moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanos: u32,
}

/// Attributes of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Of contents.
    pub mtime: Time,
    /// Of attributes.
    pub ctime: Time,
    /// Of reading.
    pub atime: Time,
    /// Permissions; other bits are ignored.
    pub mode: u32,
    /// Names.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// It has extended attributes, among which there may be capabilities that a write takes away.
    pub xattrs: bool,
}

/// What comes with a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Grant {
    /// Of the contents.
    pub version: u64,
    /// The kernel may go on using what it has cached under any version from here on: the same as `version`,
    /// unless this node made the versions in between.
    pub since: u64,
    /// The attributes at this moment. Not looked at when a shared lease becomes an exclusive one.
    pub attributes: Attributes,
    /// What can be stored of what is written under an exclusive lease: see [`Table::set_space`].
    pub space: (u64, u64),
}

/// The lease table shared with the kernel.
#[derive(Debug)]
pub struct Table {
    map: Arc<Map>,
    set_bits: u32,
    locks: [Mutex<()>; LOCKS],
}

impl Table {
    pub(crate) fn new(map: Arc<Map>) -> Table {
        let sets = map.layout().entries / WAYS as u32;
        Table {
            map,
            set_bits: sets.ilog2(),
            locks: std::array::from_fn(|_| Mutex::new(())),
        }
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.map.table().len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn set(&self, ino: u64) -> (&[Entry], &Mutex<()>) {
        let set = set_of(ino, self.set_bits);
        let ways = self.map.table().get(set * WAYS..(set + 1) * WAYS).unwrap_or(&[]);
        let [first, ..] = &self.locks;
        (ways, self.locks.get(set % LOCKS).unwrap_or(first))
    }

    fn find(&self, ino: u64) -> Option<&Entry> {
        let (ways, _) = self.set(ino);
        ways.iter().find(|entry| entry.ino.load(Ordering::Relaxed) == ino)
    }

    /// The word of an inode's entry, if it has one.
    pub fn word(&self, ino: u64) -> Option<Word> {
        self.find(ino)
            .map(|entry| Word(entry.word.load(Ordering::Acquire)))
    }

    /// The inodes that have an entry in the set of this one: the candidates to be evicted where
    /// [`Table::grant`] finds the set full.
    pub fn neighbours(&self, ino: u64) -> Vec<(u64, Word)> {
        let (ways, _) = self.set(ino);
        ways.iter()
            .map(|entry| {
                let word = Word(entry.word.load(Ordering::Acquire));
                (entry.ino.load(Ordering::Relaxed), word)
            })
            .filter(|(owner, _)| *owner != 0)
            .collect()
    }

    /// Gives the kernel a lease; a system call is not needed. Takes a free entry, or that of an inode that
    /// holds nothing, if the inode has none. Whether tasks wait and are to be woken.
    ///
    /// # Errors
    /// The set is full of inodes that hold something: revoke one of [`Table::neighbours`]. A revocation of
    /// this inode is under way, or it holds as much.
    pub fn grant(&self, ino: u64, mode: Mode, grant: &Grant) -> Result<bool, Error> {
        let (ways, lock) = self.set(ino);
        let _guard = lock.lock();
        let owner = |entry: &&Entry| entry.ino.load(Ordering::Relaxed);
        let idle = |entry: &&Entry| {
            let word = Word(entry.word.load(Ordering::Acquire));
            word.mode() == Mode::None && word.clean(Mode::None) && !word.has(word::REVOKING)
        };
        let mut fresh = false;
        let entry = match ways.iter().find(|entry| owner(entry) == ino) {
            Some(entry) => entry,
            None => {
                let entry = ways
                    .iter()
                    .find(|entry| owner(entry) == 0)
                    .or_else(|| ways.iter().find(idle))
                    .ok_or(Error::Full(ino))?;
                fresh = true;
                // Nobody can enter: the mode is none, and the next grant changes the word.
                entry.hints.store(0, Ordering::Relaxed);
                entry.ino.store(ino, Ordering::Relaxed);
                entry
            }
        };
        let held = Word(entry.word.load(Ordering::Relaxed)).mode();
        if held == Mode::None {
            write(entry, |entry| {
                entry.version.store(grant.version, Ordering::Relaxed);
                entry.since.store(grant.since, Ordering::Relaxed);
                store(entry, &grant.attributes);
                store_space(entry, grant.space);
            });
        } else if held < mode {
            write(entry, |entry| store_space(entry, grant.space));
        }
        let was = word::grant(&entry.word, mode).ok_or(Error::NotNow(ino))?;
        Ok(fresh || was.has(word::WAITERS))
    }

    /// Takes a lease down to `target`: see [`word::revoke`]. Where there is no entry, it is done. One that is to
    /// be taken down to a shared lease, and is held exclusively, is only revoked down to that.
    pub fn revoke(&self, ino: u64, target: Mode, force: bool) -> Revoked {
        self.find(ino).map_or(Revoked::Done { wake: false }, |entry| {
            word::revoke(&entry.word, target, force)
        })
    }

    /// Whether somebody has been inside since the grant, or since this was last asked.
    pub fn used_again(&self, ino: u64) -> bool {
        self.find(ino).is_some_and(|entry| word::used_again(&entry.word))
    }

    /// After the events that [`Table::revoke`] asked to wait for.
    pub fn finish(&self, ino: u64, target: Mode) -> Revoked {
        self.find(ino).map_or(Revoked::Done { wake: false }, |entry| {
            word::finish(&entry.word, target)
        })
    }

    /// Calls a revocation off. Whether tasks are to be woken.
    pub fn cancel(&self, ino: u64) -> bool {
        self.find(ino).is_some_and(|entry| word::cancel(&entry.word))
    }

    /// Whether short reads and writes that find the lease not held are to be calls. Nothing where there is no entry.
    pub fn hint_calls(&self, ino: u64, on: bool) {
        if let Some(entry) = self.find(ino) {
            let hints = if on { layout::HINT_CALL } else { 0 };
            entry.hints.store(hints, Ordering::Relaxed);
        }
    }

    /// Changes the attributes of an inode whose lease the kernel holds: before the request that changed them
    /// is answered. Size and times are not installed again.
    ///
    /// # Errors
    /// It has no entry.
    pub fn set_attributes(&self, ino: u64, attributes: &Attributes) -> Result<(), Error> {
        let (ways, lock) = self.set(ino);
        let _guard = lock.lock();
        let entry = ways
            .iter()
            .find(|entry| entry.ino.load(Ordering::Relaxed) == ino)
            .ok_or(Error::Absent(ino))?;
        write(entry, |entry| store(entry, attributes));
        Ok(())
    }

    /// Says what of an inode can be stored, from `.0` to before `.1`, of what is written under the exclusive lease: all of
    /// it is allocated or set aside, and stays so until another range is said, or the lease is revoked. Nothing where
    /// there is no entry.
    pub fn set_space(&self, ino: u64, space: (u64, u64)) {
        let (ways, lock) = self.set(ino);
        let _guard = lock.lock();
        if let Some(entry) = ways.iter().find(|entry| entry.ino.load(Ordering::Relaxed) == ino) {
            write(entry, |entry| store_space(entry, space));
        }
    }

    /// Frees the entry of an inode that holds nothing, for instance when the kernel has forgotten it. Whether
    /// it is free.
    pub fn evict(&self, ino: u64) -> bool {
        let (ways, lock) = self.set(ino);
        let _guard = lock.lock();
        let Some(entry) = ways.iter().find(|entry| entry.ino.load(Ordering::Relaxed) == ino) else {
            return true;
        };
        let word = Word(entry.word.load(Ordering::Acquire));
        let idle = word.mode() == Mode::None && word.clean(Mode::None) && !word.has(word::REVOKING);
        if idle {
            entry.ino.store(0, Ordering::Relaxed);
        }
        idle
    }
}

/// Changes what is under the sequence count; the caller has the set's lock.
fn write(entry: &Entry, change: impl FnOnce(&Entry)) {
    let seq = entry.seq.load(Ordering::Relaxed);
    entry.seq.store(seq.wrapping_add(1), Ordering::Relaxed);
    fence(Ordering::Release);
    change(entry);
    entry.seq.store(seq.wrapping_add(2), Ordering::Release);
}

fn store_space(entry: &Entry, (from, to): (u64, u64)) {
    entry.space_from.store(from, Ordering::Relaxed);
    entry.space_to.store(to, Ordering::Relaxed);
}

fn store(entry: &Entry, a: &Attributes) {
    entry.size.store(a.size, Ordering::Relaxed);
    entry.blocks.store(a.blocks, Ordering::Relaxed);
    entry.mtime.store(a.mtime.seconds, Ordering::Relaxed);
    entry.mtime_nsec.store(a.mtime.nanos, Ordering::Relaxed);
    entry.ctime.store(a.ctime.seconds, Ordering::Relaxed);
    entry.ctime_nsec.store(a.ctime.nanos, Ordering::Relaxed);
    entry.atime.store(a.atime.seconds, Ordering::Relaxed);
    entry.atime_nsec.store(a.atime.nanos, Ordering::Relaxed);
    entry.mode.store(a.mode, Ordering::Relaxed);
    entry.nlink.store(a.nlink, Ordering::Relaxed);
    entry.uid.store(a.uid, Ordering::Relaxed);
    entry.gid.store(a.gid, Ordering::Relaxed);
    let xattrs = if a.xattrs { layout::ATTR_XATTRS } else { 0 };
    entry
        .valid
        .store(layout::ATTR_DATA | layout::ATTR_ALL | xattrs, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new(Arc::new(Map::anonymous(64)))
    }

    #[test]
    fn entries_of_idle_inodes_are_taken() {
        let table = table();
        let first = 1u64;
        let same: Vec<u64> = (1..10_000)
            .filter(|ino| set_of(*ino, 3) == set_of(first, 3))
            .take(9)
            .collect();
        for ino in same.iter().take(8) {
            assert!(table.grant(*ino, Mode::Shared, &Grant::default()).unwrap());
        }
        let last = *same.last().unwrap();
        assert!(matches!(
            table.grant(last, Mode::Shared, &Grant::default()),
            Err(Error::Full(_))
        ));
        assert_eq!(table.neighbours(last).len(), 8);
        assert_eq!(
            table.revoke(first, Mode::None, true),
            Revoked::Done { wake: false }
        );
        assert!(table.grant(last, Mode::Shared, &Grant::default()).unwrap());
        assert_eq!(table.word(first), None);
        assert!(!table.evict(last));
    }

    #[test]
    fn a_lease_is_granted_once() {
        let table = table();
        assert!(table.grant(7, Mode::Shared, &Grant::default()).unwrap());
        assert!(matches!(
            table.grant(7, Mode::Shared, &Grant::default()),
            Err(Error::NotNow(7))
        ));
        assert!(!table.grant(7, Mode::Exclusive, &Grant::default()).unwrap());
        assert!(table.set_attributes(8, &Attributes::default()).is_err());
        assert_eq!(table.word(7).unwrap().mode(), Mode::Exclusive);
    }
}
