//! What is measured on mounts besides the operations of `bench fs`. Unlike those, these count stale data instead of
//! failing: other file systems do not promise what DistFUSE does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;

use crate::fs::micro::Scale;
use crate::fs::micro_ops::{self as micro, MIB, PAGE, hot, mib_per_s, ns_each, open};
use crate::progress::check;

/// One figure of one round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// In the unit of its operation.
    pub value: f64,
    /// Reads that were checked, and those that returned what had been overwritten before.
    pub stale: (u64, u64),
}

impl From<f64> for Sample {
    fn from(value: f64) -> Self {
        Self { value, stale: (0, 0) }
    }
}

/// An operation.
pub struct Measure {
    /// For people.
    pub name: &'static str,
    /// `us` (less is better), `MiB/s` or `1/s`.
    pub unit: &'static str,
    /// Needs two mounts.
    pub two: bool,
    /// One round of it.
    pub run: fn(&[PathBuf], &Scale) -> anyhow::Result<Sample>,
}

fn us(ns: f64) -> Sample {
    (ns / 1e3).into()
}

/// The one whose bandwidth is compared with the network's.
pub const MISSED_READ: &str = "1 MiB read that misses every cache";

/// In the order of the rows.
pub const MEASURES: &[Measure] = &[
    Measure {
        name: "4 KiB cached read",
        unit: "us",
        two: false,
        run: |d, s| Ok(us(micro::cached_read(&d[0], s)?)),
    },
    Measure {
        name: "4 KiB write",
        unit: "us",
        two: false,
        run: |d, s| Ok(us(micro::write_4k(&d[0], s)?)),
    },
    Measure {
        name: "4 KiB write + fsync",
        unit: "us",
        two: false,
        run: |d, s| write_sync(&d[0], s),
    },
    Measure {
        name: MISSED_READ,
        unit: "MiB/s",
        two: false,
        run: missed_read,
    },
    Measure {
        name: "1 MiB write, existing file",
        unit: "MiB/s",
        two: false,
        run: |d, s| Ok(micro::seq_overwrite(&d[0], s)?.into()),
    },
    Measure {
        name: "1 MiB write, existing file, and fsync",
        unit: "MiB/s",
        two: false,
        run: |d, s| overwrite_sync(&d[0], s),
    },
    Measure {
        name: "1 MiB write, new file, and close",
        unit: "MiB/s",
        two: false,
        run: |d, s| Ok(micro::seq_write_new(&d[0], s)?.into()),
    },
    Measure {
        name: "create + write 4 KiB + close",
        unit: "1/s",
        two: false,
        run: |d, s| Ok(micro::create(&d[0], s)?.into()),
    },
    Measure {
        name: "stat by path, cached",
        unit: "us",
        two: false,
        run: |d, s| Ok(us(micro::stat(&d[0], s)?)),
    },
    Measure {
        name: "fstat, cached",
        unit: "us",
        two: false,
        run: |d, s| Ok(us(micro::fstat(&d[0], s)?)),
    },
    Measure {
        name: "overwrite on A, read on B, files open",
        unit: "1/s",
        two: true,
        run: |d, s| alternate(d, s, false),
    },
    Measure {
        name: "open, overwrite, close on A, the same with a read on B",
        unit: "1/s",
        two: true,
        run: |d, s| alternate(d, s, true),
    },
];

/// A 4 KiB overwrite made durable, each on its own.
fn write_sync(dir: &Path, s: &Scale) -> anyhow::Result<Sample> {
    let file = hot(dir, "hot", 16 * MIB as u64)?;
    let page = vec![6u8; PAGE];
    let calls = (s.writes / 4).max(1);
    let one = |n: u64| -> anyhow::Result<()> {
        file.write_all_at(&page, n % 64 * PAGE as u64)?;
        Ok(file.sync_data()?)
    };
    (0..4).try_for_each(one)?;
    let start = Instant::now();
    (0..calls).try_for_each(one)?;
    Ok(us(ns_each(start, calls)))
}

fn overwrite_sync(dir: &Path, s: &Scale) -> anyhow::Result<Sample> {
    let file = hot(dir, "stream", s.stream)?;
    let block = vec![7u8; MIB];
    let start = Instant::now();
    for at in (0..s.stream).step_by(MIB) {
        file.write_all_at(&block, at)?;
    }
    file.sync_data()?;
    Ok(mib_per_s(start, s.stream).into())
}

