//! Power cuts and dying processes, at every point and with everything they can leave of what was not synced.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rdma_transport::ConnId;
use rt::sync::Mutex;

use super::blocks::{Blocks, Flaw};
use super::crash_disk::{Cuts, Event, FakeDisk, Journal, recording_store};
use super::index::Place;
use super::keeping::Wanted;
use super::load::Parts;
use fsd_node::fake_disk::{Change, FakeStore, Image, Luck, Table};
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{BlockRange, BlockWant, Frame, Part};

mod reading;

const POOL: u64 = 6 * BLOCK;
pub(super) const CONN: ConnId = ConnId(1);

pub(super) fn open(dir: &Path, disk: Arc<FakeDisk>, store: Arc<FakeStore>, flaw: Option<Flaw>) -> Blocks {
    Blocks::open(Parts {
        memory: dir.join("x.pool"),
        uuid: "store".into(),
        bytes: POOL,
        disk,
        disk_path: "disk".into(),
        store,
        pinned: false,
        accept_older: false,
        flaw,
    })
    .unwrap()
}

pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

pub(super) fn contents(blocks: &Blocks, frame: Frame) -> Vec<u8> {
    let mut bytes = vec![0; frame.size as usize];
    blocks
        .media
        .pool
        .mem
        .read_at(frame.offset as usize, &mut bytes)
        .unwrap();
    trimmed(bytes)
}

/// A frame may be larger than what was written; beyond that it is zero.
fn trimmed(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.truncate(bytes.iter().rposition(|&b| b != 0).map_or(0, |n| n + 1));
    bytes
}

/// What a mount does: a frame, a one-sided write, the slab's counter.
pub(super) fn put(blocks: &Blocks, (ino, block): Place, bytes: &[u8]) -> Result<(), Errno> {
    let size = bytes.len() as u32;
    let frame = blocks
        .frames
        .allocate(CONN, &[BlockWant { ino, block, size }], 0)?[0];
    blocks
        .media
        .pool
        .mem
        .write_at(frame.offset as usize, bytes)
        .unwrap();
    let counter = (frame.offset / BLOCK * 8) as usize;
    let dirty = blocks.media.pool.dirty.word(counter).unwrap();
    dirty.fetch_add(1, Ordering::AcqRel);
    Ok(())
}

/// What a mount does to a page of a block that has a frame: a one-sided write, the slab's counter.
pub(super) fn change_page(blocks: &Blocks, (ino, block): Place, at: u32, byte: u8) {
    let frame = blocks.media.space.lock().index.get(ino, block).unwrap().frame;
    let mem = &blocks.media.pool.mem;
    mem.write_at(frame.offset as usize + at as usize, &[byte; 4096])
        .unwrap();
    let counter = (frame.offset / BLOCK * 8) as usize;
    let dirty = blocks.media.pool.dirty.word(counter).unwrap();
    dirty.fetch_add(1, Ordering::AcqRel);
}

/// A block's contents from a point of the journal on; none: it has no frame.
type Version = (usize, Option<Vec<u8>>);

#[derive(Default)]
struct Known {
    versions: BTreeMap<Place, Vec<Version>>,
    /// From a point of the journal on, the version of this number is durable, or a later one.
    durable: BTreeMap<Place, Vec<(usize, usize)>>,
    writes: u64,
}

/// A node under load, and what it must keep.
struct World {
    blocks: Blocks,
    journal: Arc<Journal>,
    known: Mutex<Known>,
    rng: Mutex<StdRng>,
    nested: Mutex<bool>,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(seed: u64, flaw: Option<Flaw>) -> Arc<Self> {
        let journal = Arc::new(Journal::default());
        let dir = scratch();
        let disk = Arc::new(FakeDisk::recording(&journal));
        let store = Arc::new(recording_store(&journal));
        let world = Arc::new(Self {
            blocks: open(dir.path(), disk, store, flaw),
            journal: Arc::clone(&journal),
            known: Mutex::default(),
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            nested: Mutex::new(false),
            _dir: dir,
        });
        let weak: Weak<Self> = Arc::downgrade(&world);
        let meanwhile = move || {
            if let Some(world) = weak.upgrade()
                && world.random(3) == 0
                && !std::mem::replace(&mut *world.nested.lock(), true)
            {
                if world.random(3) == 0 {
                    world.flush_page();
                } else {
                    world.change();
                }
                *world.nested.lock() = false;
            }
        };
        assert!(journal.meanwhile.set(Box::new(meanwhile)).is_ok());
        world
    }

    fn random(&self, below: u64) -> u64 {
        self.rng.lock().random_range(0..below)
    }

    fn place(&self) -> Place {
        (10 + self.random(4), self.random(3))
    }

