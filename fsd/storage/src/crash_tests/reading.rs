//! What a storage node makes of a disk that it starts from: one that was not read to its end, that cannot be read, or that has changed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{CONN, POOL, contents, open, put, scratch};
use crate::blocks::{Blocks, Flaw};
use crate::crash_disk::FakeDisk;
use crate::index::{Entry, Place};
use crate::load::Parts;
use crate::scrub::Scrub;
use fsd_node::fake_disk::FakeStore;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::BlockRange;

/// Twenty blocks, stored; the machine has lost its memory.
fn stored() -> (Arc<FakeDisk>, Arc<FakeStore>) {
    let (disk, store) = (Arc::new(FakeDisk::default()), Arc::new(FakeStore::default()));
    let dir = scratch();
    let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), None);
    for ino in 0..20 {
        put(&blocks, (ino, 0), &[ino as u8 + 1; 3000]).unwrap();
    }
    blocks.flusher.flush_all().unwrap();
    (disk, store)
}

fn intact(blocks: &Blocks) -> usize {
    let space = blocks.media.space.lock();
    let whole =
        |((ino, _), e): &(Place, Entry)| !e.lost && contents(blocks, e.frame) == vec![*ino as u8 + 1; 3000];
    space.index.all().filter(whole).count()
}

fn dies_while_loading(flaw: Option<Flaw>) -> usize {
    let (disk, store) = stored();
    let dir = scratch();
    *disk.dies_at_read.lock() = Some(5);
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let died = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        open(dir.path(), Arc::clone(&disk), Arc::clone(&store), flaw)
    }));
    std::panic::set_hook(hook);
    assert!(died.is_err());
    *disk.dies_at_read.lock() = None;
    let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), None);
    // Nor does the next power cut bring it to light.
    blocks.flusher.flush_all().unwrap();
    let dir = scratch();
    intact(&open(dir.path(), disk, store, None))
}

#[test]
fn memory_that_was_not_loaded_to_the_end_does_not_count() {
    assert_eq!(dies_while_loading(None), 20);
    assert!(
        dies_while_loading(Some(Flaw::MarkedEarly)) < 20,
        "the rule makes no difference"
    );
}

/// One block cannot be read, while loading or at all; returns how many are whole in the end.
fn unreadable(flaw: Option<Flaw>, damage: impl Fn(&FakeDisk, u64)) -> usize {
    let (disk, store) = stored();
    let good = disk.image();
    let dir = scratch();
    damage(&disk, 5 * 4096);
    let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), flaw);
    if flaw.is_none() {
        assert_eq!(intact(&blocks), 19);
        let lost: Vec<Place> = {
            let space = blocks.media.space.lock();
            space
                .index
                .all()
                .filter(|(_, e)| e.lost)
                .map(|(p, _)| p)
                .collect()
        };
        let [(ino, _)] = lost[..] else {
            panic!("lost: {lost:?}")
        };
        // Everybody is told, and it does not become larger with zeros around it.
        assert!(blocks.frames.lookup(ino, 0, 9)[0].lost);
        assert_eq!(put(&blocks, (ino, 0), &[9; 9000]), Err(Errno(libc::EIO)));
        // After the death of the process it is as lost as before.
        blocks.flusher.flush_all().unwrap();
        drop(blocks);
        let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), flaw);
        assert!(blocks.media.pool.inherited && blocks.frames.lookup(ino, 0, 9)[0].lost);
        // It heals when it is freed.
        blocks.frames.free(&[BlockRange::one(ino, 0)]).unwrap();
        put(&blocks, (ino, 0), &[ino as u8 + 1; 3000]).unwrap();
        assert_eq!(intact(&blocks), 20);
        drop(blocks);
        // Else the copy is still what it was.
        let (_, store) = stored();
        let dir = scratch();
        let blocks = open(dir.path(), disk, Arc::clone(&store), flaw);
        assert_eq!(intact(&blocks), 19);
        blocks.flusher.flush_all().unwrap();
        let dir = scratch();
        return intact(&open(dir.path(), Arc::new(FakeDisk::with(good)), store, None));
    }
    blocks.flusher.flush_all().unwrap();
    let dir = scratch();
    disk.bad.lock().clear();
    intact(&open(dir.path(), disk, store, None))
}

#[test]
fn what_cannot_be_read_is_an_error_and_never_zeros() {
    let fails = |disk: &FakeDisk, offset: u64| {
        disk.bad.lock().insert(offset / 4096);
    };
    assert_eq!(unreadable(None, fails), 20);
    // With the flaw, zeros are no error; and being as whole as anything, they may be stored.
    let (disk, store) = stored();
    fails(&disk, 5 * 4096);
    let dir = scratch();
    let blocks = open(dir.path(), disk, store, Some(Flaw::LostAsZeros));
    let space = blocks.media.space.lock();
    assert!(space.index.all().all(|(_, e)| !e.lost));
}

