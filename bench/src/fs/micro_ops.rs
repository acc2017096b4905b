//! The single operations. Each function does one round and returns one number.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};

use super::micro::Scale;
use super::remove_if_there;
use crate::progress::check;

pub const PAGE: usize = 4096;
pub const MIB: usize = 1 << 20;
/// Size of the file that small blocks are read from and written to.
const HOT: u64 = 16 * MIB as u64;

pub fn open(path: &Path) -> anyhow::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// The file with its contents written, made if need be.
pub fn hot(dir: &Path, name: &str, size: u64) -> anyhow::Result<File> {
    let file = open(&dir.join(name))?;
    if file.metadata()?.len() != size {
        let block = vec![1u8; MIB];
        for at in (0..size).step_by(MIB) {
            let len = block.len().min((size - at) as usize);
            file.write_all_at(&block[..len], at)?;
        }
    }
    Ok(file)
}

/// Makes the file of small blocks anew, so that its pages are others: in emulation some take several times as long to copy
/// as others, for as long as they lie where they do.
///
/// # Errors
/// A file system call fails.
pub fn renew_hot(dir: &Path, size: u64) -> anyhow::Result<()> {
    let name = hot_name(size);
    remove_if_there(&dir.join(&name))?;
    hot(dir, &name, size).map(drop)
}

fn hot_name(size: u64) -> String {
    if size == HOT {
        "hot".into()
    } else {
        format!("hot{size}")
    }
}

pub fn ns_each(start: Instant, n: u64) -> f64 {
    start.elapsed().as_secs_f64() * 1e9 / n as f64
}

/// A 4 KiB read of what has been read before, ns.
pub fn cached_read(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    cached_read_within(dir, HOT, s.reads)
}

/// `reads` of them, round and round in a file of `size` bytes, ns.
pub fn cached_read_within(dir: &Path, size: u64, reads: u64) -> anyhow::Result<f64> {
    let file = hot(dir, &hot_name(size), size)?;
    let mut page = vec![0u8; PAGE];
    for at in (0..size).step_by(PAGE) {
        file.read_exact_at(&mut page, at)?;
    }
    let start = Instant::now();
    for i in 0..reads {
        file.read_exact_at(&mut page, i * PAGE as u64 % size)?;
    }
    Ok(ns_each(start, reads))
}

/// A 4 KiB overwrite under a lease that is held, ns.
pub fn write_4k(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    write_4k_within(dir, HOT, s.writes)
}

/// `writes` of them, round and round in a file of `size` bytes, ns.
pub fn write_4k_within(dir: &Path, size: u64, writes: u64) -> anyhow::Result<f64> {
    let file = hot(dir, &hot_name(size), size)?;
    let page = vec![2u8; PAGE];
    for i in 0..64u64 {
        file.write_all_at(&page, i * PAGE as u64 % size)?;
    }
    let start = Instant::now();
    for i in 0..writes {
        file.write_all_at(&page, i * PAGE as u64 % size)?;
    }
    Ok(ns_each(start, writes))
}

pub fn mib_per_s(start: Instant, bytes: u64) -> f64 {
    bytes as f64 / MIB as f64 / start.elapsed().as_secs_f64()
}

/// Overwriting a file in 1 MiB blocks, MiB/s.
pub fn seq_overwrite(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    let file = hot(dir, "stream", s.stream)?;
    let block = vec![3u8; MIB];
    let start = Instant::now();
    for at in (0..s.stream).step_by(MIB) {
        file.write_all_at(&block, at)?;
    }
    Ok(mib_per_s(start, s.stream))
}

/// Writing a new file in 1 MiB blocks, MiB/s.
pub fn seq_write_new(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    let path = dir.join("fresh");
    let mut block = vec![4u8; MIB];
    let start = Instant::now();
    let mut file = File::create(&path)?;
    for n in 0..s.stream / MIB as u64 {
        block[0] = n as u8;
        file.write_all(&block)?;
    }
    drop(file);
    let speed = mib_per_s(start, s.stream);
    std::fs::remove_file(&path)?;
    Ok(speed)
}

/// Reading a file in 1 MiB blocks from the server, after the page cache let it go, MiB/s.
pub fn seq_read(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    let file = hot(dir, "stream", s.stream)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut block = vec![0u8; MIB];
    let start = Instant::now();
    for at in (0..s.stream).step_by(MIB) {
        file.read_exact_at(&mut block, at)?;
    }
    Ok(mib_per_s(start, s.stream))
}

/// Creating, writing 4 KiB, closing; many files in one directory; files a second.
pub fn create(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    let page = vec![5u8; PAGE];
    let path = |n: u64| dir.join(format!("c{n}"));
    let start = Instant::now();
    for n in 0..s.files {
        File::create(path(n))?.write_all(&page)?;
    }
    let rate = s.files as f64 / start.elapsed().as_secs_f64();
    check()?;
    for n in 0..s.files {
        std::fs::remove_file(path(n))?;
    }
    Ok(rate)
}

/// `stat` by path of a file whose name and attributes are cached, ns.
pub fn stat(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    let path = dir.join("hot");
    hot(dir, "hot", HOT)?;
    std::fs::metadata(&path)?;
    let start = Instant::now();
    for _ in 0..s.reads {
        std::fs::metadata(&path)?;
    }
    Ok(ns_each(start, s.reads))
}

/// `fstat` of an open file whose attributes are cached, ns.
pub fn fstat(dir: &Path, s: &Scale) -> anyhow::Result<f64> {
    let file = hot(dir, "hot", HOT)?;
    file.metadata()?;
    let start = Instant::now();
    for _ in 0..s.reads {
        file.metadata()?;
    }
    Ok(ns_each(start, s.reads))
}

/// Overwrite on one mount, read on another, in strict alternation; round trips a second. Every read is
/// checked.
pub fn alternate(dirs: &[std::path::PathBuf], s: &Scale) -> anyhow::Result<f64> {
    let [first, second, ..] = dirs else {
        bail!("alternation needs two mounts")
    };
    let writer = open(&first.join("turns"))?;
    writer.write_all_at(&[0; 64], 0)?;
    let reader = open(&second.join("turns"))?;
    let mut seen = [0u8; 64];
    let one = |n: u64, seen: &mut [u8; 64]| -> anyhow::Result<()> {
        let mut message = [0u8; 64];
        message[..8].copy_from_slice(&n.to_le_bytes());
        writer.write_all_at(&message, 0)?;
        reader.read_exact_at(seen, 0)?;
        if *seen != message {
            bail!("mount 1 read an old value after the overwrite {n} on mount 0");
        }
        Ok(())
    };
    for n in 0..20 {
        one(n, &mut seen)?;
    }
    let start = Instant::now();
    for n in 0..s.turns {
        one(n + 1000, &mut seen)?;
    }
    Ok(s.turns as f64 / start.elapsed().as_secs_f64())
}
