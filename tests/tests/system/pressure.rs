//! The kernel extension on a machine that has less memory than the mounts would keep in it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Options};
use system_tests::pressure::{Balloon, Counted, Setting, memory};
use system_tests::{guard, sys};

const FILES: usize = 20;
const SIZE: usize = 4 << 20;
const TOTAL: usize = FILES * SIZE;
/// What the machine has left for all of it, and for what its programs still ask for.
const LEFT: usize = 48 << 20;
const PAGE: usize = 4096;
const POOL_MIB: u64 = (TOTAL as u64 >> 20) + 32;
/// So many files are more than the mounts have buffers for.
const WARM: usize = 10;

/// How all files are filled anew.
type Way = fn(&[File], usize) -> anyhow::Result<()>;

/// What page `page` of file `file` has been filled with in this round.
fn stamp(round: usize, file: usize, page: usize) -> [u8; PAGE] {
    let mut data = [(round * 37 + file * 11 + page) as u8; PAGE];
    data[..8].copy_from_slice(&((round << 40 | file << 20 | page) as u64).to_le_bytes());
    data
}

fn filled(round: usize, file: usize, from: usize, pages: usize) -> Vec<u8> {
    (from..from + pages)
        .flat_map(|page| stamp(round, file, page))
        .collect()
}

fn open_all(dir: &Path) -> anyhow::Result<Vec<File>> {
    let open = |i| sys::open(&dir.join(format!("f{i}")), libc::O_RDWR | libc::O_CREAT);
    Ok((0..FILES).map(open).collect::<Result<_, _>>()?)
}

/// Kept open, so that no close writes anything.
fn write_all(files: &[File], round: usize) -> anyhow::Result<()> {
    const STEP: usize = 64;
    for (i, file) in files.iter().enumerate() {
        for page in (0..SIZE / PAGE).step_by(STEP) {
            file.write_all_at(&filled(round, i, page, STEP), (page * PAGE) as u64)
                .with_context(|| format!("file {i}, page {page}"))?;
        }
    }
    Ok(())
}

/// As [`write_all`], by stores to mappings of all files at the same time.
fn store_all(files: &[File], round: usize) -> anyhow::Result<()> {
    let maps: Vec<sys::Map> = files
        .iter()
        .map(|file| sys::Map::writable(file, SIZE))
        .collect::<Result<_, _>>()?;
    for page in 0..SIZE / PAGE {
        for (i, map) in maps.iter().enumerate() {
            map.write(page * PAGE, &stamp(round, i, page));
        }
    }
    Ok(())
}

fn verify(files: &[File], round: usize) -> anyhow::Result<()> {
    for (i, file) in files.iter().enumerate() {
        let data = sys::read_at(file, 0, SIZE + 1)?;
        ensure!(data.len() == SIZE, "file {i}: {} bytes", data.len());
        if let Some(page) =
            (0..SIZE / PAGE).find(|page| data[page * PAGE..][..PAGE] != stamp(round, i, *page))
        {
            let word = |data: &[u8]| {
                data.iter()
                    .take(8)
                    .rev()
                    .fold(0, |n, byte| n << 8 | u64::from(*byte))
            };
            anyhow::bail!(
                "file {i}, page {page}: {:x}, not {:x}",
                word(&data[page * PAGE..]),
                word(&stamp(round, i, page))
            );
        }
    }
    Ok(())
}

/// Bytes of the files in the page cache of their mount; with memory to spare all of them, on both, once both have read them.
fn resident(files: &[File]) -> anyhow::Result<usize> {
    let mut pages = 0;
    for file in files {
        pages += sys::Map::new(file, SIZE)?.resident()?;
    }
    Ok(pages * PAGE)
}

/// A guest's disk is its memory, and a storage node that gets none can answer nobody: its backing file is made whole, with the
/// room that it takes while blocks are stored anew.
fn keep_backing_file(cluster: &Cluster) -> anyhow::Result<()> {
    let backing = sys::open(&cluster.path("storage0/pool.data"), libc::O_RDWR)?;
    Ok(sys::fallocate(
        &backing,
        libc::FALLOC_FL_KEEP_SIZE,
        0,
        2 * (POOL_MIB << 20),
    )?)
}

fn short_of_memory(cluster: &Cluster, ways: &[Way], settings: &[(&str, &str)]) -> anyhow::Result<()> {
    let (first, second) = (open_all(&cluster.mount(0))?, open_all(&cluster.mount(1))?);
    // What programs take once, and keep, they take before the memory goes: their buffers above all.
    for (writer, reader) in [(&first, &second), (&second, &first)] {
        write_all(&writer[..WARM], 0)?;
        verify(&reader[..WARM], 0)?;
    }
    keep_backing_file(cluster)?;
    let _settings: Vec<Setting> = settings
        .iter()
        .map(|(name, value)| Setting::set(name, value))
        .collect::<Result<_, _>>()?;
    let before = Counted::now()?;
    let balloon = Balloon::leaving(LEFT)?;
    let mut most = 0;
    let sides = [(&first, &second), (&second, &first)];
    for ((round, write), (writer, reader)) in (1..).zip(ways).zip(sides) {
        write(writer, round).with_context(|| format!("round {round}: written"))?;
        verify(reader, round).with_context(|| format!("round {round}: read on the other mount"))?;
        most = most.max(resident(&first)? + resident(&second)?);
        verify(writer, round).with_context(|| format!("round {round}: read where it was written"))?;
    }
    let after = Counted::now()?;
    let free = memory("MemAvailable")?;
    drop(balloon);
    let told = format!(
        "{} MiB on two mounts; of these at most {} MiB in their page caches; pages taken back: {} by the kernel's thread, {} by \
         callers; {} MiB were available at the end",
        (2 * TOTAL) >> 20,
        most >> 20,
        after.by_thread - before.by_thread,
        after.by_callers - before.by_callers,
        free >> 20
    );
    eprintln!("{told}");
    ensure!(
        after.killed == before.killed,
        "processes were killed for want of memory"
    );
    let taken = after.by_thread - before.by_thread + after.by_callers - before.by_callers;
    ensure!(
        most < 2 * TOTAL && taken as usize * PAGE > TOTAL,
        "the memory was not short: {told}"
    );
    Ok(())
}

fn with_little_memory(ways: &'static [Way], settings: &'static [(&str, &str)]) -> anyhow::Result<()> {
    let options = Options {
        pool_mib: POOL_MIB,
        ..Options::extension()
    };
    guard::with_cluster(options, |cluster| short_of_memory(cluster, ways, settings))
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_more_than_fits_into_memory() -> anyhow::Result<()> {
    with_little_memory(&[write_all], &[])
}

/// The limits for dirty memory hold nobody up, and no clock writes back: who wants memory finds nothing but dirty pages.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_memory_full_of_dirty_pages() -> anyhow::Result<()> {
    with_little_memory(
        &[write_all, store_all],
        &[
            ("vm/dirty_writeback_centisecs", "0"),
            ("vm/dirty_ratio", "95"),
            ("vm/dirty_background_ratio", "90"),
        ],
    )
}
