//! The workloads of figure 9: loops in the manner of filebench's fileserver, webserver and netsfs, of our own.
//!
//! Every thread goes through its loop until time is up; each step picks a file of its set at random. A set is a tree
//! with 20 files a directory. At 0 % contention each node has a set of its own, at 100 % all have one. File sizes are
//! spread evenly from half the mean to one and a half, in whole pages. "Whole" means from open to close, in calls of
//! 1 MiB times the scale of sizes; what is appended each time is 16 KiB times that scale, at least a page.
//!
//! | | mean size | R:W | one turn |
//! | --- | --- | --- | --- |
//! | fileserver | 1.25 MB | 1:2 | unlink, create, write whole; open and append; open and read whole; stat |
//! | webserver | 160 KB | 10:1 | ten times open and read whole; append to the set's log, which is kept open |
//! | netsfs | 267 KB | 5:2 | stat, read whole, twice; unlink, create, write whole; stat, list a directory; read whole, three times; overwrite one call's worth within the file |
//!
//! R:W counts operations with data. A file that another thread has just unlinked, or made, is passed over.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::fs::stamp::{PAGE, Stamp, file_id};
use crate::progress::stopped;

/// Files a directory.
const WIDTH: usize = 20;
/// In place of a page's number where the writer cannot know it.
const APPENDED: u64 = u64::MAX;

#[derive(Debug, Clone, Copy)]
enum Step {
    Replace,
    Append,
    Log,
    Read,
    Overwrite,
    Stat,
    List,
}

/// Which loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Writes twice as often as it reads.
    Fileserver,
    /// Reads, and logs that.
    Webserver,
    /// Reads more than it writes.
    Netsfs,
}

impl Kind {
    /// All, in the paper's order.
    pub const ALL: [Self; 3] = [Self::Fileserver, Self::Webserver, Self::Netsfs];

    /// As filebench calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fileserver => "fileserver",
            Self::Webserver => "webserver",
            Self::Netsfs => "netsfs",
        }
    }

    /// The paper's number of files, and their mean size.
    fn paper(self) -> (f64, f64) {
        match self {
            Self::Fileserver => (10e3, 1.25e6),
            Self::Webserver => (80e3, 160e3),
            Self::Netsfs => (74e3, 267e3),
        }
    }

    fn turn(self) -> &'static [Step] {
        use Step::{Append, List, Log, Overwrite, Read, Replace, Stat};
        match self {
            Self::Fileserver => &[Replace, Append, Read, Stat],
            Self::Webserver => &[Read, Read, Read, Read, Read, Read, Read, Read, Read, Read, Log],
            Self::Netsfs => &[
                Stat, Read, Stat, Read, Replace, Stat, List, Read, Read, Read, Overwrite,
            ],
        }
    }
}

/// A workload of figure 9.
#[derive(Debug, Clone, Copy)]
pub struct Mix {
    /// Which loop.
    pub kind: Kind,
    /// All nodes use the same files.
    pub shared: bool,
    /// Nodes.
    pub nodes: usize,
    /// Threads a node.
    pub threads: usize,
    /// Files a node.
    pub files: usize,
    /// Mean size of a file, pages.
    pub pages: usize,
    /// Bytes a call.
    pub call: usize,
    /// Bytes appended each time.
    pub append: usize,
}

impl Mix {
    /// The paper's, with its number of files and their sizes scaled.
    pub fn new(kind: Kind, shared: bool, nodes: usize, threads: usize, count: f64, size: f64) -> Self {
        let (files, mean) = kind.paper();
        let whole = |bytes: f64| ((bytes * size / PAGE as f64).round() as usize).max(1);
        Self {
            kind,
            shared,
            nodes,
            threads,
            files: ((files * count) as usize).max(WIDTH),
            pages: whole(mean).max(2),
            call: whole(f64::from(1 << 20)) * PAGE,
            append: whole(f64::from(16 << 10)) * PAGE,
        }
    }

