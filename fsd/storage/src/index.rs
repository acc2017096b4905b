//! The persistent index (inode, block) → frame in the pool and extent in the backing file, held in memory and in the
//! store.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::error::StorageError;
use super::kept::{Kept, Page};
use fsd_node::store::{Batch, Store, StoreError};
use fsd_proto::wire::{BlockFrame, BlockRange, Frame};

pub use super::kept::Place;

/// Where the backing file has a block's contents, and what they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Place in the backing file. Shorter than the block's frame if that was replaced by a larger one since.
    pub extent: Frame,
    /// Checksum of the extent.
    pub sum: u64,
}

/// What is known of a block. The first three fields are kept in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where it is in memory.
    pub frame: Frame,
    /// Where it is on disk: what it keeps after a crash of the machine, until it is stored anew *elsewhere*. Never goes
    /// from something to nothing.
    pub stored: Option<Stored>,
    /// Its contents could not be read when the pool was loaded: the frame holds nothing, and reads are EIO.
    pub lost: bool,
    /// Distinguishes this block from one that had its number before and was freed.
    pub id: u64,
    /// What `Media::count` was before that was read from memory which `stored` has; if it has not moved since, there is
    /// nothing to store.
    pub clean_at: Option<u64>,
    /// As `clean_at`, of what the last copy and the pages that are kept have together: a FLUSH need not do anything for it.
    pub kept_at: Option<u64>,
    /// How often this node itself has written to its memory: the counter of the slab is a device's to change, whose atomics are none
    /// beside the processor's.
    pub taken: u64,
    /// The copy on disk is damaged: to be stored even if it seems to be what is in memory.
    pub rewrite: bool,
}

impl Entry {
    /// A block that has just got a frame.
    #[must_use]
    pub fn fresh(frame: Frame) -> Self {
        Self {
            frame,
            stored: None,
            lost: false,
            id: 0,
            clean_at: None,
            kept_at: None,
            taken: 0,
            rewrite: false,
        }
    }
}

/// Bytes of a value: frame, flags, extent, checksum. What is in it is part of the format that the label names.
const VALUE_LEN: usize = 33;
const FLAG_STORED: u8 = 1;
const FLAG_LOST: u8 = 2;

fn key(ino: u64, block: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.push(b'b');
    key.extend_from_slice(&ino.to_be_bytes());
    key.extend_from_slice(&block.to_be_bytes());
    key
}

fn encode(entry: &Entry) -> Vec<u8> {
    let stored = entry.stored.unwrap_or(Stored {
        extent: Frame { offset: 0, size: 0 },
        sum: 0,
    });
    let mut flags = 0;
    if entry.stored.is_some() {
        flags |= FLAG_STORED;
    }
    if entry.lost {
        flags |= FLAG_LOST;
    }
    let mut value = Vec::with_capacity(VALUE_LEN);
    value.extend_from_slice(&entry.frame.offset.to_le_bytes());
    value.extend_from_slice(&entry.frame.size.to_le_bytes());
    value.push(flags);
    value.extend_from_slice(&stored.extent.offset.to_le_bytes());
    value.extend_from_slice(&stored.extent.size.to_le_bytes());
    value.extend_from_slice(&stored.sum.to_le_bytes());
    value
}

fn decode(key: &[u8], value: &[u8]) -> Option<(u64, u64, Entry)> {
    let ino = u64::from_be_bytes(key.get(1..9)?.try_into().ok()?);
    let block = u64::from_be_bytes(key.get(9..17)?.try_into().ok()?);
    let value: &[u8; VALUE_LEN] = value.try_into().ok()?;
    let u64_at = |at: usize| {
        value[at..at + 8]
            .iter()
            .rev()
            .fold(0u64, |n, &b| n << 8 | u64::from(b))
    };
    let u32_at = |at: usize| {
        value[at..at + 4]
            .iter()
            .rev()
            .fold(0u32, |n, &b| n << 8 | u32::from(b))
    };
    let flags = value[12];
    let entry = Entry {
        stored: (flags & FLAG_STORED != 0).then(|| Stored {
            extent: Frame {
                offset: u64_at(13),
                size: u32_at(21),
            },
            sum: u64_at(25),
        }),
        lost: flags & FLAG_LOST != 0,
        ..Entry::fresh(Frame {
            offset: u64_at(0),
            size: u32_at(8),
        })
    };
    Some((ino, block, entry))
}

