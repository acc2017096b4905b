//! Disks and stores of tests: what is on them, and what a power cut leaves of what was not synced.

use std::collections::BTreeMap;
use std::sync::Arc;

use rt::sync::Mutex;

use crate::store::{Batch, Pair, Store, StoreError};

const PAGE: usize = 4096;
/// What a disk writes at once.
const SECTOR: usize = 512;

/// Contents of a file, by page.
pub type Image = BTreeMap<u64, Arc<[u8; PAGE]>>;
/// Contents of a store.
pub type Table = BTreeMap<Vec<u8>, Vec<u8>>;

/// A change of a file.
#[derive(Debug, Clone)]
pub enum Change {
    /// Bytes written at an offset.
    Write(u64, Arc<[u8]>),
    /// A range given back.
    Hole(u64, u64),
}

/// How much of what was not synced is there after a power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Luck {
    /// Nothing.
    None,
    /// All of it; so it is when only the process dies.
    All,
    /// Each write or not, or parts of it; so many of the batches, in order.
    Some,
}

/// One of so many numbers, counted from zero.
pub type Chance<'a> = &'a mut dyn FnMut(usize) -> usize;

/// The pages that a range touches.
#[must_use]
pub fn pages(offset: u64, len: usize) -> std::ops::Range<u64> {
    offset / PAGE as u64..(offset + len as u64).div_ceil(PAGE as u64)
}

/// Reads; what was never written is zeros.
pub fn read(image: &Image, offset: u64, into: &mut [u8]) {
    let mut at = offset;
    let mut rest = into;
    while !rest.is_empty() {
        let start = at as usize % PAGE;
        let (now, later) = rest.split_at_mut((PAGE - start).min(rest.len()));
        match image.get(&(at / PAGE as u64)) {
            Some(page) => now.copy_from_slice(&page[start..start + now.len()]),
            None => now.fill(0),
        }
        at += now.len() as u64;
        rest = later;
    }
}

/// Does the file end before the end of a range?
#[must_use]
pub fn ends_before(image: &Image, offset: u64, len: usize) -> bool {
    let pages = pages(offset, len);
    image.last_key_value().map_or(0, |(last, _)| last + 1) < pages.end
}

/// Writes.
pub fn write(image: &mut Image, offset: u64, from: &[u8]) {
    let mut at = offset;
    let mut rest = from;
    while !rest.is_empty() {
        let start = at as usize % PAGE;
        let (now, later) = rest.split_at((PAGE - start).min(rest.len()));
        let page = image
            .entry(at / PAGE as u64)
            .or_insert_with(|| Arc::new([0; PAGE]));
        Arc::make_mut(page)[start..start + now.len()].copy_from_slice(now);
        at += now.len() as u64;
        rest = later;
    }
}

/// A change reaches the disk, as a whole or those sectors of it that `lands` says.
pub fn land(image: &mut Image, change: &Change, lands: &mut dyn FnMut(usize) -> bool) {
    match change {
        Change::Write(offset, bytes) => {
            for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                if lands(i) {
                    write(image, offset + (i * SECTOR) as u64, sector);
                }
            }
        }
        Change::Hole(offset, len) if lands(0) => write(image, *offset, &vec![0; *len as usize]),
        Change::Hole(..) => {}
    }
}

/// What a power cut leaves of changes that were not synced.
pub fn cut(image: &mut Image, changes: &[Change], luck: Luck, chance: Chance<'_>) {
    for change in changes {
        // Whole, not at all, its beginning, or any sectors of it.
        let sectors = match change {
            Change::Write(_, bytes) => bytes.len() / SECTOR,
            Change::Hole(..) => 1,
        };
        let (kind, part) = (chance(4), chance(sectors + 1));
        land(image, change, &mut |sector| match luck {
            Luck::None => false,
            Luck::All => true,
            Luck::Some => match kind {
                0 => true,
                1 => false,
                2 => sector < part,
                _ => chance(2) == 0,
            },
        });
    }
}

/// Carries a batch out.
pub fn apply(table: &mut Table, batch: &Batch) {
    for (key, value) in batch.ops() {
        match value {
            Some(value) => table.insert(key.clone(), value.clone()),
            None => table.remove(key),
        };
    }
}

/// What a power cut leaves of batches that were not synced: so many of them, in order.
pub fn cut_batches(table: &mut Table, batches: &[Batch], luck: Luck, chance: Chance<'_>) {
    let lands = match luck {
        Luck::None => 0,
        Luck::All => batches.len(),
        Luck::Some => chance(batches.len() + 1),
    };
    for batch in &batches[..lands] {
        apply(table, batch);
    }
}

/// What reaches a store.
#[derive(Debug)]
pub enum Seen {
    /// It has been applied.
    Batch(Batch),
    /// What was applied before is to be durable.
    Sync,
}

type Watch = Box<dyn Fn(Seen) -> Result<(), StoreError> + Send + Sync>;

/// A store in memory; what reaches it is seen by who made it.
#[derive(Default)]
pub struct FakeStore {
    table: Mutex<Table>,
    watch: Option<Watch>,
}

impl FakeStore {
    /// One with contents, which nobody watches.
    #[must_use]
    pub fn with(table: Table) -> Self {
        Self {
            table: Mutex::new(table),
            watch: None,
        }
    }

    /// One with contents that is watched.
    pub fn watched(
        table: Table,
        watch: impl Fn(Seen) -> Result<(), StoreError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            table: Mutex::new(table),
            watch: Some(Box::new(watch)),
        }
    }

    /// What is in it.
    #[must_use]
    pub fn table(&self) -> Table {
        self.table.lock().clone()
    }

    fn tell(&self, seen: Seen) -> Result<(), StoreError> {
        self.watch.as_ref().map_or(Ok(()), |watch| watch(seen))
    }
}

impl Store for FakeStore {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.table.lock().get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], limit: usize) -> Result<Vec<Pair>, StoreError> {
        let table = self.table.lock();
        let range = table.range(from.to_vec()..to.to_vec()).take(limit);
        Ok(range.map(|(k, v)| (k.clone(), v.clone())).collect())
    }

    fn apply(&self, batch: Batch) -> Result<(), StoreError> {
        apply(&mut self.table.lock(), &batch);
        self.tell(Seen::Batch(batch))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.tell(Seen::Sync)
    }

    fn room(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