/// Has the other mount (the same one, where there is one only) write a file, durably, and the kernel forget what it
/// has of it. The number is in its blocks.
///
/// # Errors
/// A call fails.
pub fn written_elsewhere(dirs: &[PathBuf], size: u64, number: u64) -> anyhow::Result<File> {
    let [first, .., last] = dirs else {
        let [only] = dirs else { anyhow::bail!("no mount") };
        return written_elsewhere(&[only.clone(), only.clone()], size, number);
    };
    let writer = open(&last.join("missed"))?;
    let block = number.to_le_bytes().repeat(MIB / 8);
    for at in (0..size).step_by(MIB) {
        writer.write_all_at(&block, at)?;
        check()?;
    }
    writer.sync_all()?;
    drop(writer);
    let reader = File::open(first.join("missed")).context("the file that the other mount wrote")?;
    rustix::fs::fadvise(&reader, 0, None, rustix::fs::Advice::DontNeed)?;
    // What else the kernel may have; only root can have it dropped, and for others the above is enough.
    let _ = std::fs::write("/proc/sys/vm/drop_caches", "1");
    Ok(reader)
}

/// Reads it in blocks of 1 MiB; how many were not of this number.
///
/// # Errors
/// A call fails.
pub fn read_through(reader: &File, size: u64, number: u64) -> anyhow::Result<u64> {
    let mut block = vec![0u8; MIB];
    let mut stale = 0;
    for at in (0..size).step_by(MIB) {
        reader.read_exact_at(&mut block, at)?;
        let ends = [&block[..8], &block[MIB - 8..]];
        stale += u64::from(ends.iter().any(|e| **e != number.to_le_bytes()));
    }
    Ok(stale)
}

fn missed_read(dirs: &[PathBuf], s: &Scale) -> anyhow::Result<Sample> {
    let number = rand::random();
    let reader = written_elsewhere(dirs, s.stream, number)?;
    let start = Instant::now();
    let stale = read_through(&reader, s.stream, number)?;
    Ok(Sample {
        value: mib_per_s(start, s.stream),
        stale: (s.stream / MIB as u64, stale),
    })
}

/// Overwrites 64 bytes on one mount and reads them on the other; with `reopen` as close-to-open consistency wants it.
fn alternate(dirs: &[PathBuf], s: &Scale, reopen: bool) -> anyhow::Result<Sample> {
    let [first, second, ..] = dirs else {
        anyhow::bail!("two mounts are needed")
    };
    let (a, b) = (first.join("turns"), second.join("turns"));
    open(&a)?.write_all_at(&[0; 64], 0)?;
    let (mut writer, mut reader) = (open(&a)?, File::open(&b)?);
    let first_turn: u64 = rand::random();
    let mut one = |n: u64| -> anyhow::Result<u64> {
        let message = first_turn.wrapping_add(n).to_le_bytes().repeat(8);
        if reopen {
            writer = open(&a)?;
        }
        writer.write_all_at(&message, 0)?;
        if reopen {
            // What is written back at the close is written back before anybody opens.
            writer = File::open("/dev/null")?;
            reader = File::open(&b)?;
        }
        let mut seen = [0u8; 64];
        reader.read_exact_at(&mut seen, 0)?;
        Ok(u64::from(seen[..] != message[..]))
    };
    (0..4).try_for_each(|n| one(n).map(drop))?;
    let start = Instant::now();
    let mut stale = 0;
    for n in 4..s.turns + 4 {
        stale += one(n)?;
    }
    Ok(Sample {
        value: s.turns as f64 / start.elapsed().as_secs_f64(),
        stale: (s.turns, stale),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Scale {
        Scale {
            reads: 50,
            writes: 20,
            stream: 2 << 20,
            files: 3,
            turns: 5,
            ..Scale::quick()
        }
    }

    #[test]
    fn everything_on_one_directory() {
        let dir = tempfile::tempdir().unwrap();
        let both = [dir.path().to_owned(), dir.path().to_owned()];
        for measure in MEASURES {
            let sample = (measure.run)(&both, &tiny()).unwrap();
            assert!(sample.value > 0.0 && sample.stale.1 == 0, "{}", measure.name);
        }
    }

    #[test]
    fn stale_data_is_counted() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(b.path().join("turns"), [0xaa; 64]).unwrap();
        let two = [a.path().to_owned(), b.path().to_owned()];
        for reopen in [false, true] {
            assert_eq!(alternate(&two, &tiny(), reopen).unwrap().stale, (5, 5));
        }
        let old = written_elsewhere(&two[..1], 1 << 20, 7).unwrap();
        assert_eq!(read_through(&old, 1 << 20, 8).unwrap(), 1);
    }
}
