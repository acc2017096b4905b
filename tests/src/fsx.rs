//! Random input and output on one file through several paths, checked against an image in memory.
//!
//! In the manner of the classic fsx, which knows one path only: here every step may go through another
//! mount than the one before. With the kernel extension also through shared mappings that are stored to, and that are
//! held while other mounts write and cut the file.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::sys;

/// Largest size of the file.
const MAX: usize = 300_000;
/// Largest length of one step.
const STEP: usize = 70_000;
/// Steps told of after a failure.
const TOLD: usize = 20;

/// What steps there are: those of all modes, and behind them those through mappings that are stored to.
const PLAIN: usize = 100;
const MAPPED: usize = 135;

/// Handles of one mount.
struct Side {
    path: PathBuf,
    read: File,
    write: File,
    append: File,
    both: File,
    /// Of as much as the file can ever be: what is behind its end comes and goes under the mapping.
    held: Option<sys::Map>,
}

impl Side {
    fn open(path: PathBuf, mapped: bool) -> anyhow::Result<Self> {
        let both = sys::open(&path, libc::O_RDWR)?;
        let held = mapped.then(|| sys::Map::writable(&both, MAX)).transpose();
        Ok(Self {
            held: held.context("mmap")?,
            read: File::open(&path)?,
            write: sys::open(&path, libc::O_WRONLY)?,
            append: sys::open(&path, libc::O_WRONLY | libc::O_APPEND)?,
            both,
            path,
        })
    }

    /// The handle to write through: the read-write one sometimes.
    fn writer(&self, rng: &mut StdRng) -> &File {
        if rng.random_bool(0.3) {
            &self.both
        } else {
            &self.write
        }
    }
}

struct Run {
    sides: Vec<Side>,
    image: Vec<u8>,
    rng: StdRng,
    log: VecDeque<String>,
    mapped: bool,
}

/// Runs `steps` steps on one file seen at all `paths`; `mapped`: also stores to mappings, which a stock kernel shows others
/// only after msync, munmap or close.
///
/// # Errors
/// A system call failed, or something is not as in the image; with the seed and the last steps.
pub fn run(paths: &[PathBuf], steps: usize, seed: u64, mapped: bool) -> anyhow::Result<()> {
    File::create(&paths[0])?;
    let sides = paths
        .iter()
        .cloned()
        .map(|path| Side::open(path, mapped))
        .collect::<anyhow::Result<_>>()?;
    let mut run = Run {
        sides,
        image: Vec::new(),
        rng: StdRng::seed_from_u64(seed),
        log: VecDeque::new(),
        mapped,
    };
    for step in 0..steps {
        let result = run.step(step).and_then(|()| {
            if step % 50 == 49 {
                run.compare_all()
            } else {
                Ok(())
            }
        });
        result.with_context(|| {
            format!(
                "fsx seed {seed}, step {step}; the last steps:\n{}",
                run.log.make_contiguous().join("\n")
            )
        })?;
    }
    Ok(())
}

impl Run {
    fn tell(&mut self, text: String) {
        self.log.push_back(text);
        if self.log.len() > TOLD {
            self.log.pop_front();
        }
    }

    /// A range that may start anywhere in, or end behind, the file.
    fn range(&mut self) -> (usize, usize) {
        let start = self.rng.random_range(0..MAX);
        let start = if self.rng.random_bool(0.8) {
            start % (self.image.len() + 1)
        } else {
            start
        };
        let aligned = self.rng.random_bool(0.3);
        let len = self.rng.random_range(1..=STEP);
        let (start, len) = if aligned {
            (start & !4095, (len | 4095) + 1)
        } else {
            (start, len)
        };
        (start, len.min(MAX - start).max(1))
    }

    fn grow(&mut self, end: usize) {
        if end > self.image.len() {
            self.image.resize(end, 0);
        }
    }

    fn step(&mut self, step: usize) -> anyhow::Result<()> {
        let at = self.rng.random_range(0..self.sides.len());
        let (start, len) = self.range();
        let what = self.rng.random_range(0..if self.mapped { MAPPED } else { PLAIN });
        let size = self.image.len();
        self.tell(format!(
            "  {step}: side {at} kind {what} start {start} length {len} size {size}"
        ));
        let side = &self.sides[at];
        match what {
            0..30 => {
                let data: Vec<u8> = (0..len)
                    .map(|i| ((start + i) / 13 + step * 17) as u8 | 1)
                    .collect();
                side.writer(&mut self.rng).write_all_at(&data, start as u64)?;
                self.grow(start + len);
                self.image[start..start + len].copy_from_slice(&data);
            }
            30..55 => {
                let reader = if what % 5 == 0 { &side.both } else { &side.read };
                let got = sys::read_at(reader, start as u64, len)?;
                self.compare("read", start, len, &got)?;
            }
            55..65 => self.map(at, start, len)?,
            65..75 => {
                let to = if what < 70 { start } else { start.min(size) };
                if what % 2 == 0 {
                    side.write.set_len(to as u64)?;
                } else {
                    sys::truncate(&side.path, to as i64)?;
                }
                self.image.resize(to, 0);
            }
            75..81 => {
                sys::punch(&side.write, start as u64, len as u64).context("punch")?;
                let (start, end) = (start.min(size), (start + len).min(size));
                self.image[start..end].fill(0);
            }
            81..85 => {
                let mode = libc::FALLOC_FL_ZERO_RANGE;
                sys::fallocate(&side.write, mode, start as u64, len as u64).context("zero")?;
                self.grow(start + len);
                self.image[start..start + len].fill(0);
            }
            85..88 => {
                sys::fallocate(&side.write, 0, start as u64, len as u64).context("fallocate")?;
                self.grow(start + len);
            }
            88..92 => self.copy(at, start, len)?,
            92..96 => {
                let len = len.min(MAX.saturating_sub(size)).min(5000);
                let data = vec![step as u8 | 1; len];
                (&side.append).write_all_or_none(&data)?;
                self.image.extend_from_slice(&data);
            }
            96..98 => side.write.sync_all().context("fsync")?,
            98..PLAIN => self.sides[at] = Side::open(self.sides[at].path.clone(), self.mapped)?,
            PLAIN..125 => self.store(at, step, start, len)?,
            _ => {
                if let Some(held) = &side.held {
                    let (start, end) = (start.min(size), (start + len).min(size));
                    let got = held.read(start, end - start);
                    self.compare("held mapping", start, end - start, &got)?;
                }
            }
        }
        self.sizes()
    }

