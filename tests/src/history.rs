//! Recording what several threads do through several mounts at once, and having it checked.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::linear::{Event, Model, Names, NamesOp, Records, RecordsOp, Register, RegisterOp, check};
use crate::sys;

/// Threads on each mount, mostly.
pub const THREADS: usize = 2;

/// Runs `worker` on so many threads of each mount with a clock that all share; returns what they recorded.
fn record<Op: Send>(
    (mounts, threads): (&[PathBuf], usize),
    seed: u64,
    worker: impl Fn(&Path, usize, &mut StdRng, &mut Recorder<Op>) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<Vec<Event<Op>>> {
    let clock = Instant::now();
    let worker = &worker;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads * mounts.len())
            .map(|id| {
                let mount = &mounts[id % mounts.len()];
                scope.spawn(move || {
                    let mut rng = StdRng::seed_from_u64(seed ^ ((id as u64) << 48));
                    let mut recorder = Recorder {
                        clock,
                        events: Vec::new(),
                    };
                    worker(mount, id, &mut rng, &mut recorder).map(|()| recorder.events)
                })
            })
            .collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| anyhow!("a worker panicked"))??);
        }
        Ok(all)
    })
}

/// The history of one thread.
struct Recorder<Op> {
    clock: Instant,
    events: Vec<Event<Op>>,
}

impl<Op> Recorder<Op> {
    fn now(&self) -> u64 {
        self.clock.elapsed().as_nanos() as u64
    }

    /// Runs an operation and records it; its result is part of the operation.
    fn run(&mut self, job: impl FnOnce() -> anyhow::Result<Op>) -> anyhow::Result<()> {
        let called = self.now();
        let op = job()?;
        self.events.push(Event {
            op,
            called,
            returned: Some(self.now()),
        });
        Ok(())
    }
}

/// The beginning and the end of a long text.
fn shorten(text: &str) -> String {
    if text.len() <= 150 || !text.is_ascii() {
        return text.to_owned();
    }
    format!("{}…{}", &text[..30], &text[text.len() - 110..])
}

fn judge<M: Model>(what: &str, seed: u64, model: &M, mut history: Vec<Event<M::Op>>) -> anyhow::Result<()>
where
    M::Op: std::fmt::Debug,
{
    history.sort_by_key(|e| e.called);
    check(model, &history).map_err(|at| {
        let near = history.iter().enumerate().skip(at.saturating_sub(12)).take(24);
        let lines: Vec<String> = near
            .map(|(i, e)| {
                let mark = if i == at { ">" } else { " " };
                let op = shorten(&format!("{:?}", e.op));
                format!("{mark} {:>12} {:>12} {op}", e.called, e.returned.unwrap_or(0))
            })
            .collect();
        anyhow!(
            "{what}, seed {seed}: not linearizable, operation {at} does not fit:\n{}",
            lines.join("\n")
        )
    })
}

/// The events of one register out of a history of several.
fn of_register<Op>(
    history: &[Event<Op>],
    is: impl Fn(&Op) -> bool,
    op: impl Fn(&Op) -> RegisterOp,
) -> Vec<Event<RegisterOp>> {
    let events = history.iter().filter(|e| is(&e.op));
    events
        .map(|e| Event {
            op: op(&e.op),
            called: e.called,
            returned: e.returned,
        })
        .collect()
}

