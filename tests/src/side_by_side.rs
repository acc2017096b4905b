//! Cold reads of one file, and look-ups in one directory, by several tasks at once, in front of servers that are far away.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};

use crate::cluster::{Cache, Cluster, Fabric, Options};

/// Tasks.
pub const TASKS: usize = 8;
/// Bytes of a read; also their distance, so that each has frames, and a request, of its own.
const CHUNK: usize = 64 << 10;
/// Chunks between two tasks' places.
const SPREAD: usize = 16;
const DIRECTORY: &str = "many";

/// A cluster behind proxies, with two mounts.
#[must_use]
pub fn options() -> Options {
    Options {
        fabric: Fabric::Tcp,
        cache: Cache::Direct,
        proxied: true,
        ..Options::default()
    }
}

fn byte(place: usize) -> u8 {
    place as u8 ^ 0x5a
}

fn name(dir: &Path, n: usize) -> PathBuf {
    dir.join(DIRECTORY).join(format!("f{n}"))
}

/// Makes the file and the names that are looked at, on the first mount; takes them away from its caches.
///
/// # Errors
/// The file system refuses.
pub fn prepare(cluster: &Cluster, rounds: usize) -> anyhow::Result<()> {
    let root = cluster.mount(0);
    let file = File::create(root.join("data"))?;
    for place in 0..=TASKS * rounds {
        file.write_all_at(&vec![byte(place); CHUNK], (place * SPREAD * CHUNK) as u64)?;
    }
    file.sync_all()?;
    std::fs::create_dir(root.join(DIRECTORY))?;
    (0..=TASKS * rounds).try_for_each(|n| File::create(name(&root, n))?.sync_all().map_err(Into::into))
}

/// Opens the file on the second mount, and reads its first chunk: lease and frames are there from then on.
///
/// # Errors
/// The file system refuses.
pub fn open(cluster: &Cluster) -> anyhow::Result<File> {
    let file = File::open(cluster.mount(1).join("data"))?;
    read(&file, 0)?;
    Ok(file)
}

/// Reads a chunk nobody has read, and looks at what it has.
///
/// # Errors
/// It cannot be read, or has something else.
pub fn read(file: &File, place: usize) -> anyhow::Result<()> {
    let mut found = vec![0; CHUNK];
    file.read_exact_at(&mut found, (place * SPREAD * CHUNK) as u64)?;
    ensure!(found.iter().all(|b| *b == byte(place)), "chunk {place} is wrong");
    Ok(())
}

/// Looks a name up on the second mount that nobody has looked up there.
///
/// # Errors
/// It is not there.
pub fn look_up(cluster: &Cluster, n: usize) -> anyhow::Result<()> {
    let path = name(&cluster.mount(1), n);
    std::fs::symlink_metadata(&path).with_context(|| path.display().to_string())?;
    Ok(())
}

/// Does something with each of `places`, with so many tasks at once. How long that took.
///
/// # Errors
/// Those of `act`; a task panicked.
pub fn with_tasks(
    tasks: usize,
    places: std::ops::Range<usize>,
    act: impl Fn(usize) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<Duration> {
    let (barrier, places) = (Arc::new(Barrier::new(tasks + 1)), &places);
    let act = &act;
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..tasks)
            .map(|task| {
                let barrier = Arc::clone(&barrier);
                scope.spawn(move || {
                    barrier.wait();
                    places.clone().skip(task).step_by(tasks).try_for_each(act)
                })
            })
            .collect();
        barrier.wait();
        let began = Instant::now();
        for task in all {
            task.join().ok().context("a task panicked")??;
        }
        Ok(began.elapsed())
    })
}
