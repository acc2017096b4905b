//! Runs a workload on a system for a while.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::pattern::{Accesses, Workload};
use crate::progress::stopped;
use crate::stats::Latency;

/// What came out.
pub struct Outcome {
    /// Sum over the nodes, MiB/s.
    pub mib_per_s: f64,
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

fn fill(w: &Workload, files: &[File]) -> anyhow::Result<()> {
    let block = vec![1u8; 1 << 20];
    for file in files {
        let mut at = file.metadata()?.len();
        while at < w.file_size {
            let n = (w.file_size - at).min(block.len() as u64);
            file.write_all_at(&block[..n as usize], at)?;
            at += n;
        }
    }
    Ok(())
}

fn one_thread(
    w: Workload,
    files: &[File],
    node: usize,
    thread: usize,
    barrier: &Barrier,
    run: Duration,
) -> anyhow::Result<Latency> {
    let mut latency = Latency::new()?;
    let mut buffer = vec![thread as u8; w.block];
    barrier.wait();
    let end = Instant::now() + run;
    for access in Accesses::new(w, node, thread) {
        let start = Instant::now();
        if start >= end || stopped() {
            break;
        }
        let file = &files[access.file];
        if access.read {
            file.read_exact_at(&mut buffer, access.offset)?;
        } else {
            file.write_all_at(&buffer, access.offset)?;
        }
        latency.add(start.elapsed());
    }
    Ok(latency)
}

/// Runs it; `dirs` is one directory a node, or one for all.
///
/// # Errors
/// A file system call fails.
pub fn run(w: Workload, dirs: &[PathBuf], duration: Duration) -> anyhow::Result<Outcome> {
    let mut nodes = Vec::new();
    for node in 0..w.nodes {
        let dir = &dirs[node % dirs.len()];
        let files = open_all(&w, node, dir)?;
        fill(&w, &files)?;
        nodes.push(files);
    }
    let barrier = Barrier::new(w.nodes * w.threads + 1);
    let (all, took) = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (node, files) in nodes.iter().enumerate() {
            for thread in 0..w.threads {
                let barrier = &barrier;
                threads.push(scope.spawn(move || one_thread(w, files, node, thread, barrier, duration)));
            }
        }
        barrier.wait();
        let start = Instant::now();
        let all: Vec<anyhow::Result<Latency>> = threads
            .into_iter()
            .map(|t| t.join().unwrap_or_else(|_| Err(anyhow!("a thread died"))))
            .collect();
        (all, start.elapsed())
    });
    let mut latency = Latency::new()?;
    for one in all {
        latency.merge(&one?);
    }
    let mib_per_s = latency.count() as f64 * w.block as f64 / f64::from(1 << 20) / took.as_secs_f64();
    Ok(Outcome { mib_per_s, latency })
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
        let out = run(w, &[dir.path().to_owned()], Duration::from_millis(20)).unwrap();
        assert!(out.latency.count() > 10 && out.mib_per_s > 0.0);
        let mut names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, ["node0-1", "node1-1", "shared0"]);
        assert_eq!(dir.path().join("shared0").metadata().unwrap().len(), 64 << 10);
    }
}
