//! Making data durable: on request, in the background, and at the end.
//!
//! Clients write one-sided, so this node does not see their writes; each is followed by an increment of the slab's dirty
//! counter. A block is clean if it is stored and the counter has not moved since that was read from memory.
//!
//! Storing takes four steps: the blocks are written to free extents of the backing file, that is synced, the index is
//! changed to name them, that is synced. The extents named before are free then. A power cut at any moment leaves the
//! index naming whole copies, old ones or new ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rt::sync::Mutex;

use super::error::StorageError;

use super::disk::checksum;
use super::index::{Entry, Place, Stored};
use super::media::{Flaw, Media};
use super::space::Space;
use fsd_proto::wire::Frame;

/// Bytes stored between two syncs: bounds how long a flush waits for one that has begun, and how much of the backing
/// file is taken by two copies.
const CHUNK: u64 = 32 << 20;
/// How often a block that moves to another frame while it is stored is tried again.
const MOVES: usize = 8;

/// A block to be stored: its place, and the number that tells it from a later one there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub place: Place,
    pub id: u64,
    pub bytes: u32,
}

/// Has the index been made durable since a flush began, with all that it has changed itself?
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Index {
    Unsynced,
    Synced,
}

/// What has been written of a block.
struct Copied {
    target: Target,
    frame: Frame,
    count: u64,
    /// The last page that was kept before memory was read.
    kept: u64,
    /// None: the last copy is as good.
    new: Option<Stored>,
}

/// Stores blocks.
pub struct Flusher {
    pub(super) media: Arc<Media>,
    /// One flush at a time: a later one has read what is at least as new, and is entered later.
    flushing: Mutex<()>,
    /// Something is to be stored although no dirty counter has moved.
    restore: AtomicBool,
}

impl Flusher {
    /// With nothing to store.
    pub fn new(media: &Arc<Media>) -> Self {
        Self {
            media: Arc::clone(media),
            flushing: Mutex::default(),
            restore: AtomicBool::new(false),
        }
    }

    /// Something is to be stored although no dirty counter has moved.
    pub fn is_needed(&self) {
        self.restore.store(true, Ordering::Release);
    }

    fn targets(&self, entries: impl Iterator<Item = (Place, Entry)>) -> Vec<Target> {
        entries
            .filter(|(_, e)| self.media.is_dirty(e))
            .map(|(place, e)| Target {
                place,
                id: e.id,
                bytes: e.frame.size,
            })
            .collect()
    }

    /// Everything that is not stored.
    pub fn unstored(&self) -> Vec<Target> {
        let space = self.media.space.lock();
        self.targets(space.index.all())
    }

    /// Stores everything.
    pub fn flush_all(&self) -> Result<(), StorageError> {
        self.restore.store(false, Ordering::Release);
        let result = self.store_durably(self.unstored());
        if result.is_err() {
            self.restore.store(true, Ordering::Release);
        }
        result
    }

    /// Is there anything for the background to do, whatever the dirty counters say?
    pub fn is_unsettled(&self) -> bool {
        self.restore.load(Ordering::Acquire) || !self.media.space.lock().retired.is_empty()
    }

    /// Stores blocks, and makes all durable that the index was before.
    pub(super) fn store_durably(&self, mut targets: Vec<Target>) -> Result<(), StorageError> {
        // What belongs together comes to lie together.
        targets.sort_unstable_by_key(|t| t.place);
        targets.dedup();
        if self.store_all(targets)? == Index::Synced {
            return Ok(());
        }
        // No block was dirty, but the index may have changes that are not durable yet.
        self.media.sync_index()
    }

    fn store_all(&self, mut targets: Vec<Target>) -> Result<Index, StorageError> {
        let mut index = Index::Unsynced;
        for _ in 0..MOVES {
            let mut moved = Vec::new();
            let mut rest = targets.as_slice();
            while !rest.is_empty() {
                let mut bytes = 0;
                let fits = |t: &&Target| {
                    bytes += u64::from(t.bytes);
                    bytes <= CHUNK
                };
                let count = rest.iter().take_while(fits).count().max(1);
                let (chunk, tail) = rest.split_at(count);
                index = index.max(self.store_chunk(chunk, &mut moved)?);
                rest = tail;
            }
            if moved.is_empty() {
                return Ok(index);
            }
            targets = moved;
        }
        // Frames only become larger, so this cannot be.
        Err(StorageError::Damaged("a block moves all the time".into()))
    }

