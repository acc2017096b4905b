//! Simulated disks: what was not synced may be lost or torn, and a server that has died cannot write any more.

use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fsd_node::fake_disk::{self, Change, FakeStore, Image, Luck, Seen, Table};
use fsd_node::store::{Batch, StoreError};
use fsd_storage::disk::Disk;
use rt::sync::Mutex;

/// How long a sync takes at most.
const SYNC: u64 = 400_000;
/// How long reading or writing takes at most.
const MOVE: u64 = 40_000;

/// Lets a random time pass, at most so many nanoseconds.
fn take(most: u64) {
    rt::thread::sleep(Duration::from_nanos(rt::sim::chance() % most));
}

fn one_of(n: usize) -> usize {
    (rt::sim::chance() % n.max(1) as u64) as usize
}

/// What can be wrong with a disk.
#[derive(Debug, Default)]
pub struct Faults {
    /// No write finds room.
    pub full: AtomicBool,
    /// No read succeeds.
    pub unreadable: AtomicBool,
}

/// The backing file of a storage node: outlives the node.
#[derive(Default)]
pub struct Platter {
    durable: Mutex<Image>,
    live: Mutex<Image>,
    pending: Mutex<Vec<Change>>,
    /// What is wrong with it.
    pub faults: Faults,
}

impl Platter {
    /// The power goes, or only the process dies: then everything is there.
    pub fn cut(&self, luck: Luck) {
        let changes = std::mem::take(&mut *self.pending.lock());
        let mut durable = self.durable.lock();
        fake_disk::cut(&mut durable, &changes, luck, &mut one_of);
        *self.live.lock() = durable.clone();
    }
}

/// A platter as one life of a server has it.
pub struct SimDisk {
    platter: Arc<Platter>,
    alive: Arc<AtomicBool>,
}

impl SimDisk {
    /// For a life that ends when `alive` says so.
    #[must_use]
    pub fn new(platter: &Arc<Platter>, alive: &Arc<AtomicBool>) -> Self {
        Self {
            platter: Arc::clone(platter),
            alive: Arc::clone(alive),
        }
    }

    fn check(&self) -> std::io::Result<()> {
        if self.alive.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(Error::from_raw_os_error(libc::EIO))
    }

    fn change(&self, change: Change) -> std::io::Result<()> {
        take(MOVE);
        self.check()?;
        if self.platter.faults.full.load(Ordering::Relaxed) && matches!(change, Change::Write(..)) {
            return Err(Error::from_raw_os_error(libc::ENOSPC));
        }
        fake_disk::land(&mut self.platter.live.lock(), &change, &mut |_| true);
        self.platter.pending.lock().push(change);
        Ok(())
    }
}

impl Disk for SimDisk {
    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        take(MOVE);
        if self.platter.faults.unreadable.load(Ordering::Relaxed) {
            return Err(Error::from_raw_os_error(libc::EIO));
        }
        let image = self.platter.live.lock();
        if fake_disk::ends_before(&image, offset, into.len()) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        fake_disk::read(&image, offset, into);
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> std::io::Result<()> {
        self.change(Change::Write(offset, from.into()))
    }

    fn sync(&self) -> std::io::Result<()> {
        self.check()?;
        // What is written meanwhile need not be covered.
        let covered = self.platter.pending.lock().len();
        take(SYNC);
        self.check()?;
        let mut pending = self.platter.pending.lock();
        let covered = covered.min(pending.len());
        let mut durable = self.platter.durable.lock();
        for change in pending.drain(..covered) {
            fake_disk::land(&mut durable, &change, &mut |_| true);
        }
        Ok(())
    }

    fn give_back(&self, offset: u64, len: u64) -> std::io::Result<()> {
        self.change(Change::Hole(offset, len))
    }

    fn uncache(&self, _offset: u64, _len: u64) {}
}

/// What a server's store has: outlives the server.
#[derive(Default)]
pub struct Ledger {
    durable: Mutex<Table>,
    pending: Mutex<Vec<Batch>>,
}

impl Ledger {
    /// The store for a life that ends when `alive` says so.
    #[must_use]
    pub fn open(self: &Arc<Self>, alive: &Arc<AtomicBool>) -> FakeStore {
        let (me, alive) = (Arc::clone(self), Arc::clone(alive));
        FakeStore::watched(self.durable.lock().clone(), move |seen| {
            let check = || {
                let dead = StoreError::Engine {
                    path: "store".into(),
                    detail: "its server has died".into(),
                };
                alive.load(Ordering::Relaxed).then_some(()).ok_or(dead)
            };
            check()?;
            match seen {
                Seen::Batch(batch) => me.pending.lock().push(batch),
                Seen::Sync => {
                    let covered = me.pending.lock().len();
                    take(SYNC);
                    check()?;
                    let mut pending = me.pending.lock();
                    let covered = covered.min(pending.len());
                    let mut durable = me.durable.lock();
                    for batch in pending.drain(..covered) {
                        fake_disk::apply(&mut durable, &batch);
                    }
                }
            }
            Ok(())
        })
    }

    /// As [`Platter::cut`].
    pub fn cut(&self, luck: Luck) {
        let batches = std::mem::take(&mut *self.pending.lock());
        fake_disk::cut_batches(&mut self.durable.lock(), &batches, luck, &mut one_of);
    }
}