/// The index of one storage node.
pub struct Index {
    store: Arc<dyn Store>,
    files: HashMap<u64, BTreeMap<u64, Entry>>,
    next_id: u64,
    kept: Kept,
}

impl Index {
    /// Reads all of it.
    ///
    /// # Errors
    /// [`StorageError::Damaged`] for an entry that cannot be read; the store's.
    pub fn load(store: Arc<dyn Store>) -> Result<Self, StorageError> {
        let mut files: HashMap<u64, BTreeMap<u64, Entry>> = HashMap::new();
        let mut from = vec![b'b'];
        let mut next_id = 1;
        loop {
            let pairs = store.scan(&from, b"c", 10_000)?;
            let Some((last, _)) = pairs.last() else { break };
            from.clone_from(last);
            from.push(0);
            for (k, v) in &pairs {
                let (ino, block, mut entry) = decode(k, v)
                    .ok_or_else(|| StorageError::Damaged(format!("an entry of {} bytes", v.len())))?;
                entry.id = next_id;
                next_id += 1;
                files.entry(ino).or_default().insert(block, entry);
            }
        }
        Ok(Self {
            kept: Kept::load(store.as_ref())?,
            store,
            files,
            next_id,
        })
    }

    /// Can more entries be stored?
    ///
    /// # Errors
    /// [`StoreError::Full`].
    pub fn room(&self) -> Result<(), StoreError> {
        self.store.room()
    }

    /// A number for a block that was not there before.
    pub fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    /// What is known of a block.
    #[must_use]
    pub fn get(&self, ino: u64, block: u64) -> Option<Entry> {
        self.files.get(&ino)?.get(&block).copied()
    }

    /// Frames of the blocks from `first` on, at most `count`.
    #[must_use]
    pub fn lookup(&self, ino: u64, first: u64, count: usize) -> Vec<BlockFrame> {
        self.files.get(&ino).map_or_else(Vec::new, |blocks| {
            blocks
                .range(first..)
                .take(count)
                .map(|(&block, e)| BlockFrame {
                    block,
                    frame: e.frame,
                    lost: e.lost,
                })
                .collect()
        })
    }

