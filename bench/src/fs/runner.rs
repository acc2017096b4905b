//! Runs a workload on a system for a while.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};

use super::pattern::{Accesses, Workload};
use super::remove_if_there;
use super::stamp::{PAGE, Stamp, file_id};
use crate::progress::stopped;
use crate::stats::Latency;

/// What came out.
pub struct Outcome {
    /// Sum over the nodes, MiB/s.
    pub mib_per_s: f64,
    /// The same when the time counts that it takes to make all of it durable afterwards.
    pub durable_mib_per_s: f64,
    /// Of single operations.
    pub latency: Latency,
}

fn open_all(w: &Workload, node: usize, dir: &Path) -> anyhow::Result<Vec<File>> {
    (0..w.files)
        .map(|n| {
            let path = dir.join(w.file_name(node, n));
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .with_context(|| format!("cannot open {}", path.display()))
        })
        .collect()
}

fn fill(w: &Workload, node: usize, files: &[File]) -> anyhow::Result<()> {
    let mut block = vec![1u8; 1 << 20];
    for (n, file) in files.iter().enumerate() {
        let mut at = file.metadata()?.len();
        while at < w.file_size {
            let len = (w.file_size - at).min(block.len() as u64);
            let stamp = Stamp {
                file: file_id(&w.file_name(node, n)),
                page: at / PAGE as u64,
                writer: 0,
                count: 0,
            };
            stamp.put(&mut block, true);
            file.write_all_at(&block[..len as usize], at)?;
            at += len;
        }
    }
    Ok(())
}

/// What a thread has done.
struct Done {
    latency: Latency,
    /// Of each block of each file the count of the last write; 0: none.
    last: Vec<u64>,
}

fn writer_of(node: usize, thread: usize) -> u64 {
    (node * 1000 + thread + 1) as u64
}

fn blocks_of(w: &Workload) -> usize {
    (w.file_size / w.block as u64).max(1) as usize
}

fn one_thread(
    w: Workload,
    files: &[File],
    (node, thread): (usize, usize),
    run_number: u64,
    barrier: &Barrier,
    run: Duration,
) -> anyhow::Result<Done> {
    let mut latency = Latency::new()?;
    let mut buffer = vec![thread as u8; w.block];
    let mut last = vec![0; w.files * blocks_of(&w)];
    let ids: Vec<u64> = (0..w.files).map(|n| file_id(&w.file_name(node, n))).collect();
    let mut count = run_number << 32;
    barrier.wait();
    let end = Instant::now() + run;
    for access in Accesses::new(w, node, thread) {
        let file = &files[access.file];
        let page = access.offset / PAGE as u64;
        if !access.read {
            count += 1;
            let stamp = Stamp {
                file: ids[access.file],
                page,
                writer: writer_of(node, thread),
                count,
            };
            stamp.put(&mut buffer, true);
            last[access.file * blocks_of(&w) + (access.offset / w.block as u64) as usize] = count;
        }
        let start = Instant::now();
        if start >= end || stopped() {
            if !access.read {
                // It was to be, and is not made: what the block holds cannot be told any more.
                last[access.file * blocks_of(&w) + (access.offset / w.block as u64) as usize] = UNKNOWN;
            }
            break;
        }
        if access.read {
            file.read_exact_at(&mut buffer, access.offset)?;
        } else {
            file.write_all_at(&buffer, access.offset)?;
        }
        latency.add(start.elapsed());
        if access.read {
            // The rest may be from another write of this node: the page cache keeps readers and writers apart by
            // leases, which are a node's.
            let seen = Stamp::first(&buffer);
            ensure!(
                seen.is_some_and(|s| (s.file, s.page) == (ids[access.file], page)),
                "{} page {page} read on node {node}: {seen:?} is not of it",
                w.file_name(node, access.file)
            );
        }
    }
    Ok(Done { latency, last })
}

/// In [`Done::last`]: anything may be there.
const UNKNOWN: u64 = u64::MAX;

/// Every page must be whole, of its file and place, and be what some thread wrote last to it. What belongs to a node
/// is read on another.
fn verify(w: &Workload, dirs: &[PathBuf], run_number: u64, done: &[Vec<Done>]) -> anyhow::Result<()> {
    let mut bytes = vec![0u8; w.file_size as usize];
    for node in 0..w.nodes {
        for n in 0..w.files {
            let name = w.file_name(node, n);
            let path = dirs[(node + 1) % dirs.len()].join(&name);
            let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
            file.read_exact_at(&mut bytes, 0)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let shared = n < w.shared_files();
            let writers = |block: usize| {
                let done = done
                    .iter()
                    .enumerate()
                    .filter(move |(owner, _)| shared || *owner == node);
                done.flat_map(move |(owner, threads)| {
                    let of = move |(thread, d): (usize, &Done)| {
                        (writer_of(owner, thread), d.last[n * blocks_of(w) + block])
                    };
                    threads.iter().enumerate().map(of)
                })
                .filter(|(_, count)| *count != 0)
            };
            for (page, content) in bytes.chunks_exact(PAGE).enumerate() {
                let stamp =
                    Stamp::of(content).with_context(|| format!("{} page {page} is torn", path.display()))?;
                ensure!(
                    (stamp.file, stamp.page) == (file_id(&name), page as u64),
                    "{} page {page}: {stamp:?} is not of it",
                    path.display()
                );
                let block = (page * PAGE / w.block).min(blocks_of(w) - 1);
                let mut known = writers(block).peekable();
                let right = if known.peek().is_none() {
                    stamp.count >> 32 < run_number
                } else {
                    known.any(|(writer, count)| {
                        count == UNKNOWN || (stamp.writer, stamp.count) == (writer, count)
                    })
                };
                ensure!(
                    right,
                    "{} page {page}: a write is lost, {stamp:?} is there; last were {:?}",
                    path.display(),
                    writers(block).collect::<Vec<_>>()
                );
            }
        }
    }
    Ok(())
}

