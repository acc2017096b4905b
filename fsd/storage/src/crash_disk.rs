//! A disk and a store that remember what was done to them, and the states a power cut can leave of both.

use std::collections::HashSet;
use std::io::{Error, ErrorKind};
use std::sync::{Arc, OnceLock};

use rand::Rng;
use rand::rngs::StdRng;
use rt::sync::Mutex;

use super::disk::Disk;
use fsd_node::fake_disk::{self, Change, FakeStore, Image, Luck, Seen, Table};
use fsd_node::fake_disk::{apply, cut, cut_batches, ends_before, land, read, write};
use fsd_node::store::Batch;

/// Something that reaches a disk.
#[derive(Debug, Clone)]
pub enum Event {
    /// A change of the backing file.
    Disk(Change),
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
        write(&mut image, offset, &[byte[0] ^ 4]);
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
        if fake_disk::pages(offset, into.len()).any(|p| self.bad.lock().contains(&p)) {
            return Err(Error::from_raw_os_error(libc::EIO));
        }
        let image = self.image.lock();
        if ends_before(&image, offset, into.len()) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        read(&image, offset, into);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        if let Some(journal) = &self.journal {
            journal.meanwhile();
            journal.add(Event::Disk(Change::Write(offset, from.into())));
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
            journal.add(Event::Disk(Change::Hole(offset, len)));
        }
        write(&mut self.image.lock(), offset, &vec![0; len as usize]);
        Ok(())
    }

    fn uncache(&self, _offset: u64, _len: u64) {}
}

/// The index's store, whose changes are written down: batches survive the process when applied, the machine when synced.
pub fn recording_store(journal: &Arc<Journal>) -> FakeStore {
    let journal = Arc::clone(journal);
    FakeStore::watched(Table::new(), move |seen| {
        match seen {
            Seen::Batch(batch) => journal.add(Event::Batch(batch)),
            Seen::Sync => {
                journal.add(Event::StoreSync);
                journal.meanwhile();
            }
        }
        Ok(())
    })
}

/// Goes through a journal and makes the states that a power cut after each event can leave.
pub struct Cuts {
    events: Vec<Event>,
    at: usize,
    /// What is durable at `at` in any case …
    image: Image,
    table: Table,
    /// … and what may or may not be.
    writes: Vec<Change>,
    batches: Vec<Batch>,
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
            Event::Disk(change) => self.writes.push(change),
            Event::Batch(batch) => self.batches.push(batch),
            Event::DiskSync => {
                for change in self.writes.drain(..) {
                    land(&mut self.image, &change, &mut |_| true);
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
        let mut chance = |n| rng.random_range(0..n);
        cut(&mut image, &self.writes, luck, &mut chance);
        cut_batches(&mut table, &self.batches, luck, &mut chance);
        (image, table)
    }
}