    /// Stores some blocks; adds to `moved` those that got another frame meanwhile.
    fn store_chunk(&self, mut chunk: &[Target], moved: &mut Vec<Target>) -> Result<Index, StorageError> {
        let _one = self.flushing.lock();
        let mut index = Index::Unsynced;
        let mut emptied = false;
        while !chunk.is_empty() {
            let mut copied = Vec::new();
            let written = self.write_copies(chunk, &mut copied);
            let handled = written.as_ref().map_or_else(|(n, _)| *n, |()| chunk.len());
            if self.enter_copies(copied, moved)? {
                // Now rather than at the end: what the copies replace can take the next ones.
                self.media.sync_index()?;
                index = Index::Synced;
            }
            chunk = &chunk[handled..];
            if let Err((_, error)) = written {
                // A disk that was full has room again for what has just become free, if anything has.
                if handled == 0 && emptied {
                    return Err(error);
                }
                emptied = handled == 0;
                self.media.sync_index()?;
                index = Index::Synced;
            }
        }
        Ok(index)
    }

    /// Writes blocks to free extents. On failure: how many blocks were dealt with before.
    fn write_copies(&self, chunk: &[Target], copied: &mut Vec<Copied>) -> Result<(), (usize, StorageError)> {
        let mut bytes = Vec::new();
        for (n, &target) in chunk.iter().enumerate() {
            let known = {
                let space = self.media.space.lock();
                let entry = space.index.get(target.place.0, target.place.1);
                let entry = entry.filter(|e| e.id == target.id && self.media.is_dirty(e));
                let kept = space.index.kept().last();
                entry.map(|e| (e, self.media.count(&e), kept))
            };
            // Freed, or stored by somebody else meanwhile.
            let Some((entry, count, kept)) = known else {
                continue;
            };
            let frame = entry.frame;
            bytes.resize(frame.size as usize, 0);
            let read = self.media.pool.mem.read_at(frame.offset as usize, &mut bytes);
            read.map_err(|e| (n, e.into()))?;
            let sum = checksum(&bytes);
            let same = |s: Stored| s.sum == sum && s.extent.size == frame.size && !entry.rewrite;
            let new = if entry.stored.is_some_and(same) {
                None
            } else {
                let extent = self.extent_for(&entry).map_err(|e| (n, e))?;
                if let Err(error) = self.media.disk.write(extent.offset, &bytes) {
                    self.media.space.lock().give_extent_back(extent);
                    return Err((n, self.media.io("cannot write", error)));
                }
                Some(Stored { extent, sum })
            };
            copied.push(Copied {
                target,
                frame,
                count,
                kept,
                new,
            });
        }
        Ok(())
    }

    fn extent_for(&self, entry: &Entry) -> Result<Frame, StorageError> {
        if let Some(stored) = entry.stored.filter(|s| s.extent.size == entry.frame.size)
            && self.media.flawed(Flaw::InPlace)
        {
            return Ok(stored.extent);
        }
        let extent = self.media.space.lock().take_extent(entry.frame.size);
        extent.ok_or_else(|| StorageError::Damaged("a block has a frame of an unknown size".into()))
    }