/// Opens the files of all nodes, and makes what is not there.
///
/// # Errors
/// A file system call fails.
pub fn prepare(w: &Workload, dirs: &[PathBuf]) -> anyhow::Result<Vec<Vec<File>>> {
    let of_node = |node| {
        let files = open_all(w, node, &dirs[node % dirs.len()])?;
        fill(w, node, &files)?;
        Ok(files)
    };
    (0..w.nodes).map(of_node).collect()
}

/// Removes the files, so that nothing of what ran is in what comes: pages that were written here and there, and dropped, and
/// read again lie all over the memory, which tells in emulation.
///
/// # Errors
/// A file system call fails.
pub fn clear(w: &Workload, dirs: &[PathBuf]) -> anyhow::Result<()> {
    for node in 0..w.nodes {
        for n in 0..w.files {
            // Those that all nodes share are gone with the first.
            remove_if_there(&dirs[node % dirs.len()].join(w.file_name(node, n)))?;
        }
    }
    Ok(())
}

/// Runs it; `dirs` is one directory a node, or one for all. Afterwards all contents are read and verified, if wanted.
///
/// # Errors
/// A file system call fails, or a page is not what it must be.
pub fn run(w: Workload, dirs: &[PathBuf], duration: Duration, verified: bool) -> anyhow::Result<Outcome> {
    ensure!(
        w.block.is_multiple_of(PAGE) && w.file_size.is_multiple_of(w.block as u64),
        "blocks must be of whole pages, files of whole blocks"
    );
    static RUNS: AtomicU64 = AtomicU64::new(1);
    let run_number = RUNS.fetch_add(1, Ordering::Relaxed);
    let nodes = prepare(&w, dirs)?;
    let barrier = Barrier::new(w.nodes * w.threads + 1);
    let (all, took) = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (node, files) in nodes.iter().enumerate() {
            let start = |thread| {
                let barrier = &barrier;
                scope.spawn(move || one_thread(w, files, (node, thread), run_number, barrier, duration))
            };
            threads.push((0..w.threads).map(start).collect::<Vec<_>>());
        }
        barrier.wait();
        let start = Instant::now();
        let join = |t: ScopedJoinHandle<'_, anyhow::Result<Done>>| {
            t.join().unwrap_or_else(|_| Err(anyhow!("a thread died")))
        };
        let all: Vec<anyhow::Result<Vec<Done>>> = threads
            .into_iter()
            .map(|node| node.into_iter().map(join).collect())
            .collect();
        (all, start.elapsed())
    });
    let all = all.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let began = Instant::now();
    for file in nodes.iter().flatten() {
        file.sync_all()?;
    }
    let stored = began.elapsed();
    let mut latency = Latency::new()?;
    for one in all.iter().flatten() {
        latency.merge(&one.latency);
    }
    if verified {
        verify(&w, dirs, run_number, &all)?;
    }
    let mib = latency.count() as f64 * w.block as f64 / f64::from(1 << 20);
    Ok(Outcome {
        mib_per_s: mib / took.as_secs_f64(),
        durable_mib_per_s: mib / (took + stored).as_secs_f64(),
        latency,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workload_on_a_plain_directory() {
        let dir = tempfile::tempdir().unwrap();
        let w = Workload {
            random: false,
            reads: 50,
            block: 4096,
            contention: 50,
            nodes: 2,
            threads: 2,
            files: 2,
            file_size: 64 << 10,
        };
        let out = run(w, &[dir.path().to_owned()], Duration::from_millis(20), true).unwrap();
        assert!(out.latency.count() > 10 && out.mib_per_s > 0.0);
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["node0-1", "node1-1", "shared0"]);
        assert_eq!(dir.path().join("shared0").metadata().unwrap().len(), 64 << 10);
    }
    #[test]
    fn a_lost_write_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().to_owned()];
        let w = Workload {
            random: true,
            reads: 0,
            block: 4096,
            contention: 0,
            nodes: 1,
            threads: 1,
            files: 1,
            file_size: 8 << 10,
        };
        run(w, &dirs, Duration::from_millis(5), true).unwrap();
        let done = |count| {
            let latency = Latency::new().unwrap();
            let last = vec![count; 2];
            vec![vec![Done { latency, last }]]
        };
        let lost = verify(&w, &dirs, u64::MAX >> 32, &done(1)).unwrap_err();
        assert!(lost.to_string().contains("a write is lost"), "{lost}");
        let file = OpenOptions::new()
            .write(true)
            .open(dir.path().join("node0-0"))
            .unwrap();
        file.write_all_at(b"x", 5000).unwrap();
        verify(&w, &dirs, u64::MAX >> 32, &done(UNKNOWN)).unwrap();
        file.write_all_at(b"x", 1024).unwrap();
        let torn = verify(&w, &dirs, u64::MAX >> 32, &done(UNKNOWN)).unwrap_err();
        assert!(torn.to_string().contains("torn"), "{torn}");
    }
}
