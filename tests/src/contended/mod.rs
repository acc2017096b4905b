//! Several tasks of one mount against several of others, on the same files: appends, overlapping writes, truncations, holes,
//! stores to mappings, reads. Lost, torn and stale data show by the stamps in it.

mod log;
mod register;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::guard::together;
use crate::sys::{self, Map};
use register::{Read, Span, Write};

/// A place that is stamped: small enough that no write begins or ends inside.
const PLACE: usize = 512;
/// Places of a file.
const PLACES: usize = 1024;
/// Most places of one write: three pages and a half.
const LONGEST: usize = 28;

/// What is done.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Tasks of each mount.
    pub tasks: usize,
    /// Operations of each task.
    pub steps: usize,
    /// What is left to chance is drawn from this.
    pub seed: u64,
    /// Also what takes the kernel extension: stores to shared mappings, and appends by a flag of the call.
    pub extension: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Records appended, by all tasks.
    pub appended: u64,
    /// Writes and reads of places.
    pub writes: usize,
    /// Reads of places.
    pub reads: usize,
    /// What must not be.
    pub violations: Vec<String>,
}

/// One file that is written to everywhere.
struct Board {
    files: Vec<File>,
    maps: Vec<Map>,
    writes: Mutex<Vec<Write>>,
    reads: Mutex<Vec<Read>>,
}

struct World<'a> {
    plan: &'a Plan,
    mounts: usize,
    clock: AtomicU64,
    stamp: AtomicU64,
    written: Board,
    mapped: Board,
    logs: Vec<PathBuf>,
    appended: Vec<AtomicU32>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs a plan in directories that lead to one folder, a mount each.
///
/// # Errors
/// A call failed, or a log is not what was appended. Violations that the stamps show are no errors here.
pub fn run(dirs: &[PathBuf], plan: &Plan) -> anyhow::Result<Outcome> {
    let first = dirs.first().context("no mount")?;
    let name = format!("contended-{:08x}", rand::random::<u32>());
    std::fs::create_dir(first.join(&name))?;
    let dirs: Vec<PathBuf> = dirs.iter().map(|dir| dir.join(&name)).collect();
    let world = World {
        plan,
        mounts: dirs.len(),
        clock: AtomicU64::new(1),
        stamp: AtomicU64::new(1),
        written: board(&dirs, "written", false)?,
        mapped: board(&dirs, "mapped", plan.extension)?,
        logs: dirs.iter().map(|dir| dir.join("log")).collect(),
        appended: (0..dirs.len() * plan.tasks).map(|_| AtomicU32::new(0)).collect(),
    };
    File::create(world.logs.first().context("no mount")?)?;
    together(dirs.len() * plan.tasks, |task| world.task(task))?;
    let outcome = world.check()?;
    std::fs::remove_dir_all(dirs.first().context("no mount")?)?;
    Ok(outcome)
}

fn board(dirs: &[PathBuf], name: &str, mapped: bool) -> anyhow::Result<Board> {
    let first = dirs.first().context("no mount")?;
    File::create(first.join(name))?.set_len((PLACE * PLACES) as u64)?;
    let open = |dir: &PathBuf| sys::open(&dir.join(name), libc::O_RDWR);
    let files = dirs.iter().map(open).collect::<Result<Vec<_>, _>>()?;
    let map = |file| Map::writable(file, PLACE * PLACES);
    let maps = if mapped {
        files.iter().map(map).collect::<Result<_, _>>()?
    } else {
        Vec::new()
    };
    Ok(Board {
        files,
        maps,
        writes: Mutex::default(),
        reads: Mutex::default(),
    })
}

