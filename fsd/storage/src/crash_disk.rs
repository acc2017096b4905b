//! A disk and a store that remember what was done to them, and the states a power cut can leave of both.

use std::collections::{BTreeMap, HashSet};
use std::io::{Error, ErrorKind};
use std::sync::{Arc, OnceLock};

use rand::Rng;
use rand::rngs::StdRng;
use rt::sync::Mutex;

use super::disk::Disk;
use fsd_node::store::{Batch, Pair, Store, StoreError};

const PAGE: usize = 4096;
/// What a disk writes at once.
const SECTOR: usize = 512;

/// Contents of the backing file, by page.
pub type Image = BTreeMap<u64, Arc<[u8; PAGE]>>;
/// Contents of the store.
pub type Table = BTreeMap<Vec<u8>, Vec<u8>>;

/// Something that reaches a disk.
#[derive(Debug, Clone)]
pub enum Event {
    /// Bytes written to the backing file.
    Write(u64, Arc<[u8]>),
    /// A range given back.
    Hole(u64, u64),
    /// The backing file has been synced.
    DiskSync,
    /// A batch of the store.
    Batch(Batch),
    /// The store has been synced.
    StoreSync,
}

/// Everything that was done, in order.
#[derive(Default)]
pub struct Journal {
    events: Mutex<Vec<Event>>,
    /// Called in the middle of what waits for a disk, where other requests may come in.
    pub meanwhile: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Journal {
    /// How many events there are.
    pub fn len(&self) -> usize {
        self.events.lock().len()
    }

    /// A copy of all.
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().clone()
    }

    fn add(&self, event: Event) {
        self.events.lock().push(event);
    }

    fn meanwhile(&self) {
        if let Some(meanwhile) = self.meanwhile.get() {
            meanwhile();
        }
    }
}

fn read(image: &Image, offset: u64, into: &mut [u8]) {
    for (i, byte) in into.iter_mut().enumerate() {
        let at = offset + i as u64;
        *byte = image
            .get(&(at / PAGE as u64))
            .map_or(0, |page| page[at as usize % PAGE]);
    }
}

fn write(image: &mut Image, offset: u64, from: &[u8]) {
    for (i, chunk) in from.chunks(SECTOR).enumerate() {
        let at = offset + (i * SECTOR) as u64;
        let page = image
            .entry(at / PAGE as u64)
            .or_insert_with(|| Arc::new([0; PAGE]));
        let start = at as usize % PAGE;
        Arc::make_mut(page)[start..start + chunk.len()].copy_from_slice(chunk);
    }
}

/// The backing file.
#[derive(Default)]
pub struct FakeDisk {
    image: Mutex<Image>,
    journal: Option<Arc<Journal>>,
    /// Pages that cannot be read.
    pub bad: Mutex<HashSet<u64>>,
    /// The process dies at this read.
    pub dies_at_read: Mutex<Option<u64>>,
}

impl FakeDisk {
    /// One that writes down what is done to it.
    pub fn recording(journal: &Arc<Journal>) -> Self {
        Self {
            journal: Some(Arc::clone(journal)),
            ..Self::default()
        }
    }

    /// One with contents.
    pub fn with(image: Image) -> Self {
        Self {
            image: Mutex::new(image),
            ..Self::default()
        }
    }

    /// What is on it.
    pub fn image(&self) -> Image {
        self.image.lock().clone()
    }

    /// Flips a bit.
    pub fn flip(&self, offset: u64) {
        let mut byte = [0];
        let mut image = self.image.lock();
        read(&image, offset, &mut byte);
        let page = image.get_mut(&(offset / PAGE as u64)).unwrap();
        Arc::make_mut(page)[offset as usize % PAGE] = byte[0] ^ 4;
    }
}

impl Disk for FakeDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        if let Some(left) = self.dies_at_read.lock().as_mut() {
            if *left == 0 {
                // Nothing of the process is executed after this.
                std::panic::panic_any("the process dies here");
            }
            *left -= 1;
        }
        let pages = offset / PAGE as u64..(offset + into.len() as u64).div_ceil(PAGE as u64);
        if pages.clone().any(|p| self.bad.lock().contains(&p)) {
            return Err(Error::from_raw_os_error(libc::EIO));
        }
        let image = self.image.lock();
        if !pages.clone().all(|p| image.contains_key(&p)) && image.keys().all(|&p| p < pages.end - 1) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        read(&image, offset, into);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        if let Some(journal) = &self.journal {
            journal.meanwhile();
            journal.add(Event::Write(offset, from.into()));
        }
        write(&mut self.image.lock(), offset, from);
        Ok(())
    }

    fn sync(&self) -> std::io::Result<()> {
        if let Some(journal) = &self.journal {
            // What comes in before it has ended need not be covered; it does not write here.
            journal.meanwhile();
            journal.add(Event::DiskSync);
            journal.meanwhile();
        }
        Ok(())
    }

    fn give_back(&self, offset: u64, len: u64) -> std::io::Result<()> {
        if let Some(journal) = &self.journal {
            journal.add(Event::Hole(offset, len));
        }
        write(&mut self.image.lock(), offset, &vec![0; len as usize]);
        Ok(())
    }

    fn uncache(&self, _offset: u64, _len: u64) {}
}

