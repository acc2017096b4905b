//! Whatever is in the index, the label and the witness of a storage directory: an error that says so, or blocks that can be used; no
//! panic, and no memory beyond what the pool needs.

use std::path::PathBuf;
use std::sync::Arc;

use proptest::prelude::*;

use super::StorageError;
use super::blocks::Blocks;
use super::crash_disk::FakeDisk;
use super::crash_tests::{CONN, contents, scratch};
use super::label::Label;
use super::load::Parts;
use fsd_node::fake_disk::{FakeStore, Table};
use fsd_proto::layout::BLOCK;
use fsd_proto::wire::{BlockRange, BlockWant};

const POOL: u64 = 6 * BLOCK;

/// An offset or a size as it should be, or anything.
fn place() -> impl Strategy<Value = u64> {
    let near = (0..10 * BLOCK / 4096).prop_map(|n| n * 4096);
    let beyond = (0u32..64).prop_map(|bit| 1 << bit);
    prop_oneof![6 => near, 1 => beyond, 1 => any::<u64>()]
}

fn size() -> impl Strategy<Value = u32> {
    prop_oneof![4 => prop::sample::select(vec![4096u32, 16384, 65536, 262_144]), 1 => any::<u32>(), 1 => 0u32..10]
}

/// What an index has of a block.
fn entry(at: u64, len: u32, flags: u8, (extent, stored): (u64, u32), sum: u64) -> Vec<u8> {
    let mut bytes = at.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.push(flags);
    bytes.extend(extent.to_le_bytes());
    bytes.extend(stored.to_le_bytes());
    bytes.extend(sum.to_le_bytes());
    bytes
}

fn value() -> impl Strategy<Value = Vec<u8>> {
    let whole = (place(), size(), 0u8..4, (place(), size()), any::<u64>())
        .prop_map(|(at, len, flags, extent, sum)| entry(at, len, flags, extent, sum));
    prop_oneof![9 => whole, 1 => prop::collection::vec(any::<u8>(), 0..40)]
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    let whole = (0u64..4, 0u64..4).prop_map(|(ino, block)| [ino.to_be_bytes(), block.to_be_bytes()].concat());
    let key = prop_oneof![9 => whole, 1 => prop::collection::vec(any::<u8>(), 0..20)];
    key.prop_map(|rest| [&b"b"[..], &rest].concat())
}

fn open(memory: PathBuf, table: Table) -> Result<Blocks, StorageError> {
    Blocks::open(Parts {
        memory,
        uuid: "store".into(),
        bytes: POOL,
        disk: Arc::new(FakeDisk::default()),
        disk_path: "disk".into(),
        store: Arc::new(FakeStore::with(table)),
        pinned: false,
        accept_older: false,
        flaw: None,
    })
}

/// Offsets whose slab numbers are too large for the bookkeeping, or would make it larger than memory.
#[test]
fn places_far_beyond_the_end_are_damage() {
    let opened = |value: Vec<u8>| {
        let dir = scratch();
        let key = [&b"b"[..], &[0; 16]].concat();
        open(dir.path().join("x.pool"), Table::from([(key, value)])).map(|_| ())
    };
    let stored = |at, extent| entry(at, 4096, 1, (extent, 4096), 0);
    assert!(
        opened(stored(0, 0)).is_ok(),
        "a block whose copy cannot be read is lost, no more"
    );
    for value in [stored(1 << 50, 0), stored(0, 1 << 50), stored(0, 1 << 44)] {
        let told = opened(value).map_err(|e| e.to_string());
        assert!(told.as_ref().is_err_and(|e| e.contains("impossible")), "{told:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn an_index_is_damaged_or_can_be_used(
        mut table in prop::collection::btree_map(key(), value(), 0..5),
        others in prop::collection::btree_map(prop::sample::select(vec![b"g".to_vec(), b"p".to_vec()]), prop::collection::vec(any::<u8>(), 0..10), 0..2),
        witness in prop::option::of("[0-9]{0,22} ?[ -~]{0,8}\n?"),
    ) {
        let dir = scratch();
        table.extend(others);
        let memory = dir.path().join("x.pool");
        if let Some(text) = witness {
            std::fs::write(memory.with_extension("generation"), text).unwrap();
        }
        let opened = open(memory, table);
        let Ok(blocks) = opened else { return Ok(()) };
        // What was taken for right is in the pool, and does not overlap with what is given out.
        for ino in 0..4 {
            for found in blocks.frames.lookup(ino, 0, 10) {
                prop_assert!(found.frame.offset + u64::from(found.frame.size) <= POOL, "{found:?}");
                contents(&blocks, found.frame);
            }
        }
        let want = BlockWant { ino: 9, block: 0, size: 4096 };
        let _full = blocks.frames.allocate(CONN, &[want], 0);
        let _ = blocks.frames.free(&[BlockRange::all(1)]);
        blocks.flusher.flush_all().unwrap();
    }

    #[test]
    fn a_label_is_damaged_or_has_all_of_it(
        head in prop_oneof![Just(""), Just("format = 2\n"), Just("format = 2\ncluster = \"c\"\nnode = 1\n"), Just("c\n1\n")],
        text in "[ -~\n]{0,80}\n?",
    ) {
        let dir = scratch();
        std::fs::write(dir.path().join("storage.label"), head.to_owned() + &text).unwrap();
        if let Err(error) = Label::read(dir.path()) {
            prop_assert!(error.to_string().contains("label") || error.to_string().contains("format"), "{error}");
        }
    }
}