    /// Makes copies durable and has the index name them. True: it has changed.
    fn enter_copies(&self, copied: Vec<Copied>, moved: &mut Vec<Target>) -> Result<bool, StorageError> {
        if copied.iter().any(|c| c.new.is_some())
            && !self.media.flawed(Flaw::IndexFirst)
            && let Err(error) = self.media.disk.sync()
        {
            // What the disk has of them is unknown: they are written again, from memory.
            let mut space = self.media.space.lock();
            for extent in copied.iter().filter_map(|c| c.new.map(|s| s.extent)) {
                space.give_extent_back(extent);
            }
            return Err(self.media.io("cannot sync", error));
        }
        let mut space = self.media.space.lock();
        let mut changed: Vec<(Place, Entry)> = Vec::new();
        let mut replaced: Vec<Frame> = Vec::new();
        let mut useless: Vec<Frame> = Vec::new();
        let mut have: Vec<(Place, u64)> = Vec::new();
        for copy in &copied {
            let Target { place, id, .. } = copy.target;
            let entry = space.index.get(place.0, place.1).filter(|e| e.id == id);
            if entry.is_some_and(|e| e.frame == copy.frame) {
                have.extend(self.kept_by(&space, copy));
            }
            match (entry, copy.new) {
                (Some(e), Some(new)) if e.frame == copy.frame => {
                    replaced.extend(e.stored.map(|s| s.extent).filter(|old| *old != new.extent));
                    changed.push((
                        place,
                        Entry {
                            stored: Some(new),
                            clean_at: Some(copy.count),
                            rewrite: false,
                            ..e
                        },
                    ));
                }
                (Some(e), None) if e.frame == copy.frame => {
                    space.index.note(place, |e| e.clean_at = Some(copy.count));
                }
                (entry, new) => {
                    // Its memory may have been another's before it was read.
                    useless.extend(new.map(|s| s.extent));
                    moved.extend(entry.map(|e| Target {
                        bytes: e.frame.size,
                        ..copy.target
                    }));
                }
            }
        }
        let any = !changed.is_empty() || !have.is_empty() || !useless.is_empty();
        let entered = space.index.set_stored(&changed, &have);
        if entered.is_err() {
            // Whether the store has it after all shows when it is opened again: neither copy is used for anything else.
            replaced.clear();
        }
        for extent in useless {
            space.give_extent_back(extent);
        }
        for extent in replaced {
            self.media.retire(&mut space, extent);
        }
        drop(space);
        if self.media.flawed(Flaw::IndexFirst) {
            self.media.sync_index()?;
            self.media
                .disk
                .sync()
                .map_err(|e| self.media.io("cannot sync", e))?;
        }
        entered?;
        Ok(any)
    }

    /// The pages kept of a block that a copy has, if there are any: with its place, the number up to which it has them.
    fn kept_by(&self, space: &Space, copy: &Copied) -> Option<(Place, u64)> {
        let place = copy.target.place;
        let last = if self.media.flawed(Flaw::KeptForgotten) {
            u64::MAX
        } else {
            copy.kept
        };
        let has = space.index.kept().has_until(place, last) && !self.media.flawed(Flaw::KeptForEver);
        has.then_some((place, last))
    }
}

/// Bytes of blocks.
pub fn bytes_of(targets: &[Target]) -> u64 {
    targets.iter().map(|t| u64::from(t.bytes)).sum()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::crash_disk::{FakeDisk, Journal, recording_store};
    use super::super::crash_tests::{open, put, scratch};
    use super::super::keeping::Wanted;

    #[test]
    fn a_flush_makes_the_index_durable_once() {
        let (journal, dir) = (Arc::new(Journal::default()), scratch());
        let disk = Arc::new(FakeDisk::recording(&journal));
        let blocks = open(dir.path(), disk, Arc::new(recording_store(&journal)), None);
        let syncs = |what: &dyn Fn()| {
            let before = blocks.media.generation.durable();
            what();
            blocks.media.generation.durable() - before
        };
        put(&blocks, (10, 0), b"some").unwrap();
        let some = || Wanted {
            inos: vec![10],
            parts: Vec::new(),
        };
        assert_eq!(
            syncs(&|| blocks.flusher.flush(&some()).unwrap()),
            1,
            "with a block"
        );
        assert_eq!(syncs(&|| blocks.flusher.flush(&some()).unwrap()), 1, "with none");
        put(&blocks, (10, 0), b"more").unwrap();
        put(&blocks, (11, 0), b"of another").unwrap();
        assert_eq!(syncs(&|| blocks.flusher.flush_all().unwrap()), 1, "with all");
    }
}