    fn set(&self, node: usize) -> String {
        let set = if self.shared {
            "all".into()
        } else {
            format!("node{node}")
        };
        format!("{}-{set}", self.kind.name())
    }

    fn path(&self, node: usize, file: usize) -> PathBuf {
        PathBuf::from(format!("{}/{}/{file}", self.set(node), file / WIDTH))
    }

    fn log(&self, node: usize) -> PathBuf {
        PathBuf::from(self.set(node)).join("log")
    }

    fn sets(&self) -> usize {
        if self.shared { 1 } else { self.nodes }
    }
}

fn id(path: &Path) -> u64 {
    file_id(&path.to_string_lossy())
}

fn is_gone(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::NotFound | ErrorKind::StaleNetworkFileHandle
    )
}

/// One thread's doings.
struct Worker<'a> {
    mix: &'a Mix,
    dir: &'a Path,
    node: usize,
    rng: StdRng,
    log: Option<File>,
    buffer: Vec<u8>,
    stamp: Stamp,
    bytes: u64,
    logged: u64,
}

impl<'a> Worker<'a> {
    fn new(mix: &'a Mix, dir: &'a Path, node: usize, writer: u64) -> Self {
        static COUNT: AtomicU64 = AtomicU64::new(1);
        Self {
            mix,
            dir,
            node,
            rng: StdRng::seed_from_u64(writer),
            log: None,
            buffer: vec![0; mix.call.max(mix.append)],
            stamp: Stamp {
                file: 0,
                page: 0,
                writer,
                // Different in every run.
                count: COUNT.fetch_add(1, Ordering::Relaxed) << 32,
            },
            bytes: 0,
            logged: 0,
        }
    }

    fn open_log(&mut self) -> anyhow::Result<()> {
        let path = self.dir.join(self.mix.log(self.node));
        let file = OpenOptions::new().append(true).create(true).open(&path);
        self.log = Some(file.with_context(|| format!("cannot open {}", path.display()))?);
        Ok(())
    }

    /// A number of pages around the mean.
    fn length(&mut self) -> usize {
        let mean = self.mix.pages;
        self.rng.random_range(mean.div_ceil(2)..=mean + mean / 2)
    }

    fn stamped(&mut self, path: &Path, page: u64, len: usize) {
        self.stamp.count += 1;
        let stamp = Stamp {
            file: id(path),
            page,
            ..self.stamp
        };
        stamp.put(&mut self.buffer[..len], page != APPENDED);
    }

