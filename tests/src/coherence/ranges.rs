//! Holes, ranges, copies, large files.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};

use anyhow::{Context, ensure};

use super::{Pair, pattern, same};
use crate::sys;

pub(super) fn punch(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let mut want = pattern(round, 0, 40_000);
    fs::write(&a, &want)?;
    let reader = File::open(&b)?;
    same("before", &sys::read_at(&reader, 0, 50_000)?, &want)?;
    let writer = sys::open(&a, libc::O_WRONLY)?;
    sys::punch(&writer, 5000, 20_000)?;
    want[5000..25_000].fill(0);
    same("punched", &sys::read_at(&reader, 0, 50_000)?, &want)?;
    sys::punch(&writer, 39_000, 100_000)?;
    want[39_000..].fill(0);
    same("punched over the end", &sys::read_at(&reader, 0, 50_000)?, &want)?;
    writer.write_all_at(&pattern(round, 1, 3000), 8000)?;
    want[8000..11_000].copy_from_slice(&pattern(round, 1, 3000));
    same("written into the hole", &sys::read_at(&reader, 0, 50_000)?, &want)
}

pub(super) fn zero(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let mut want = pattern(round, 0, 20_000);
    fs::write(&a, &want)?;
    let reader = File::open(&b)?;
    same("before", &sys::read_at(&reader, 0, 50_000)?, &want)?;
    let writer = sys::open(&a, libc::O_WRONLY)?;
    sys::fallocate(&writer, libc::FALLOC_FL_ZERO_RANGE, 15_000, 10_000).context("ZERO_RANGE")?;
    want.resize(25_000, 0);
    want[15_000..].fill(0);
    same("zeroed over the end", &sys::read_at(&reader, 0, 50_000)?, &want)?;
    let keep = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
    sys::fallocate(&writer, keep, 100, 5000).context("ZERO_RANGE, size kept")?;
    want[100..5100].fill(0);
    same("zeroed inside", &sys::read_at(&reader, 0, 50_000)?, &want)
}

pub(super) fn extend(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let mut want = pattern(round, 0, 1000);
    fs::write(&a, &want)?;
    let writer = sys::open(&a, libc::O_WRONLY)?;
    sys::fallocate(&writer, libc::FALLOC_FL_KEEP_SIZE, 0, 30_000)?;
    ensure!(b.metadata()?.len() == 1000, "KEEP_SIZE changed the size");
    sys::fallocate(&writer, 0, 0, 30_000)?;
    want.resize(30_000, 0);
    same("extended", &fs::read(&b)?, &want)?;
    ensure!(
        b.metadata()?.blocks() >= 8,
        "allocated blocks: {}",
        b.metadata()?.blocks()
    );
    Ok(())
}

pub(super) fn copy(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("from");
    let (a2, b2) = pair.both("to");
    let source = pattern(round, 0, 50_000);
    fs::write(&b, &source)?;
    fs::write(&b2, b"old content")?;
    let reader = File::open(&b2)?;
    ensure!(sys::read_at(&reader, 0, 100)?.len() == 11, "before");
    let (from, to) = (File::open(&a)?, sys::open(&a2, libc::O_WRONLY)?);
    let n = sys::copy_range(&from, 1234, &to, 777, 40_000)?;
    ensure!(n == 40_000, "{n} bytes copied");
    let mut want = b"old content".to_vec();
    want.resize(777, 0);
    want.extend_from_slice(&source[1234..41_234]);
    same("copied", &sys::read_at(&reader, 0, 100_000)?, &want)?;
    let n = sys::copy_range(&from, 49_000, &to, 0, 40_000)?;
    ensure!(n == 1000, "{n} bytes copied at the end of the source");
    want[..1000].copy_from_slice(&source[49_000..]);
    same("copied from the end", &sys::read_at(&reader, 0, 100_000)?, &want)
}

pub(super) fn seek(pair: &Pair, round: usize) -> anyhow::Result<()> {
    const MIB: u64 = 1 << 20;
    let (a, b) = pair.both("f");
    let writer = sys::open(&a, libc::O_WRONLY | libc::O_CREAT)?;
    let reader = File::open(&b)?;
    writer.set_len(20 * MIB)?;
    let none = sys::errno(&sys::seek_data(&reader, 0));
    ensure!(none == libc::ENXIO || none == 0, "no data: errno {none}");
    writer.write_all_at(&pattern(round, 0, 4096), 8 * MIB)?;
    let data = sys::seek_data(&reader, 0)?;
    ensure!(data <= 8 * MIB, "data at {data} found behind where it is");
    let hole = sys::seek_hole(&reader, 8 * MIB)?;
    ensure!((8 * MIB + 4096..=20 * MIB).contains(&hole), "hole at {hole}");
    ensure!(
        sys::errno(&sys::seek_data(&reader, 20 * MIB)) == libc::ENXIO,
        "SEEK_DATA at the end"
    );
    ensure!(
        sys::errno(&sys::seek_hole(&reader, 21 * MIB)) == libc::ENXIO,
        "SEEK_HOLE behind the end"
    );
    Ok(())
}

pub(super) fn terabyte(pair: &Pair, round: usize) -> anyhow::Result<()> {
    const TIB: u64 = 1 << 40;
    let (a, b) = pair.both("sparse");
    let writer = sys::open(&a, libc::O_WRONLY | libc::O_CREAT)?;
    let reader = File::open(&b)?;
    writer.write_all_at(&pattern(round, 0, 5000), TIB - 5000)?;
    ensure!(b.metadata()?.len() == TIB, "size {}", b.metadata()?.len());
    ensure!(
        b.metadata()?.blocks() < 65_536,
        "a sparse file uses {} blocks",
        b.metadata()?.blocks()
    );
    same(
        "at the end",
        &sys::read_at(&reader, TIB - 5000, 9000)?,
        &pattern(round, 0, 5000),
    )?;
    same("in the hole", &sys::read_at(&reader, TIB / 2, 9000)?, &[0; 9000])?;
    writer.set_len(10)?;
    ensure!(sys::read_at(&reader, 0, 100)? == [0; 10], "after the cut");
    Ok(())
}

pub(super) fn large(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("large");
    let reader_path = b;
    let mut want = pattern(round, 0, 5 << 20);
    fs::write(&a, &want)?;
    same("first content", &fs::read(&reader_path)?, &want)?;
    // One call over many blocks must be seen whole.
    let new = pattern(round, 1, 3 << 20);
    sys::open(&a, libc::O_WRONLY)?.write_all_at(&new, 1_000_001)?;
    want[1_000_001..1_000_001 + new.len()].copy_from_slice(&new);
    same("overwritten", &fs::read(&reader_path)?, &want)
}