impl World<'_> {
    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    fn timed<T>(&self, job: impl FnOnce() -> std::io::Result<T>) -> std::io::Result<(T, Span)> {
        let start = self.tick();
        let done = job()?;
        let end = self.tick();
        Ok((done, Span { start, end }))
    }

    fn task(&self, task: usize) -> anyhow::Result<()> {
        let mount = task % self.mounts;
        let mut rng = StdRng::seed_from_u64(self.plan.seed ^ (task as u64).wrapping_mul(0x9e37_79b9));
        let flags = if self.appends_by_call(task) {
            0
        } else {
            libc::O_APPEND
        };
        let log = sys::open(&self.logs[mount], libc::O_WRONLY | flags)?;
        let mut reader = log::Reader::new(self.mounts * self.plan.tasks);
        for _ in 0..self.plan.steps {
            match rng.random_range(0..20) {
                0..=5 => self.append(&log, task, &mut rng)?,
                6 => self.follow(mount, &mut reader)?,
                7..=12 => self.write(mount, &mut rng)?,
                13..=15 => self.read(&self.written, mount, &mut rng)?,
                16 => self.cut(mount, &mut rng)?,
                _ if self.plan.extension => self.store(mount, &mut rng)?,
                _ => self.read(&self.written, mount, &mut rng)?,
            }
        }
        Ok(())
    }

    /// Half of the tasks of each mount.
    fn appends_by_call(&self, task: usize) -> bool {
        self.plan.extension && task / self.mounts % 2 == 1
    }

    fn append(&self, log: &File, task: usize, rng: &mut StdRng) -> anyhow::Result<()> {
        let number = self.appended[task].load(Ordering::Relaxed);
        let len = match rng.random_range(0..8) {
            0 => rng.random_range(4096..12_000),
            _ => rng.random_range(16..600),
        };
        let record = log::record(task as u32, number, len);
        let n = if self.appends_by_call(task) {
            sys::append(log, &record)
        } else {
            let mut log = log;
            std::io::Write::write(&mut log, &record)
        };
        let n = n.context("append")?;
        ensure!(n == record.len(), "appended {n} of {} bytes", record.len());
        self.appended[task].store(number + 1, Ordering::SeqCst);
        Ok(())
    }

    /// Reads on in the log: what other mounts appended is whole, and nothing is missing that had been acknowledged.
    fn follow(&self, mount: usize, reader: &mut log::Reader) -> anyhow::Result<()> {
        let due: Vec<u32> = self.appended.iter().map(|n| n.load(Ordering::SeqCst)).collect();
        let log = File::open(&self.logs[mount])?;
        let size = log.metadata()?.len();
        let len = size.checked_sub(reader.offset).context("the log got shorter")?;
        let data = sys::read_at(&log, reader.offset, len as usize)?;
        reader
            .feed(&data, |task| task % self.mounts == mount)
            .with_context(|| format!("the log on mount {mount}"))?;
        for (task, due) in due.iter().enumerate() {
            // Of this mount's own tasks some may come behind one that is not whole yet.
            let late = reader.offset < size;
            ensure!(
                late || reader.seen(task) >= *due,
                "mount {mount}: {} records of task {task} in the log, {due} were appended",
                reader.seen(task)
            );
        }
        Ok(())
    }

    fn write(&self, mount: usize, rng: &mut StdRng) -> anyhow::Result<()> {
        let len = rng.random_range(1..=LONGEST);
        let first = rng.random_range(0..=PLACES - len);
        let stamp = self.stamp.fetch_add(1, Ordering::SeqCst);
        let data = stamp.to_le_bytes().repeat(len * PLACE / 8);
        let file = &self.written.files[mount];
        let ((), span) = self
            .timed(|| file.write_all_at(&data, (first * PLACE) as u64))
            .context("write")?;
        lock(&self.written.writes).push(Write {
            first,
            end: first + len,
            stamp,
            span,
        });
        Ok(())
    }

    /// Zeros: a truncation, after which the file gets its length back, or a hole.
    fn cut(&self, mount: usize, rng: &mut StdRng) -> anyhow::Result<()> {
        let len = rng.random_range(1..=LONGEST);
        let file = &self.written.files[mount];
        let (first, end, span) = if rng.random() {
            let first = PLACES - len;
            let ((), span) = self
                .timed(|| file.set_len((first * PLACE) as u64))
                .context("truncate")?;
            file.set_len((PLACES * PLACE) as u64).context("grow")?;
            (first, PLACES, span)
        } else {
            let first = rng.random_range(0..=PLACES - len);
            let ((), span) = self
                .timed(|| sys::punch(file, (first * PLACE) as u64, (len * PLACE) as u64))
                .context("punch")?;
            (first, first + len, span)
        };
        lock(&self.written.writes).push(Write {
            first,
            end,
            stamp: 0,
            span,
        });
        Ok(())
    }

    fn read(&self, board: &Board, mount: usize, rng: &mut StdRng) -> anyhow::Result<()> {
        let len = rng.random_range(1..=LONGEST);
        let first = rng.random_range(0..=PLACES - len);
        self.read_places(board, mount, first, len)
    }

    fn read_places(&self, board: &Board, mount: usize, first: usize, len: usize) -> anyhow::Result<()> {
        let file = &board.files[mount];
        let (mut data, span) = self
            .timed(|| sys::read_at(file, (first * PLACE) as u64, len * PLACE))
            .context("read")?;
        // Behind the end of the file there are zeros to come.
        data.resize(len * PLACE, 0);
        let mut reads = lock(&board.reads);
        for (i, place) in data.chunks_exact(PLACE).enumerate() {
            let mut last = None;
            for word in place.as_chunks::<8>().0 {
                let stamp = u64::from_le_bytes(*word);
                if last.replace(stamp) != Some(stamp) {
                    reads.push(Read {
                        place: first + i,
                        stamp,
                        span,
                    });
                }
            }
        }
        Ok(())
    }

    /// Stores to a mapping, and a look at others through it.
    fn store(&self, mount: usize, rng: &mut StdRng) -> anyhow::Result<()> {
        let board = &self.mapped;
        let map = &board.maps[mount];
        let place = rng.random_range(0..PLACES);
        if rng.random_range(0..3) == 0 {
            return self.read(board, mount, rng);
        }
        if rng.random() {
            let (stamp, span) = self.timed(|| Ok(map.word(place * PLACE).load(Ordering::SeqCst)))?;
            lock(&board.reads).push(Read { place, stamp, span });
            return Ok(());
        }
        let stamp = self.stamp.fetch_add(1, Ordering::SeqCst);
        let ((), span) = self.timed(|| {
            for word in (0..PLACE).step_by(8) {
                map.word(place * PLACE + word).store(stamp, Ordering::SeqCst);
            }
            Ok(())
        })?;
        lock(&board.writes).push(Write {
            first: place,
            end: place + 1,
            stamp,
            span,
        });
        Ok(())
    }

    /// When all is over every mount shows the same.
    fn check(&self) -> anyhow::Result<Outcome> {
        let tasks = self.appended.len();
        for (mount, log) in self.logs.iter().enumerate() {
            let mut reader = log::Reader::new(tasks);
            let data = std::fs::read(log)?;
            reader
                .feed(&data, |_| false)
                .with_context(|| format!("the log in the end, on mount {mount}"))?;
            ensure!(reader.offset == data.len() as u64, "half a record at the end");
            for (task, count) in self.appended.iter().enumerate() {
                let (seen, due) = (reader.seen(task), count.load(Ordering::SeqCst));
                ensure!(
                    seen == due,
                    "task {task}: {seen} records in the log, {due} were appended"
                );
            }
        }
        let mut outcome = Outcome {
            appended: self
                .appended
                .iter()
                .map(|n| u64::from(n.load(Ordering::SeqCst)))
                .sum(),
            ..Outcome::default()
        };
        for board in [&self.written, &self.mapped] {
            for mount in 0..self.mounts {
                self.read_places(board, mount, 0, PLACES)?;
            }
            let (writes, reads) = (lock(&board.writes), lock(&board.reads));
            outcome.writes += writes.len();
            outcome.reads += reads.len();
            outcome
                .violations
                .extend(register::violations(PLACES, &writes, &reads));
        }
        Ok(outcome)
    }
}

/// As [`run`], where violations are errors.
///
/// # Errors
/// As [`run`]; violations.
pub fn prove(dirs: &[&Path], plan: &Plan) -> anyhow::Result<Outcome> {
    let dirs: Vec<PathBuf> = dirs.iter().map(|dir| dir.to_path_buf()).collect();
    let outcome = run(&dirs, plan).with_context(|| format!("{plan:?}"))?;
    ensure!(
        outcome.violations.is_empty(),
        "{plan:?}: {} violations, the first: {}",
        outcome.violations.len(),
        outcome
            .violations
            .iter()
            .take(3)
            .cloned()
            .collect::<Vec<_>>()
            .join("; ")
    );
    Ok(outcome)
}