    /// Something a mount does that waits for no disk.
    fn change(&self) {
        let place = self.place();
        let at = self.journal.len();
        let new = if self.random(4) == 0 {
            self.blocks
                .frames
                .free(&[BlockRange::one(place.0, place.1)])
                .unwrap();
            // The cleaner comes some time.
            self.blocks.cleaner.clean_waiting();
            None
        } else {
            let size = [3000, 4096, 5000, 16000, 40000][self.random(5) as usize];
            let number = {
                let mut known = self.known.lock();
                known.writes += 1;
                known.writes
            };
            // No two writes have anything in common.
            let text = format!("<{}/{}/{number}>", place.0, place.1);
            let bytes: Vec<u8> = text.bytes().cycle().take(size).collect();
            let done = if self.random(4) == 0 {
                // A larger frame, and nothing is written to it.
                let (ino, block) = place;
                let want = BlockWant {
                    ino,
                    block,
                    size: size as u32,
                };
                self.blocks.frames.allocate(CONN, &[want], 0).map(|_| ())
            } else {
                put(&self.blocks, place, &bytes)
            };
            if done.is_err() {
                return;
            }
            let frame = self.frame(place).unwrap();
            Some(contents(&self.blocks, frame))
        };
        let mut known = self.known.lock();
        known
            .versions
            .entry(place)
            .or_insert_with(|| vec![(0, None)])
            .push((at, new));
    }

    fn frame(&self, (ino, block): Place) -> Option<Frame> {
        let space = self.blocks.media.space.lock();
        space.index.get(ino, block).map(|e| e.frame)
    }

    fn flush(&self) {
        let ino = 10 + self.random(4);
        let all = self.random(5) == 0;
        let covered: Vec<(Place, usize)> = {
            let known = self.known.lock();
            let versions = known.versions.iter().filter(|(place, _)| all || place.0 == ino);
            versions.map(|(&place, v)| (place, v.len() - 1)).collect()
        };
        if all {
            self.blocks.flusher.flush_all().unwrap();
            // The second time what was free the first time has not been needed since.
            self.blocks.cleaner.give_surplus_back();
            self.blocks.cleaner.give_surplus_back();
        } else {
            let inos = vec![ino];
            let parts = Vec::new();
            self.blocks.flusher.flush(&Wanted { inos, parts }).unwrap();
        }
        let at = self.journal.len();
        let mut known = self.known.lock();
        for (place, version) in covered {
            known.durable.entry(place).or_default().push((at, version));
        }
    }

    /// A page of a block of which all else is durable is changed, and a mount that knows that has it made durable.
    fn flush_page(&self) {
        let place = self.place();
        let last = {
            let known = self.known.lock();
            let last = known.versions.get(&place).map_or(0, |v| v.len() - 1);
            let durable = known
                .durable
                .get(&place)
                .into_iter()
                .flatten()
                .map(|(_, v)| *v)
                .max();
            durable.filter(|v| *v == last)
        };
        let frame = self.frame(place);
        let (Some(last), Some(frame)) = (last, frame) else {
            return;
        };
        let at = self.journal.len();
        let page = self.random(u64::from(frame.size) / 4096) as u32 * 4096;
        let byte = 1 + self.random(255) as u8;
        let carried = self.random(2) == 0;
        let part = Part {
            ino: place.0,
            block: place.1,
            at: page,
            len: 4096,
        };
        if carried {
            self.blocks.flusher.take_in(&[part], &[byte; 4096]).unwrap();
        } else {
            change_page(&self.blocks, place, page, byte);
        }
        let now = contents(&self.blocks, frame);
        self.known
            .lock()
            .versions
            .entry(place)
            .or_default()
            .push((at, Some(now)));
        let parts = vec![part];
        self.blocks
            .flusher
            .flush(&Wanted {
                inos: Vec::new(),
                parts,
            })
            .unwrap();
        let at = self.journal.len();
        self.known
            .lock()
            .durable
            .entry(place)
            .or_default()
            .push((at, last + 1));
    }

    fn step(&self) {
        if self.random(4) == 0 {
            self.flush_page();
        } else if self.random(3) == 0 {
            self.flush();
        } else {
            self.change();
        }
    }

    /// What is wrong with what is left after a power cut at `at`.
    fn judge(&self, at: usize, state: (Image, Table), flaw: Option<Flaw>) -> Result<(), String> {
        let dir = scratch();
        let (disk, store) = (FakeDisk::with(state.0), FakeStore::with(state.1));
        let blocks = open(dir.path(), Arc::new(disk), Arc::new(store), flaw);
        let space = blocks.media.space.lock();
        let known = self.known.lock();
        for (place, versions) in &known.versions {
            let durable = known.durable.get(place).into_iter().flatten();
            let oldest = durable.filter(|(when, _)| *when <= at).map(|(_, v)| *v).max();
            let mut allowed = versions[oldest.unwrap_or(0)..]
                .iter()
                .filter(|(when, _)| *when <= at);
            let entry = space.index.get(place.0, place.1);
            if entry.is_some_and(|e| e.lost) {
                return Err(format!("{place:?} cannot be read"));
            }
            let now = entry.map(|e| contents(&blocks, e.frame));
            if !allowed.any(|(_, version)| *version == now) {
                let start = now.map(|n| String::from_utf8_lossy(&n[..n.len().min(12)]).into_owned());
                return Err(format!("{place:?} is {start:?} (durable: version {oldest:?})"));
            }
        }
        let strangers = space
            .index
            .all()
            .filter(|(place, _)| !known.versions.contains_key(place));
        match strangers.count() {
            0 => Ok(()),
            n => Err(format!("{n} blocks from nowhere")),
        }
    }
}

