//! Pages of blocks that are kept in the index's store until their block is stored anew.
//!
//! Storing a block takes two syncs, of the backing file and of the index, and all of the block is written. What is small is made
//! durable by the index's sync alone: its pages are put beside the entries, and a power cut leaves the block's copy with those pages
//! over it. When the block is stored, the same batch that names the new copy removes the pages that it has.
//!
//! A page may be kept once more between the reading of a block's memory and the change of the index: that one is newer than the copy,
//! and stays. So each has a number, and a copy says which was the last when its memory was read.

use std::collections::{BTreeMap, HashMap};

use super::error::StorageError;
use fsd_node::store::{Batch, Store, StoreError};
use fsd_proto::layout::BLOCK;

/// Bytes of a page.
pub const PAGE: u32 = 4096;
/// Most pages that are kept: they are in the store's memory, and are read at start.
const MOST: usize = 4096;
/// First byte of their keys …
const PREFIX: u8 = b'l';
/// … and the first of what comes after them.
const AFTER: u8 = PREFIX + 1;
/// Pages read at once.
const AT_ONCE: usize = 256;

/// A block: inode and number in the file.
pub type Place = (u64, u64);

/// A page of a block: by its offset there.
pub type Page = (Place, u32, Vec<u8>);

fn key((ino, block): Place, at: u32) -> Vec<u8> {
    let mut key = Vec::with_capacity(21);
    key.push(PREFIX);
    key.extend_from_slice(&ino.to_be_bytes());
    key.extend_from_slice(&block.to_be_bytes());
    key.extend_from_slice(&at.to_be_bytes());
    key
}

fn decode(key: &[u8], value: &[u8]) -> Option<(Place, u32)> {
    let key: &[u8; 21] = key.try_into().ok()?;
    let ino = u64::from_be_bytes(key[1..9].try_into().ok()?);
    let block = u64::from_be_bytes(key[9..17].try_into().ok()?);
    let at = u32::from_be_bytes(key[17..].try_into().ok()?);
    let right = at.is_multiple_of(PAGE) && u64::from(at) < BLOCK && value.len() == PAGE as usize;
    right.then_some(((ino, block), at))
}

/// What is kept of each block.
#[derive(Debug, Default)]
pub struct Kept {
    /// Pages by block and offset there: when it was kept last.
    pages: HashMap<Place, BTreeMap<u32, u64>>,
    count: usize,
    /// The number of the page that was kept last.
    last: u64,
}

impl Kept {
    /// What an earlier life has kept.
    pub fn load(store: &dyn Store) -> Result<Self, StorageError> {
        let mut kept = Self::default();
        each(store, |place, at, _| {
            kept.note(place, at);
            Ok(())
        })?;
        Ok(kept)
    }

    fn note(&mut self, place: Place, at: u32) {
        self.last += 1;
        if self
            .pages
            .entry(place)
            .or_default()
            .insert(at, self.last)
            .is_none()
        {
            self.count += 1;
        }
    }

    /// The number of the page that was kept last.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Can so many more be kept?
    pub fn has_room(&self, pages: usize) -> bool {
        self.count + pages <= MOST
    }

    /// Is anything of a block kept?
    pub fn has(&self, place: Place) -> bool {
        self.pages.contains_key(&place)
    }

    /// Has a copy of a block that was read from memory when `last` was the last page all of a page that is kept of it?
    pub fn has_until(&self, place: Place, last: u64) -> bool {
        let pages = self.pages.get(&place);
        pages.is_some_and(|pages| pages.values().any(|&number| number <= last))
    }

    /// Keeps pages.
    ///
    /// # Errors
    /// [`StoreError`]; nothing has then changed.
    pub fn keep(&mut self, store: &dyn Store, pages: Vec<Page>) -> Result<(), StoreError> {
        if pages.is_empty() {
            return Ok(());
        }
        let places: Vec<(Place, u32)> = pages.iter().map(|(place, at, _)| (*place, *at)).collect();
        let mut batch = Batch::default();
        for (place, at, bytes) in pages {
            batch.put(key(place, at), bytes);
        }
        store.apply(batch)?;
        for (place, at) in places {
            self.note(place, at);
        }
        Ok(())
    }

    /// Adds to a batch that the pages of a block up to this number are not kept any more.
    pub fn unkeep(&self, place: Place, last: u64, batch: &mut Batch) {
        for (&at, &number) in self.pages.get(&place).into_iter().flatten() {
            if number <= last {
                batch.delete(key(place, at));
            }
        }
    }

    /// That batch has been applied.
    pub fn unkept(&mut self, place: Place, last: u64) {
        if let Some(pages) = self.pages.get_mut(&place) {
            let before = pages.len();
            pages.retain(|_, number| *number > last);
            self.count -= before - pages.len();
            if pages.is_empty() {
                self.pages.remove(&place);
            }
        }
    }
}

/// What is done with each page.
type Take<'a> = &'a mut dyn FnMut(Place, u32, &[u8]) -> Result<(), StorageError>;

/// Goes through all pages that are kept.
pub fn each(
    store: &dyn Store,
    mut take: impl FnMut(Place, u32, &[u8]) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    scan(store, vec![PREFIX], &[AFTER], &mut take)
}

/// Goes through the pages that are kept of a block.
pub fn each_of(
    store: &dyn Store,
    place: Place,
    mut take: impl FnMut(u32, &[u8]) -> Result<(), StorageError>,
) -> Result<(), StorageError> {
    let end = key(place, u32::MAX);
    scan(store, key(place, 0), &end, &mut |_, at, bytes| take(at, bytes))
}

fn scan(store: &dyn Store, mut from: Vec<u8>, to: &[u8], take: Take<'_>) -> Result<(), StorageError> {
    loop {
        let pairs = store.scan(&from, to, AT_ONCE)?;
        for (key, value) in &pairs {
            let (place, at) = decode(key, value)
                .ok_or_else(|| StorageError::Damaged(format!("a kept page of {} bytes", value.len())))?;
            take(place, at, value)?;
        }
        let Some((last, _)) = pairs.last() else {
            return Ok(());
        };
        from.clone_from(last);
        from.push(0);
    }
}
