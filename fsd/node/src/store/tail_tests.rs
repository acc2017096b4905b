//! The real engine after power cuts: its journal is left with any part of what was written since the last sync.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;
use crate::store::{Batch, FjallStore, Store, StoreError};

/// What a disk writes at once.
const SECTOR: usize = 512;

fn key(number: usize) -> Vec<u8> {
    format!("k{:02}", number % 20).into_bytes()
}

/// Batches of all sizes, each setting its number.
fn nth(number: usize) -> Batch {
    let mut batch = Batch::default();
    batch.put(b"last".to_vec(), number.to_le_bytes().to_vec());
    for n in 0..number % 4 {
        let len = [10, 300, 2500, 3900][(number + n) % 4];
        batch.put(
            key(number + n),
            [vec![number as u8; len], number.to_le_bytes().to_vec()].concat(),
        );
    }
    batch.delete(key(number + 7));
    batch
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            std::fs::create_dir(&target).unwrap();
            copy(&entry.path(), &target);
        } else if entry.path().extension().is_none_or(|e| e != "jnl") {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

struct Recorded {
    dir: tempfile::TempDir,
    journal: Vec<u8>,
    /// Bytes of the journal after each batch.
    ends: Vec<usize>,
    /// Contents after each batch.
    tables: Vec<Vec<(Vec<u8>, Vec<u8>)>>,
}

fn all(store: &FjallStore) -> Vec<(Vec<u8>, Vec<u8>)> {
    store.scan(b"a", b"z", usize::MAX).unwrap()
}

fn record() -> Recorded {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let store = FjallStore::open(dir.path()).unwrap();
    let path = journal(dir.path()).unwrap().unwrap();
    let (mut ends, mut tables) = (Vec::new(), Vec::new());
    for number in 0..40 {
        store.apply(nth(number)).unwrap();
        ends.push(whole(&std::fs::read(&path).unwrap()));
        tables.push(all(&store));
    }
    drop(store);
    let journal = std::fs::read(&path).unwrap();
    assert_eq!(*ends.last().unwrap(), whole(&journal));
    Recorded {
        dir,
        journal,
        ends,
        tables,
    }
}

/// Opens what is left if the power goes after batch `written`, when `synced` was the last to be durable.
fn open(
    of: &Recorded,
    synced: usize,
    written: usize,
    kind: u32,
    rng: &mut StdRng,
    boot: bool,
) -> Result<FjallStore, StoreError> {
    let (safe, end) = (of.ends[synced], of.ends[written]);
    let mut left = of.journal[..end].to_vec();
    match kind {
        // The beginning of it, to the byte.
        0 => left.truncate(rng.random_range(safe..=end)),
        // One sector is missing, or any.
        _ => {
            let sectors: Vec<usize> = (safe / SECTOR..end.div_ceil(SECTOR)).collect();
            let one = sectors[rng.random_range(0..sectors.len())];
            for sector in sectors {
                let lost = if kind == 1 { sector == one } else { rng.random() };
                let from = (sector * SECTOR).max(safe);
                if lost {
                    left[from..((sector + 1) * SECTOR).min(end)].fill(0);
                }
            }
        }
    }
    open_with(of, left, boot)
}

/// Opens the store with a journal that begins with this.
fn open_with(of: &Recorded, mut left: Vec<u8>, boot: bool) -> Result<FjallStore, StoreError> {
    // The file was made larger beforehand.
    left.resize(left.len() + 20_000, 0);
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    copy(of.dir.path(), dir.path());
    let name = journal(of.dir.path()).unwrap().unwrap();
    std::fs::write(dir.path().join(name.file_name().unwrap()), left).unwrap();
    if !boot {
        std::fs::write(boot_file(dir.path()), "another").unwrap();
    }
    FjallStore::open(dir.path())
}

#[test]
fn a_power_cut_leaves_all_batches_up_to_one() {
    let of = record();
    let mut rng = StdRng::seed_from_u64(1);
    let mut holes = 0;
    for synced in (0..39).step_by(3) {
        for kind in [0, 0, 1, 1, 1, 2, 2, 2] {
            let written = rng.random_range(synced + 1..40.min(synced + 8));
            let seed = rng.random();
            let again = || StdRng::seed_from_u64(seed);
            // Without a crash of the host a hole is damage.
            let damaged = open(&of, synced, written, kind, &mut again(), true);
            holes += usize::from(matches!(damaged, Err(StoreError::Damaged { .. })));
            let store = open(&of, synced, written, kind, &mut again(), false).unwrap();
            let table = all(&store);
            assert!(
                of.tables[synced..=written].contains(&table),
                "{synced}..{written}, kind {kind}"
            );
            // It goes on from there.
            store.apply(nth(99)).unwrap();
            store.sync().unwrap();
        }
    }
    assert!(
        holes > 5,
        "{holes}: there is nothing that the engine does not do by itself"
    );
}

#[test]
fn a_journal_that_ends_anywhere_ends_at_a_batch() {
    let of = record();
    // A small one, for each takes a store of its own.
    let (synced, written) = (15, 16);
    for end in of.ends[synced]..=of.ends[written] {
        // The process has died, or the host has; the engine needs no help.
        let store = open_with(&of, of.journal[..end].to_vec(), end % 2 == 0).unwrap();
        let last = if end == of.ends[written] { written } else { synced };
        assert!(all(&store) == of.tables[last], "{end}");
    }
}

/// Whatever is in the file: it is cut off somewhere, and nothing is read beyond its end.
#[test]
fn a_journal_of_anything_has_a_whole_part() {
    let mut chance = StdRng::seed_from_u64(7);
    for _ in 0..20_000 {
        // Mostly tags and short lengths, which lead further than other bytes.
        let mut bytes: Vec<u8> = (0..chance.random_range(0..200))
            .map(|_| match chance.random_bool(0.8) {
                true => chance.random_range(0..5),
                false => chance.random(),
            })
            .collect();
        bytes.insert(0, START);
        assert!(whole(&bytes) <= bytes.len());
    }
}