    /// All entries of an inode.
    pub fn entries(&self, ino: u64) -> impl Iterator<Item = (Place, Entry)> + '_ {
        self.files
            .get(&ino)
            .into_iter()
            .flat_map(move |blocks| blocks.iter().map(move |(&b, &e)| ((ino, b), e)))
    }

    /// Every entry of the node.
    pub fn all(&self) -> impl Iterator<Item = (Place, Entry)> + '_ {
        self.files
            .iter()
            .flat_map(|(&ino, blocks)| blocks.iter().map(move |(&b, &e)| ((ino, b), e)))
    }

    /// The inodes greater than `after` that have blocks, at most `count`, in order.
    #[must_use]
    pub fn inodes(&self, after: u64, count: usize) -> Vec<u64> {
        let mut inos: Vec<u64> = self.files.keys().copied().filter(|&ino| ino > after).collect();
        if inos.len() > count {
            inos.select_nth_unstable(count);
            inos.truncate(count);
        }
        inos.sort_unstable();
        inos
    }

    /// Changes what is not kept in the store.
    pub fn note(&mut self, (ino, block): Place, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.files.get_mut(&ino).and_then(|f| f.get_mut(&block)) {
            change(entry);
        }
    }

    /// Sets entries, atomically in the store.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn set(&mut self, entries: &[(Place, Entry)]) -> Result<(), StoreError> {
        self.set_stored(entries, &[])
    }

    /// As [`Index::set`], of blocks that have new copies: pages that are kept of a place, up to the number beside it, are no more.
    ///
    /// # Errors
    /// As [`Index::set`].
    pub fn set_stored(
        &mut self,
        entries: &[(Place, Entry)],
        have: &[(Place, u64)],
    ) -> Result<(), StoreError> {
        if entries.is_empty() && have.is_empty() {
            return Ok(());
        }
        let mut batch = Batch::default();
        for &(place, last) in have {
            self.kept.unkeep(place, last, &mut batch);
        }
        for ((ino, block), entry) in entries {
            batch.put(key(*ino, *block), encode(entry));
        }
        self.store.apply(batch)?;
        for ((ino, block), entry) in entries {
            self.files.entry(*ino).or_default().insert(*block, *entry);
        }
        for &(place, last) in have {
            self.kept.unkept(place, last);
        }
        Ok(())
    }

    /// Keeps pages in the store, atomically.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn keep(&mut self, pages: Vec<Page>) -> Result<(), StoreError> {
        self.kept.keep(self.store.as_ref(), pages)
    }

    /// The pages that are kept.
    #[must_use]
    pub(super) fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Removes blocks, atomically in the store, and returns what was known of them.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn remove(&mut self, ranges: &[BlockRange]) -> Result<Vec<Entry>, StoreError> {
        let mut places: Vec<Place> = Vec::new();
        for &BlockRange { ino, first, last } in ranges.iter().filter(|r| r.first <= r.last) {
            let blocks = self.files.get(&ino).map(|blocks| blocks.range(first..=last));
            places.extend(blocks.into_iter().flatten().map(|(&block, _)| (ino, block)));
        }
        self.drop_all(&places)
    }

    /// Removes blocks and returns what was known of them.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn drop_all(&mut self, places: &[Place]) -> Result<Vec<Entry>, StoreError> {
        if places.is_empty() {
            return Ok(Vec::new());
        }
        let mut batch = Batch::default();
        for (ino, block) in places {
            batch.delete(key(*ino, *block));
            self.kept.unkeep((*ino, *block), u64::MAX, &mut batch);
        }
        self.store.apply(batch)?;
        let mut gone = Vec::with_capacity(places.len());
        for (ino, block) in places {
            self.kept.unkept((*ino, *block), u64::MAX);
            if let Some(blocks) = self.files.get_mut(ino) {
                gone.extend(blocks.remove(block));
                if blocks.is_empty() {
                    self.files.remove(ino);
                }
            }
        }
        Ok(gone)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::store::FjallStore;

    #[test]
    fn entries_survive() {
        let dir = tempfile::tempdir().unwrap();
        let frame = |offset| Frame { offset, size: 4096 };
        let stored = Entry {
            stored: Some(Stored {
                extent: Frame {
                    offset: 77 << 40,
                    size: 16384,
                },
                sum: u64::MAX - 5,
            }),
            lost: true,
            ..Entry::fresh(frame(4096))
        };
        {
            let store = Arc::new(FjallStore::open(dir.path()).unwrap());
            let mut index = Index::load(store).unwrap();
            index
                .set(&[
                    ((5, 0), Entry::fresh(frame(0))),
                    ((5, 9), stored),
                    ((6, 1), Entry::fresh(frame(8192))),
                    ((7, 0), Entry::fresh(frame(12288))),
                    ((7, 1), Entry::fresh(frame(16384))),
                ])
                .unwrap();
            // One of them twice, and one that is not there.
            let ranges = [(6, 0, u64::MAX), (7, 0, 0), (7, 0, 1), (8, 0, 9), (5, 9, 0)];
            let ranges = ranges.map(|(ino, first, last)| BlockRange { ino, first, last });
            let gone = index.remove(&ranges).unwrap();
            assert_eq!(gone, [8192, 12288, 16384].map(|at| Entry::fresh(frame(at))));
        }
        let store = Arc::new(FjallStore::open(dir.path()).unwrap());
        let index = Index::load(Arc::clone(&store) as Arc<dyn Store>).unwrap();
        let back = index.get(5, 9).unwrap();
        assert_eq!(Entry { id: 0, ..back }, stored);
        assert_eq!(index.lookup(5, 1, 10).len(), 1);
        assert_eq!(index.all().count(), 2);
        let mut batch = Batch::default();
        batch.put(key(9, 9), vec![0; 13]);
        store.apply(batch).unwrap();
        assert!(
            Index::load(store).is_err(),
            "an entry of an older format is not passed over"
        );
    }
}