/// Blocks of `size` bytes with one value each, overwritten and read from everywhere.
///
/// Writers use write-only handles: pages written through a read-write handle opened before the file was
/// shared may be seen early by readers on the same node (a limit of the stock kernel's page cache). Where both read and
/// write the page cache, threads of one node may see each other's blocks torn, as on other file systems of Linux, whose
/// readers take no lock: then there is to be one thread a mount, or blocks of 8 bytes.
///
/// # Errors
/// A system call failed, a block was torn, or the history is not linearizable.
pub fn registers(
    (mounts, threads): (&[PathBuf], usize),
    size: usize,
    rounds: usize,
    seed: u64,
) -> anyhow::Result<()> {
    const BLOCKS: u64 = 3;
    let name = format!("registers-{size}-{seed}");
    fs::write(mounts[0].join(&name), vec![0; size * BLOCKS as usize])?;
    let history = record((mounts, threads), seed, |mount, id, rng, recorder| {
        let path = mount.join(&name);
        let (writer, reader) = (sys::open(&path, libc::O_WRONLY)?, File::open(&path)?);
        for i in 0..rounds as u64 {
            let block = rng.random_range(0..BLOCKS);
            let at = block * size as u64;
            recorder.run(|| {
                if rng.random_bool(0.4) {
                    let value = ((id as u64 + 1) << 32) | (i + 1);
                    let data: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(size).collect();
                    ensure!(writer.write_at(&data, at)? == size, "short write");
                    return Ok((block, RegisterOp::Write(value)));
                }
                let data = sys::read_at(&reader, at, size)?;
                ensure!(data.len() == size, "short read: {} bytes", data.len());
                ensure!(
                    data.chunks(8).all(|c| c == &data[..8]),
                    "torn block {block}, thread {id}, seed {seed}"
                );
                let value = u64::from_le_bytes(data[..8].try_into().context("eight bytes")?);
                Ok((block, RegisterOp::Read(value)))
            })?;
        }
        Ok(())
    })?;
    for block in 0..BLOCKS {
        let events = of_register(&history, |op| op.0 == block, |op| op.1.clone());
        judge(&format!("block {block} of {size} bytes"), seed, &Register, events)?;
    }
    Ok(())
}

/// Words of one file, stored and loaded through shared mappings and written and read by calls, from everywhere.
///
/// # Errors
/// A system call failed, or the history is not linearizable.
pub fn mapped(mounts: &[PathBuf], rounds: usize, seed: u64) -> anyhow::Result<()> {
    /// Two words of one page, one of another.
    const WORDS: [u64; 3] = [0, 64, 4096 + 8];
    const SIZE: usize = 8192;
    let name = format!("mapped-{seed}");
    fs::write(mounts[0].join(&name), vec![0; SIZE])?;
    let history = record((mounts, THREADS), seed, |mount, id, rng, recorder| {
        let file = sys::open(&mount.join(&name), libc::O_RDWR)?;
        let map = sys::Map::writable(&file, SIZE)?;
        for i in 0..rounds as u64 {
            let word = rng.random_range(0..WORDS.len());
            let at = WORDS[word];
            recorder.run(|| {
                let value = ((id as u64 + 1) << 32) | (i + 1);
                let op = match rng.random_range(0..4) {
                    0 => {
                        map.word(at as usize).store(value, Ordering::SeqCst);
                        RegisterOp::Write(value)
                    }
                    1 => {
                        ensure!(file.write_at(&value.to_ne_bytes(), at)? == 8, "short write");
                        RegisterOp::Write(value)
                    }
                    2 => RegisterOp::Read(map.word(at as usize).load(Ordering::SeqCst)),
                    _ => {
                        let data = sys::read_at(&file, at, 8)?;
                        RegisterOp::Read(u64::from_ne_bytes(data.try_into().ok().context("a short read")?))
                    }
                };
                Ok((word, op))
            })?;
        }
        Ok(())
    })?;
    for word in 0..WORDS.len() {
        let events = of_register(&history, |op| op.0 == word, |op| op.1.clone());
        judge(&format!("word {word}"), seed, &Register, events)?;
    }
    Ok(())
}

