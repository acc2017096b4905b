//! The persistent index (inode, block) → frame, held in memory and in the store.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::store::{Batch, Store, StoreError};
use crate::wire::{BlockFrame, Frame};

/// A frame and whether the backing file has ever got its contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub frame: Frame,
    /// After a crash of the machine only such blocks still have their contents.
    pub stored: bool,
}

const VALUE_LEN: usize = 13;

fn key(ino: u64, block: u64) -> Vec<u8> {
    let mut key = Vec::with_capacity(17);
    key.push(b'b');
    key.extend_from_slice(&ino.to_be_bytes());
    key.extend_from_slice(&block.to_be_bytes());
    key
}

fn encode(entry: &Entry) -> Vec<u8> {
    let mut value = Vec::with_capacity(VALUE_LEN);
    value.extend_from_slice(&entry.frame.offset.to_le_bytes());
    value.extend_from_slice(&entry.frame.size.to_le_bytes());
    value.push(u8::from(entry.stored));
    value
}

fn decode(key: &[u8], value: &[u8]) -> Option<(u64, u64, Entry)> {
    let ino = u64::from_be_bytes(key.get(1..9)?.try_into().ok()?);
    let block = u64::from_be_bytes(key.get(9..17)?.try_into().ok()?);
    let offset = u64::from_le_bytes(value.get(0..8)?.try_into().ok()?);
    let size = u32::from_le_bytes(value.get(8..12)?.try_into().ok()?);
    let stored = *value.get(12)? != 0;
    Some((
        ino,
        block,
        Entry {
            frame: Frame { offset, size },
            stored,
        },
    ))
}

/// The index of one storage node.
pub struct Index {
    store: Arc<dyn Store>,
    files: HashMap<u64, BTreeMap<u64, Entry>>,
}

impl Index {
    /// Loads everything; `keep` decides, entry by entry, what is still valid (the rest is removed).
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn load(
        store: Arc<dyn Store>,
        mut keep: impl FnMut(u64, u64, &Entry) -> bool,
    ) -> Result<Self, StoreError> {
        let mut files: HashMap<u64, BTreeMap<u64, Entry>> = HashMap::new();
        let mut from = vec![b'b'];
        let mut dropped = Batch::default();
        loop {
            let pairs = store.scan(&from, b"c", 10_000)?;
            let Some((last, _)) = pairs.last() else { break };
            from.clone_from(last);
            from.push(0);
            for (k, v) in &pairs {
                match decode(k, v) {
                    Some((ino, block, entry)) if keep(ino, block, &entry) => {
                        files.entry(ino).or_default().insert(block, entry);
                    }
                    _ => dropped.delete(k.clone()),
                }
            }
        }
        if !dropped.is_empty() {
            store.apply(dropped)?;
        }
        Ok(Self { store, files })
    }

    /// Can more entries be stored?
    ///
    /// # Errors
    /// [`StoreError::Full`].
    pub fn room(&self) -> Result<(), StoreError> {
        self.store.room()
    }

    /// The frame of a block.
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
                })
                .collect()
        })
    }

    /// All entries of an inode.
    #[must_use]
    pub fn entries(&self, ino: u64) -> Vec<(u64, Entry)> {
        self.files
            .get(&ino)
            .map_or_else(Vec::new, |blocks| blocks.iter().map(|(&b, &e)| (b, e)).collect())
    }

    /// Every entry of the node.
    pub fn all(&self) -> impl Iterator<Item = (u64, u64, Entry)> + '_ {
        self.files
            .iter()
            .flat_map(|(&ino, blocks)| blocks.iter().map(move |(&b, &e)| (ino, b, e)))
    }

    /// Sets entries, atomically in the store.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn set(&mut self, entries: &[(u64, u64, Entry)]) -> Result<(), StoreError> {
        let mut batch = Batch::default();
        for (ino, block, entry) in entries {
            batch.put(key(*ino, *block), encode(entry));
        }
        self.store.apply(batch)?;
        for (ino, block, entry) in entries {
            self.files.entry(*ino).or_default().insert(*block, *entry);
        }
        Ok(())
    }

    /// Removes the blocks `first ..= last` of an inode and returns their frames.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn remove(&mut self, ino: u64, first: u64, last: u64) -> Result<Vec<Frame>, StoreError> {
        if first > last {
            return Ok(Vec::new());
        }
        let Some(blocks) = self.files.get_mut(&ino) else {
            return Ok(Vec::new());
        };
        let gone: Vec<(u64, Frame)> = blocks.range(first..=last).map(|(&b, e)| (b, e.frame)).collect();
        let mut batch = Batch::default();
        for (block, _) in &gone {
            batch.delete(key(ino, *block));
        }
        self.store.apply(batch)?;
        for (block, _) in &gone {
            blocks.remove(block);
        }
        if blocks.is_empty() {
            self.files.remove(&ino);
        }
        Ok(gone.into_iter().map(|(_, frame)| frame).collect())
    }

    /// Marks blocks as stored where they still have the frame given, and makes the index durable.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn mark_stored(&mut self, blocks: &[(u64, u64, Frame)]) -> Result<(), StoreError> {
        let changed: Vec<(u64, u64, Entry)> = blocks
            .iter()
            .filter(|(ino, block, frame)| {
                self.get(*ino, *block)
                    .is_some_and(|e| e.frame == *frame && !e.stored)
            })
            .map(|&(ino, block, frame)| (ino, block, Entry { frame, stored: true }))
            .collect();
        if changed.is_empty() {
            Ok(())
        } else {
            self.set(&changed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FjallStore;

    #[test]
    fn entries_survive_and_unstored_ones_can_be_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let frame = |offset| Frame { offset, size: 4096 };
        {
            let store = Arc::new(FjallStore::open(dir.path()).unwrap());
            let mut index = Index::load(store, |_, _, _| true).unwrap();
            index
                .set(&[
                    (
                        5,
                        0,
                        Entry {
                            frame: frame(0),
                            stored: false,
                        },
                    ),
                    (
                        5,
                        9,
                        Entry {
                            frame: frame(4096),
                            stored: false,
                        },
                    ),
                    (
                        6,
                        1,
                        Entry {
                            frame: frame(8192),
                            stored: false,
                        },
                    ),
                ])
                .unwrap();
            index
                .mark_stored(&[(5, 9, frame(4096)), (6, 1, frame(0))])
                .unwrap();
            assert_eq!(index.remove(6, 0, u64::MAX).unwrap(), vec![frame(8192)]);
        }
        let store = Arc::new(FjallStore::open(dir.path()).unwrap());
        let index = Index::load(store, |_, _, e| e.stored).unwrap();
        assert_eq!(
            index.lookup(5, 0, 10),
            vec![BlockFrame {
                block: 9,
                frame: frame(4096)
            }]
        );
        assert_eq!(index.all().count(), 1);
    }
}