/// The index's store: batches survive the process when applied, the machine when synced.
#[derive(Default)]
pub struct FakeStore {
    table: Mutex<Table>,
    journal: Option<Arc<Journal>>,
}

impl FakeStore {
    /// One that writes down what is done to it.
    pub fn recording(journal: &Arc<Journal>) -> Self {
        Self {
            journal: Some(Arc::clone(journal)),
            ..Self::default()
        }
    }

    /// One with contents.
    pub fn with(table: Table) -> Self {
        Self {
            table: Mutex::new(table),
            journal: None,
        }
    }
}

fn apply(table: &mut Table, batch: &Batch) {
    for (key, value) in batch.ops() {
        match value {
            Some(value) => table.insert(key.clone(), value.clone()),
            None => table.remove(key),
        };
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
        if let Some(journal) = &self.journal {
            journal.add(Event::Batch(batch));
        }
        Ok(())
    }

    fn sync(&self) -> Result<(), StoreError> {
        if let Some(journal) = &self.journal {
            journal.add(Event::StoreSync);
            journal.meanwhile();
        }
        Ok(())
    }

    fn room(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Goes through a journal and makes the states that a power cut after each event can leave.
pub struct Cuts {
    events: Vec<Event>,
    at: usize,
    /// What is durable at `at` in any case …
    image: Image,
    table: Table,
    /// … and what may or may not be.
    writes: Vec<Event>,
    batches: Vec<Batch>,
}

/// How much of what was not synced reached the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Luck {
    /// Nothing.
    None,
    /// All of it.
    All,
    /// Each write or not, or parts of it; so many of the batches, in order.
    Some,
}

impl Cuts {
    /// From the beginning.
    pub fn new(events: Vec<Event>) -> Self {
        Self {
            events,
            at: 0,
            image: Image::new(),
            table: Table::new(),
            writes: Vec::new(),
            batches: Vec::new(),
        }
    }

    /// One event more has happened; its number, counted from one.
    pub fn step(&mut self) -> Option<usize> {
        let event = self.events.get(self.at)?.clone();
        self.at += 1;
        match event {
            Event::Write(..) | Event::Hole(..) => self.writes.push(event),
            Event::Batch(batch) => self.batches.push(batch),
            Event::DiskSync => {
                for event in self.writes.drain(..) {
                    land(&mut self.image, &event, &mut |_| true);
                }
            }
            Event::StoreSync => {
                for batch in self.batches.drain(..) {
                    apply(&mut self.table, &batch);
                }
            }
        }
        Some(self.at)
    }

    /// A state that is left if the power goes now.
    pub fn state(&self, luck: Luck, rng: &mut StdRng) -> (Image, Table) {
        let (mut image, mut table) = (self.image.clone(), self.table.clone());
        for event in &self.writes {
            // Whole, not at all, its beginning, or any sectors of it.
            let sectors = match event {
                Event::Write(_, bytes) => bytes.len() / SECTOR,
                _ => 1,
            };
            let (kind, cut) = (rng.random_range(0..4), rng.random_range(0..=sectors));
            land(&mut image, event, &mut |sector| match luck {
                Luck::None => false,
                Luck::All => true,
                Luck::Some => match kind {
                    0 => true,
                    1 => false,
                    2 => sector < cut,
                    _ => rng.random(),
                },
            });
        }
        let batches = match luck {
            Luck::None => 0,
            Luck::All => self.batches.len(),
            Luck::Some => rng.random_range(0..=self.batches.len()),
        };
        for batch in &self.batches[..batches] {
            apply(&mut table, batch);
        }
        (image, table)
    }
}

/// Parts of a write reach the disk.
fn land(image: &mut Image, event: &Event, lands: &mut dyn FnMut(usize) -> bool) {
    match event {
        Event::Write(offset, bytes) => {
            for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                if lands(i) {
                    write(image, offset + (i * SECTOR) as u64, sector);
                }
            }
        }
        Event::Hole(offset, len) if lands(0) => write(image, *offset, &vec![0; *len as usize]),
        _ => {}
    }
}
