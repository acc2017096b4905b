//! A file that mounts take from each other, with the kernel extension: short operations are done by the daemon that has the
//! lease, and nobody can tell.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::guard;

const PAGE: usize = 4096;
const PAGES: u64 = 16;

fn options() -> Options {
    Options {
        fabric: Fabric::Tcp,
        cache: Cache::Writeback,
        mounts: 3,
        lease_wait: Duration::from_secs(8),
        ..Options::default()
    }
}

fn open_all(cluster: &Cluster, name: &str) -> anyhow::Result<Vec<File>> {
    fs::write(cluster.mount(0).join(name), vec![0; PAGE * PAGES as usize])?;
    (0..3)
        .map(|mount| {
            let path = cluster.mount(mount).join(name);
            Ok(File::options().read(true).write(true).open(path)?)
        })
        .collect()
}

/// A page all of one stamp; the stamp.
fn stamp_of(page: &[u8]) -> Option<u64> {
    let (words, rest) = page.as_chunks::<8>();
    let first = words.first()?;
    (rest.is_empty() && words.iter().all(|w| w == first)).then(|| u64::from_le_bytes(*first))
}

fn read_stamp(file: &File, page: u64) -> anyhow::Result<u64> {
    let mut data = [0; PAGE];
    file.read_exact_at(&mut data, page * PAGE as u64)?;
    stamp_of(&data).with_context(|| format!("page {page} is of two writes"))
}

fn write_stamp(file: &File, page: u64, stamp: u64) -> std::io::Result<()> {
    let data = stamp.to_le_bytes().repeat(PAGE / 8);
    file.write_all_at(&data, page * PAGE as u64)
}

/// By turns, so that what each must see is known: everything that came before.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn turns() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let files = open_all(cluster, "f")?;
        let mut last = vec![0; PAGES as usize];
        for turn in 1..=400u64 {
            let (mine, next) = (turn as usize % 3, (turn as usize + 1) % 3);
            let page = turn * 7 % PAGES;
            write_stamp(&files[mine], page, turn)?;
            last[page as usize] = turn;
            let seen = turn * 5 % PAGES;
            for (file, page) in [(&files[next], page), (&files[mine], seen), (&files[next], seen)] {
                let (found, expected) = (read_stamp(file, page)?, last[page as usize]);
                ensure!(
                    found == expected,
                    "turn {turn}, page {page}: {found}, not {expected}"
                );
            }
        }
        let (calls, sent, visits) = (
            cluster.total("calls")?,
            cluster.total("sent")?,
            cluster.total("visits")?,
        );
        ensure!(
            calls > 400 && sent > 200 && visits >= sent,
            "{calls} calls, {sent} sent, {visits} visits: the daemons were hardly asked"
        );
        // Longer than the file: not to be made by a forwarded operation; and shorter again.
        for turn in 0..30usize {
            let (mine, next) = (turn % 3, (turn + 1) % 3);
            let end = files[mine].metadata()?.len();
            files[mine].write_all_at(b"longer", end)?;
            ensure!(
                files[next].metadata()?.len() == end + 6,
                "how long it is elsewhere"
            );
            let mut tail = [0; 10];
            let n = files[next].read_at(&mut tail, end)?;
            ensure!(&tail[..n] == b"longer", "what was added");
            files[next].set_len(end + 1)?;
            let n = files[mine].read_at(&mut tail, end)?;
            ensure!(&tail[..n] == b"l", "what was left");
        }
        Ok(())
    })
}