/// Appends, truncations, reads and sizes of one file.
///
/// A read from the kernel's pages beside a truncation on the same node may see zeros, on every file system of a
/// stock kernel (the reader takes no lock): with `pages`, a file that is truncated is read by O_DIRECT. Every mount
/// has the file open for writing before the first reader opens it: a reader from before may read to where the file
/// ended a moment ago (docs/architecture.md, kernel caching per open file).
///
/// # Errors
/// A system call failed, or the history is not linearizable.
pub fn records(mounts: &[PathBuf], pages: bool, cut: bool, rounds: usize, seed: u64) -> anyhow::Result<()> {
    let name = format!("records-{cut}-{seed}");
    File::create(mounts[0].join(&name))?;
    let _open: Vec<File> = mounts
        .iter()
        .map(|m| sys::open(&m.join(&name), libc::O_WRONLY))
        .collect::<Result<_, _>>()?;
    let history = record((mounts, THREADS), seed, |mount, id, rng, recorder| {
        let path = mount.join(&name);
        let mut writer = sys::open(&path, libc::O_WRONLY | libc::O_APPEND)?;
        let reader = sys::open(&path, if pages && cut { libc::O_DIRECT } else { 0 })?;
        for i in 0..rounds as u64 {
            recorder.run(|| match rng.random_range(if cut { 0 } else { 1 }..10) {
                1..5 => {
                    let value = ((id as u64 + 1) << 32) | (i + 1);
                    ensure!(writer.write(&value.to_le_bytes())? == 8, "short append");
                    Ok(RecordsOp::Append(value))
                }
                0 => {
                    let count = rng.random_range(0..4);
                    writer.set_len(8 * count as u64)?;
                    Ok(RecordsOp::Truncate(count))
                }
                5..7 => {
                    let len = if rng.random() {
                        path.metadata()?.len()
                    } else {
                        reader.metadata()?.len()
                    };
                    ensure!(len.is_multiple_of(8), "size {len}");
                    Ok(RecordsOp::Count(len as usize / 8))
                }
                _ => {
                    // One call: several would not be one moment.
                    let mut data = vec![0; 1 << 16];
                    let n = reader.read_at(&mut data, 0)?;
                    ensure!(n.is_multiple_of(8), "a torn record: {n} bytes");
                    let words = data[..n].chunks(8).filter_map(|c| c.try_into().ok());
                    Ok(RecordsOp::Read(words.map(u64::from_le_bytes).collect()))
                }
            })?;
        }
        Ok(())
    })?;
    judge("records", seed, &Records::of(&history), history)
}

/// Creates, replaces, takes away and looks at a few names.
///
/// Every rename has a name of the thread's own at one end. Two mounts that rename one and the same shared name
/// at the same moment may both be told "done" by a stock kernel: it looks both names up, finds one inode, and
/// returns success without asking the file system.
///
/// # Errors
/// A system call failed in a way it must not, or the history is not linearizable.
pub fn names(mounts: &[PathBuf], rounds: usize, seed: u64) -> anyhow::Result<()> {
    const NAMES: usize = 3;
    let folder = format!("names-{seed}");
    fs::create_dir(mounts[0].join(&folder))?;
    let history = record((mounts, THREADS), seed, |mount, thread, rng, recorder| {
        let folder = mount.join(&folder);
        let exclusive = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
        let found = |errno: i32, not: i32| match errno {
            0 => Ok(true),
            e if e == not => Ok(false),
            e => Err(anyhow!("errno {e}")),
        };
        for i in 0..rounds {
            let name = rng.random_range(0..NAMES);
            let shared = folder.join(format!("shared{name}"));
            let own = folder.join(format!("own{thread}-{i}"));
            match rng.random_range(0..10) {
                0 => recorder.run(|| {
                    let made = sys::open(&shared, exclusive);
                    let found = found(sys::errno(&made), libc::EEXIST).context("create")?;
                    // The number belongs to the handle: no other call can change it.
                    let id = made
                        .ok()
                        .map(|file| file.metadata())
                        .transpose()?
                        .map_or(0, |m| m.ino());
                    Ok(NamesOp::Create(name, id, found))
                })?,
                1..3 => {
                    let id = sys::open(&own, exclusive)?.metadata()?.ino();
                    recorder.run(|| {
                        fs::rename(&own, &shared).context("rename over")?;
                        Ok(NamesOp::Replace(name, id))
                    })?;
                }
                3 => recorder.run(|| {
                    let errno = sys::errno(&fs::rename(&shared, &own));
                    let found = found(errno, libc::ENOENT).context("rename away")?;
                    let id = if found {
                        Some(own.symlink_metadata()?.ino())
                    } else {
                        None
                    };
                    Ok(NamesOp::Take(name, id))
                })?,
                4 => recorder.run(|| {
                    let errno = sys::errno(&fs::remove_file(&shared));
                    Ok(NamesOp::Unlink(
                        name,
                        found(errno, libc::ENOENT).context("unlink")?,
                    ))
                })?,
                _ => recorder.run(|| {
                    let seen = fs::symlink_metadata(&shared);
                    found(sys::errno(&seen), libc::ENOENT).context("stat")?;
                    Ok(NamesOp::Stat(name, seen.ok().map(|m| m.ino())))
                })?,
            }
        }
        Ok(())
    })?;
    judge("names", seed, &Names { count: NAMES }, history)
}