    fn write_whole(&mut self, path: &Path) -> std::io::Result<()> {
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).open(self.dir.join(path))?;
        let len = self.length() * PAGE;
        for at in (0..len).step_by(self.mix.call) {
            let n = self.mix.call.min(len - at);
            self.stamped(path, (at / PAGE) as u64, n);
            file.write_all_at(&self.buffer[..n], at as u64)?;
            self.bytes += n as u64;
        }
        Ok(())
    }

    fn read_whole(&mut self, path: &Path) -> std::io::Result<()> {
        let mut file = File::open(self.dir.join(path))?;
        let call = self.mix.call;
        loop {
            let n = file.read(&mut self.buffer[..call])?;
            if n == 0 {
                return Ok(());
            }
            self.bytes += n as u64;
            let seen = Stamp::first(&self.buffer[..n]);
            if n >= PAGE && seen.is_none_or(|s| s.file != id(path)) {
                let what = format!("{} on node {}: {seen:?} is not of it", path.display(), self.node);
                return Err(std::io::Error::other(what));
            }
        }
    }

    fn append(&mut self, path: &Path) -> std::io::Result<()> {
        let mut file = OpenOptions::new().append(true).open(self.dir.join(path))?;
        let n = self.mix.append;
        self.stamped(path, APPENDED, n);
        file.write_all(&self.buffer[..n])?;
        self.bytes += n as u64;
        Ok(())
    }

    fn overwrite(&mut self, path: &Path) -> std::io::Result<()> {
        let file = OpenOptions::new().write(true).open(self.dir.join(path))?;
        // Only what is there: files do not get shorter, and no holes come about.
        let pages = file.metadata()?.len() / PAGE as u64;
        if pages == 0 {
            return Ok(());
        }
        let page = self.rng.random_range(0..pages);
        let n = self.mix.call.min((pages - page) as usize * PAGE);
        self.stamped(path, page, n);
        file.write_all_at(&self.buffer[..n], page * PAGE as u64)?;
        self.bytes += n as u64;
        Ok(())
    }

    fn step(&mut self, step: Step) -> std::io::Result<()> {
        let path = self.mix.path(self.node, self.rng.random_range(0..self.mix.files));
        match step {
            Step::Replace => {
                match fs::remove_file(self.dir.join(&path)) {
                    Err(error) if !is_gone(&error) => return Err(error),
                    _ => {}
                }
                match self.write_whole(&path) {
                    // Another thread was first. Two that write one file, each from its beginning, leave holes.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                    result => result,
                }
            }
            Step::Append => self.append(&path),
            Step::Read => self.read_whole(&path),
            Step::Overwrite => self.overwrite(&path),
            Step::Stat => fs::metadata(self.dir.join(&path)).map(|_| ()),
            Step::List => {
                let parent = self.dir.join(&path);
                fs::read_dir(parent.parent().unwrap_or(self.dir))?.try_for_each(|e| e.map(|_| ()))
            }
            Step::Log => {
                let n = self.mix.append;
                self.stamped(&self.mix.log(self.node), APPENDED, n);
                if let Some(log) = &mut self.log {
                    log.write_all(&self.buffer[..n])?;
                }
                self.bytes += n as u64;
                self.logged += (n / PAGE) as u64;
                Ok(())
            }
        }
    }

    fn run(&mut self, end: Instant) -> anyhow::Result<()> {
        for step in self.mix.kind.turn().iter().cycle() {
            if Instant::now() >= end || stopped() {
                return Ok(());
            }
            match self.step(*step) {
                Err(error) if is_gone(&error) => {}
                result => {
                    result.with_context(|| {
                        format!("{} on node {}, {step:?}", self.mix.kind.name(), self.node)
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// Makes all files.
///
/// # Errors
/// A file system call fails.
pub fn fill(mix: &Mix, dirs: &[PathBuf]) -> anyhow::Result<()> {
    for (node, dir) in dirs.iter().enumerate().take(mix.sets()) {
        let mut worker = Worker::new(mix, dir, node, 0);
        for file in 0..mix.files {
            let path = mix.path(node, file);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(dir.join(parent))?;
            }
            worker
                .write_whole(&path)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
    }
    Ok(())
}

/// Removes all files.
///
/// # Errors
/// A file system call fails.
pub fn clear(mix: &Mix, dirs: &[PathBuf]) -> anyhow::Result<()> {
    for node in 0..mix.sets() {
        fs::remove_dir_all(dirs[0].join(mix.set(node))).context("removing the files")?;
    }
    Ok(())
}

fn log_pages(mix: &Mix, dirs: &[PathBuf], node: usize) -> u64 {
    // Seen from another node than its own.
    let path = dirs[(node + 1) % dirs.len()].join(mix.log(node));
    path.metadata().map_or(0, |m| m.len() / PAGE as u64)
}

/// MB/s of all nodes; `dirs` is one directory a node.
///
/// # Errors
/// A file system call fails, or something appended to a log is lost.
pub fn run(mix: &Mix, dirs: &[PathBuf], duration: Duration) -> anyhow::Result<f64> {
    let before: u64 = (0..mix.sets()).map(|n| log_pages(mix, dirs, n)).sum();
    let mut workers = Vec::new();
    for (node, dir) in dirs.iter().enumerate().take(mix.nodes) {
        for thread in 0..mix.threads {
            let mut worker = Worker::new(mix, dir, node, (node * 1000 + thread + 1) as u64);
            if mix.kind == Kind::Webserver {
                worker.open_log()?;
            }
            workers.push(worker);
        }
    }
    let barrier = Barrier::new(workers.len() + 1);
    let took = std::thread::scope(|scope| {
        let start = |worker| {
            let (barrier, worker): (_, &mut Worker<'_>) = (&barrier, worker);
            scope.spawn(move || {
                barrier.wait();
                worker.run(Instant::now() + duration)
            })
        };
        let threads: Vec<_> = workers.iter_mut().map(start).collect();
        barrier.wait();
        let began = Instant::now();
        for thread in threads {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a thread died")))?;
        }
        anyhow::Ok(began.elapsed())
    })?;
    let after: u64 = (0..mix.sets()).map(|n| log_pages(mix, dirs, n)).sum();
    let logged: u64 = workers.iter().map(|w| w.logged).sum();
    ensure!(
        after - before == logged,
        "{logged} pages were appended to logs, which are longer by {}",
        after - before
    );
    let bytes: u64 = workers.iter().map(|w| w.bytes).sum();
    Ok(bytes as f64 / 1e6 / took.as_secs_f64())
}

/// Every page of every file must be whole and of it; each append must be in its log once.
///
/// # Errors
/// One is not.
pub fn verify(mix: &Mix, dirs: &[PathBuf]) -> anyhow::Result<()> {
    for node in 0..mix.sets() {
        let dir = &dirs[(node + 1) % dirs.len()];
        let log = mix.log(node);
        let mut appended = HashSet::new();
        for path in (0..mix.files).map(|n| mix.path(node, n)).chain([log.clone()]) {
            let content = match fs::read(dir.join(&path)) {
                // No log; or a file whose thread came to its end between unlinking and making it.
                Err(error) if is_gone(&error) => continue,
                result => result.with_context(|| format!("cannot read {}", path.display()))?,
            };
            ensure!(
                content.len().is_multiple_of(PAGE),
                "{}: {} bytes",
                path.display(),
                content.len()
            );
            for (n, page) in content.chunks(PAGE).enumerate() {
                let stamp =
                    Stamp::of(page).with_context(|| format!("{} page {n} is torn", path.display()))?;
                ensure!(
                    stamp.file == id(&path) && (stamp.page == n as u64 || stamp.page == APPENDED),
                    "{} page {n}: {stamp:?} is not of it",
                    path.display()
                );
                let twice = path == log && mix.append == PAGE && !appended.insert(stamp);
                ensure!(!twice, "{} page {n}: {stamp:?} is there twice", path.display());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_run_and_leave_whole_files() {
        for kind in Kind::ALL {
            for shared in [false, true] {
                let dir = tempfile::tempdir().unwrap();
                let dirs = [dir.path().to_owned(), dir.path().to_owned()];
                let mix = Mix::new(kind, shared, 2, 1, 1e-4, 0.02);
                assert!(mix.files >= WIDTH && mix.call >= PAGE && mix.append == PAGE);
                fill(&mix, &dirs).unwrap();
                assert!(run(&mix, &dirs, Duration::from_millis(30)).unwrap() > 0.0);
                verify(&mix, &dirs).unwrap();
                let path = dir.path().join(mix.path(0, 3));
                fs::write(&path, [0u8; PAGE]).unwrap();
                assert!(
                    verify(&mix, &dirs)
                        .unwrap_err()
                        .to_string()
                        .contains("is not of it")
                );
                clear(&mix, &dirs).unwrap();
                assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
            }
        }
    }

    #[test]
    fn shares_of_reads_are_as_the_paper_has_them() {
        for (kind, reads, writes) in [
            (Kind::Fileserver, 1, 2),
            (Kind::Webserver, 10, 1),
            (Kind::Netsfs, 5, 2),
        ] {
            let count = |f: fn(&Step) -> bool| kind.turn().iter().filter(|s| f(s)).count();
            assert_eq!(count(|s| matches!(s, Step::Read)), reads);
            assert_eq!(
                count(|s| matches!(s, Step::Replace | Step::Append | Step::Log | Step::Overwrite)),
                writes
            );
        }
    }
}