/// All at once: a page is of one write, what a task wrote last to a page of its own it finds there, and at the end all
/// mounts agree. Tasks of one mount do not touch a page at the same time: there the page cache promises no more than on any
/// other file system.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn at_once() -> anyhow::Result<()> {
    const OPERATIONS: u64 = 250;
    guard::with_cluster(options(), |cluster| {
        let files = open_all(cluster, "f")?;
        let next = AtomicU64::new(1);
        let local: Vec<Vec<RwLock<()>>> = (0..3)
            .map(|_| (0..PAGES).map(|_| RwLock::default()).collect())
            .collect();
        std::thread::scope(|scope| {
            let tasks: Vec<_> = (0..6u64)
                .map(|task| {
                    let mount = task as usize % 3;
                    let (file, next, local) = (&files[mount], &next, &local[mount]);
                    scope.spawn(move || -> anyhow::Result<()> {
                        let mut own = 0;
                        for i in 0..OPERATIONS {
                            // A page of its own, and those of all.
                            let stamp = next.fetch_add(1, Ordering::Relaxed);
                            let shared = 6 + i % (PAGES - 6);
                            match (i * 31 + task * 17) % 5 {
                                0 => {
                                    write_stamp(file, task, stamp)?;
                                    own = stamp;
                                }
                                1 => ensure!(read_stamp(file, task)? == own, "a write was lost"),
                                2 => {
                                    let _alone = local[shared as usize].write();
                                    write_stamp(file, shared, stamp)?;
                                }
                                _ => {
                                    let _with_readers = local[shared as usize].read();
                                    read_stamp(file, shared)?;
                                }
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            tasks
                .into_iter()
                .try_for_each(|task| task.join().map_err(|_| anyhow::anyhow!("a task panicked"))?)
        })?;
        for page in 0..PAGES {
            let stamp = read_stamp(&files[0], page)?;
            ensure!(
                read_stamp(&files[1], page)? == stamp && read_stamp(&files[2], page)? == stamp,
                "page {page} differs"
            );
        }
        ensure!(cluster.total("visits")? > 0, "nothing was forwarded");
        Ok(())
    })
}

/// The mount that does the others' work is killed: each of their calls ends, and what they were told is durable is.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn the_owner_is_killed() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let files = open_all(cluster, "f")?;
        // Mount 2 gets the lease, and operations are forwarded to it.
        for turn in 0..60u64 {
            write_stamp(&files[turn as usize % 3], 0, turn)?;
        }
        write_stamp(&files[2], 1, 1)?;
        ensure!(cluster.total("visits")? > 0, "nothing was forwarded");
        let stop = AtomicBool::new(false);
        let begun = [AtomicBool::new(false), AtomicBool::new(false)];
        let written: Vec<anyhow::Result<u64>> = std::thread::scope(|scope| {
            let begun = &begun;
            let tasks: Vec<_> = (0..2u64)
                .map(|task| {
                    let (file, stop) = (&files[task as usize], &stop);
                    scope.spawn(move || {
                        let mut told = 0;
                        for stamp in 1.. {
                            let start = Instant::now();
                            let done = write_stamp(file, 2 + task, stamp).and_then(|()| file.sync_data());
                            ensure!(
                                start.elapsed() < Duration::from_secs(60),
                                "a write took {:?}",
                                start.elapsed()
                            );
                            match done {
                                Ok(()) => {
                                    told = stamp;
                                    begun[task as usize].store(true, Ordering::Relaxed);
                                }
                                // Its lease is not given back before all have started again.
                                Err(_) => break,
                            }
                            if stop.load(Ordering::Relaxed) {
                                break;
                            }
                        }
                        Ok(told)
                    })
                })
                .collect();
            let end = Instant::now() + Duration::from_secs(30);
            while !begun.iter().all(|b| b.load(Ordering::Relaxed)) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            cluster.kill(Role::Mount(2));
            std::thread::sleep(Duration::from_secs(12));
            stop.store(true, Ordering::Relaxed);
            let joined = tasks.into_iter().map(|t| t.join());
            joined
                .map(|r| r.unwrap_or_else(|_| anyhow::bail!("a task panicked")))
                .collect()
        });
        drop(files);
        cluster.restart_after_abort()?;
        let file = File::open(cluster.mount(0).join("f"))?;
        for (task, told) in written.into_iter().enumerate() {
            let (told, found) = (told?, read_stamp(&file, 2 + task as u64)?);
            // The one that failed may have been carried out.
            ensure!(
                found == told || found == told + 1,
                "mount {task}: {found} is there, {told} was the last that it was told"
            );
        }
        Ok(())
    })
}