#[test]
fn a_bit_that_flips_is_noticed_at_load() {
    let flips = |disk: &FakeDisk, offset: u64| disk.flip(offset + 100);
    assert_eq!(unreadable(None, flips), 20);
    let (disk, store) = stored();
    flips(&disk, 5 * 4096);
    let dir = scratch();
    let blocks = open(dir.path(), disk, store, Some(Flaw::NoChecksums));
    let none_lost = blocks.media.space.lock().index.all().all(|(_, e)| !e.lost);
    assert!(none_lost && intact(&blocks) == 19);
}

#[test]
fn a_bit_that_flips_at_rest_is_mended_from_memory() {
    let (disk, store) = stored();
    let dir = scratch();
    let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), None);
    let mut scrub = Scrub::default();
    let all = |scrub: &mut Scrub| {
        // To the end of the pass.
        blocks.scrubber.scrub(scrub, u64::MAX).unwrap();
        blocks.scrubber.faults.damaged.load(Ordering::Relaxed)
    };
    assert_eq!(all(&mut scrub), 0);
    disk.flip(7 * 4096 + 9);
    disk.bad.lock().insert(9);
    assert_eq!(all(&mut scrub), 2);
    assert!(blocks.flusher.is_unsettled());
    blocks.flusher.flush_all().unwrap();
    assert_eq!(all(&mut scrub), 2, "they are whole again");
    let dir = scratch();
    let blocks = open(dir.path(), disk, store, None);
    assert_eq!(intact(&blocks), 20);
}

#[test]
fn what_could_not_be_read_is_tried_again() {
    let (disk, store) = stored();
    disk.bad.lock().insert(5);
    let dir = scratch();
    let blocks = open(dir.path(), Arc::clone(&disk), Arc::clone(&store), None);
    assert_eq!(blocks.media.space.lock().lost(), 1);
    disk.bad.lock().clear();
    blocks.scrubber.scrub(&mut Scrub::default(), u64::MAX).unwrap();
    assert_eq!(blocks.media.space.lock().lost(), 0);
    assert_eq!(intact(&blocks), 20);
}

#[test]
fn what_was_freed_is_there_for_the_next() {
    let (disk, store) = (Arc::new(FakeDisk::default()), Arc::new(FakeStore::default()));
    let dir = scratch();
    let blocks = open(dir.path(), disk, store, None);
    for round in 0..3 {
        for n in 0..POOL / BLOCK {
            // The cleaner has done nothing yet.
            put(&blocks, (round, n), &[1; BLOCK as usize]).unwrap();
        }
        assert_eq!(blocks.frames.figures().free, 0);
        assert_eq!(put(&blocks, (99, 0), &[1]), Err(Errno(libc::ENOSPC)));
        blocks.frames.free(&[BlockRange::all(round)]).unwrap();
        assert_eq!(blocks.frames.figures().free, POOL);
        let granted = blocks.frames.reserve(CONN, BLOCK, BLOCK);
        assert_eq!(granted, BLOCK);
        blocks.frames.disconnected(CONN);
    }
}

#[test]
fn what_is_not_used_is_given_back() {
    use std::os::unix::fs::MetadataExt;
    let (disk, store) = (Arc::new(FakeDisk::default()), Arc::new(FakeStore::default()));
    let dir = scratch();
    let blocks = Blocks::open(Parts {
        memory: dir.path().join("x.pool"),
        uuid: "store".into(),
        bytes: 400 * BLOCK,
        disk,
        disk_path: "disk".into(),
        store,
        pinned: false,
        accept_older: false,
        flaw: None,
    })
    .unwrap();
    let used = || std::fs::metadata(dir.path().join("x.pool")).unwrap().blocks() * 512 / BLOCK;
    let stock = used();
    assert!(stock < 100, "a pool takes memory as data come: {stock}");
    for n in 0..300 {
        put(&blocks, (1, n), &[1; BLOCK as usize]).unwrap();
    }
    assert!(used() >= 300);
    blocks.flusher.flush_all().unwrap();
    blocks.frames.free(&[BlockRange::all(1)]).unwrap();
    blocks.cleaner.clean_waiting();
    blocks.flusher.flush_all().unwrap();
    blocks.cleaner.give_surplus_back();
    blocks.cleaner.give_surplus_back();
    assert!(used() < 100, "memory is given back: {}", used());
    let space = blocks.media.space.lock();
    assert!(space.extents.warm() < 200, "so is the disk's");
    assert_eq!((space.alloc.free_bytes(), space.alloc.frames()), (400 * BLOCK, 0));
}