    fn map(&self, at: usize, start: usize, len: usize) -> anyhow::Result<()> {
        let size = self.image.len();
        if size > 0 {
            let start = start.min(size - 1);
            let len = len.min(size - start);
            let map = sys::Map::new(&self.sides[at].read, size).context("mmap")?;
            self.compare("mapping", start, len, &map.read(start, len))?;
        }
        Ok(())
    }

    /// Stores to a mapping that is held, or to one that ends with the step; nothing says when that is to be written.
    fn store(&mut self, at: usize, step: usize, start: usize, len: usize) -> anyhow::Result<()> {
        let size = self.image.len();
        if size == 0 {
            return Ok(());
        }
        let start = start.min(size - 1);
        let data: Vec<u8> = (start..(start + len).min(size))
            .map(|i| (i / 11 + step * 19) as u8 | 1)
            .collect();
        let fresh = self.rng.random_bool(0.3);
        let sync = [None, None, Some(libc::MS_ASYNC), Some(libc::MS_SYNC)][self.rng.random_range(0..4)];
        let side = &self.sides[at];
        let own = fresh.then(|| sys::Map::writable(&side.both, size)).transpose()?;
        let map = own.as_ref().or(side.held.as_ref()).context("no mapping")?;
        map.write(start, &data);
        if let Some(flags) = sync {
            map.sync(flags).context("msync")?;
        }
        self.image[start..start + data.len()].copy_from_slice(&data);
        Ok(())
    }

    fn copy(&mut self, at: usize, start: usize, len: usize) -> anyhow::Result<()> {
        let from = self.rng.random_range(0..=self.image.len());
        let len = len.min(self.image.len() - from).min(MAX - start);
        // Source and target may not overlap within one file.
        let len = len.min(from.abs_diff(start));
        if len > 0 {
            let side = &self.sides[at];
            let n = sys::copy_range(&side.read, from as u64, &side.write, start as u64, len)
                .with_context(|| format!("copy_file_range {from} → {start}, {len}"))?;
            ensure!(n == len, "copied {n} of {len}");
            self.grow(start + len);
            self.image.copy_within(from..from + len, start);
        }
        Ok(())
    }

    fn compare(&self, what: &str, start: usize, len: usize, got: &[u8]) -> anyhow::Result<()> {
        let size = self.image.len();
        let want = &self.image[start.min(size)..(start + len).min(size)];
        ensure!(
            got.len() == want.len(),
            "{what}: {} bytes instead of {}",
            got.len(),
            want.len()
        );
        if let Some(i) = got.iter().zip(want).position(|(g, w)| g != w) {
            let wrong = got.iter().zip(want).filter(|(g, w)| g != w).count();
            let at = start + i;
            anyhow::bail!(
                "{what}: byte {at} is {} instead of {} ({wrong} of {len} wrong)",
                got[i],
                want[i]
            );
        }
        Ok(())
    }

    /// All mounts agree on the size after every step.
    fn sizes(&self) -> anyhow::Result<()> {
        for (i, side) in self.sides.iter().enumerate() {
            let (by_path, by_handle) = (side.path.metadata()?.len(), side.read.metadata()?.len());
            let want = self.image.len() as u64;
            ensure!(
                by_path == want && by_handle == want,
                "size at side {i}: {by_path}, {by_handle}; not {want}"
            );
        }
        Ok(())
    }

    fn compare_all(&self) -> anyhow::Result<()> {
        for (i, side) in self.sides.iter().enumerate() {
            let all = sys::read_at(&side.read, 0, MAX + 10)?;
            self.compare(&format!("the whole at side {i}"), 0, MAX, &all)?;
        }
        Ok(())
    }
}

trait WriteOnce {
    fn write_all_or_none(&mut self, data: &[u8]) -> anyhow::Result<()>;
}

impl WriteOnce for &File {
    /// One write call: an append of several would not be one append.
    fn write_all_or_none(&mut self, data: &[u8]) -> anyhow::Result<()> {
        let n = std::io::Write::write(self, data)?;
        ensure!(n == data.len(), "short write: {n} of {}", data.len());
        Ok(())
    }
}