/// Lets a node work, and looks at the states a power cut can leave; returns how many, and how often
/// disk was given back; or what was wrong with one.
fn power_cuts(seed: u64, steps: usize, flaw: Option<Flaw>) -> Result<(usize, usize), String> {
    let world = World::new(seed, flaw);
    for _ in 0..steps {
        world.step();
    }
    let mut rng = StdRng::seed_from_u64(seed ^ 0x5eed);
    let events = world.journal.events();
    let holes = events
        .iter()
        .filter(|e| matches!(e, Event::Disk(Change::Hole(..))))
        .count();
    let mut cuts = Cuts::new(events);
    let mut states = 0;
    while let Some(at) = cuts.step() {
        for luck in [Luck::None, Luck::All, Luck::Some, Luck::Some] {
            let state = cuts.state(luck, &mut rng);
            world
                .judge(at, state, flaw)
                .map_err(|what| format!("seed {seed}, after {at} events, {luck:?} of the rest: {what}"))?;
            states += 1;
        }
    }
    Ok((states, holes))
}

#[test]
fn a_power_cut_loses_nothing_that_was_stored() {
    let (mut states, mut holes) = (0, 0);
    for seed in 0..16 {
        let (s, h) = power_cuts(seed, 60, None).unwrap();
        (states, holes) = (states + s, holes + h);
    }
    assert!(states > 2000 && holes > 0, "{states} states, {holes} holes");
}

/// Each rule of `blocks` is there for something that the test above finds.
#[test]
fn without_a_rule_a_power_cut_loses_something() {
    for flaw in [
        Flaw::MoveForgets,
        Flaw::InPlace,
        Flaw::EarlyReuse,
        Flaw::IndexFirst,
        Flaw::CleanBySlab,
        Flaw::KeptForgotten,
        Flaw::KeptForEver,
    ] {
        let found = (0..1000).find_map(|seed| power_cuts(seed, 60, Some(flaw)).err());
        assert!(found.is_some(), "{flaw:?} makes no difference");
    }
}

/// Without checksums one would not even notice whose bytes they are.
#[test]
fn a_process_that_dies_loses_nothing_at_all() {
    for seed in 0..20 {
        let journal = Arc::new(Journal::default());
        let dir = scratch();
        let disk = Arc::new(FakeDisk::recording(&journal));
        let store = Arc::new(recording_store(&journal));
        let mut rng = StdRng::seed_from_u64(seed);
        let mut expected: BTreeMap<Place, Vec<u8>> = BTreeMap::new();
        for round in 0..5u8 {
            let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), None);
            assert_eq!(blocks.media.pool.inherited, round > 0);
            for (place, bytes) in &expected {
                let entry = blocks.media.space.lock().index.get(place.0, place.1).unwrap();
                assert_eq!(&contents(&blocks, entry.frame), bytes);
            }
            for n in 0..20u8 {
                let place = (rng.random_range(0..4), rng.random_range(0..4));
                if rng.random_range(0..3) == 0 {
                    // Freed, of two inodes at once, but not cleaned when the process dies.
                    let gone = [place, (place.0 + 1, rng.random_range(0..4))];
                    let ranges = gone.map(|(ino, block)| BlockRange::one(ino, block));
                    blocks.frames.free(&ranges).unwrap();
                    expected.retain(|place, _| !gone.contains(place));
                } else {
                    let bytes = vec![round * 20 + n + 1; [100, 5000, 17000][rng.random_range(0..3)]];
                    put(&blocks, place, &bytes).unwrap();
                    let entry = blocks.media.space.lock().index.get(place.0, place.1).unwrap();
                    let bytes = contents(&blocks, entry.frame);
                    expected.insert(place, bytes);
                }
            }
            if rng.random() {
                blocks.flusher.flush_all().unwrap();
            }
        }
        // What is free is zero.
        let blocks = open(dir.path(), disk, store, None);
        for (place, _) in expected {
            blocks.frames.free(&[BlockRange::one(place.0, place.1)]).unwrap();
        }
        blocks.cleaner.clean_waiting();
        let all = Frame {
            offset: 0,
            size: POOL as u32,
        };
        assert!(contents(&blocks, all).is_empty());
    }
}
