//! A full pool with the kernel extension: `write` says so, and what it took is stored, whoever else wants the space.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Options};
use system_tests::{guard, sys};

use crate::extension::counted;

const MIB: u64 = 1 << 20;
const POOL: u64 = 64;
const PAGE: u64 = 4096;

fn options() -> Options {
    Options {
        lease_wait: Duration::from_secs(20),
        pool_mib: POOL,
        ..Options::extension()
    }
}

fn create(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
}

/// What byte `at` of a file is.
fn content(seed: u64, at: u64, len: u64) -> Vec<u8> {
    let byte = |at: u64| ((at / PAGE).wrapping_mul(31) + at % 251 + seed * 7) as u8;
    (at..at + len).map(byte).collect()
}

/// Writes from `at` on until there is no space; how far it came.
fn fill(file: &File, seed: u64, at: u64, step: u64) -> anyhow::Result<u64> {
    let mut done = at;
    loop {
        ensure!(done < 4 * POOL * MIB, "{done} bytes in a pool of {POOL} MiB");
        match file.write_at(&content(seed, done, step), done) {
            Ok(0) => anyhow::bail!("nothing written at {done}, and no error"),
            Ok(n) => done += n as u64,
            Err(error) => {
                ensure!(error.raw_os_error() == Some(libc::ENOSPC), "at {done}: {error}");
                return Ok(done);
            }
        }
    }
}

fn verify(path: &Path, seed: u64, len: u64) -> anyhow::Result<()> {
    let file = File::open(path)?;
    ensure!(
        file.metadata()?.len() == len,
        "{} bytes, not {len}",
        file.metadata()?.len()
    );
    let mut at = 0;
    while at < len {
        let n = (len - at).min(MIB);
        let data = sys::read_at(&file, at, n as usize)?;
        let right = content(seed, at, n);
        ensure!(
            data.len() == right.len(),
            "{} bytes read at {at}, not {n}",
            data.len()
        );
        if let Some(wrong) = data.iter().zip(&right).position(|(a, b)| a != b) {
            anyhow::bail!("byte {} is wrong", at + wrong as u64);
        }
        at += n;
    }
    Ok(())
}

/// fsync and close, which must have nothing to say of space.
fn settle(file: File) -> anyhow::Result<()> {
    file.sync_all().context("fsync")?;
    let fd = std::os::fd::IntoRawFd::into_raw_fd(file);
    // SAFETY: our own, and used by nobody after this.
    let closed = unsafe { libc::close(fd) };
    ensure!(closed == 0, "close: {}", io::Error::last_os_error());
    Ok(())
}

/// After something was removed: its frames are cleaned, and what mounts have set aside comes back.
fn until_written(path: &Path, bytes: u64) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match fs::write(path, content(9, 0, bytes)) {
            Ok(()) => return settle(File::options().write(true).open(path)?),
            Err(error) => ensure!(Instant::now() < end, "no space after the removal: {error}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_full_pool_is_told_of_by_write() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let (a, b) = (cluster.mount(0), cluster.mount(1));
        fs::write(a.join("before"), content(1, 0, 100_000))?;
        let large = create(&a.join("large"))?;
        let len = fill(&large, 2, 0, 300_000)?;
        eprintln!("{len} bytes in a pool of {POOL} MiB");
        ensure!(len > (POOL - 16) * MIB, "only {len} bytes");
        // What is there can be written again, also where the kernel has to get it first.
        large.write_all_at(&content(2, 0, 2 * MIB), 0)?;
        settle(large)?;
        verify(&b.join("large"), 2, len)?;
        verify(&b.join("before"), 1, 100_000)?;
        // Small files, to the last frame.
        let mut small = Vec::new();
        for n in 0..2000 {
            let name = format!("small{n}");
            let file = create(&a.join(&name))?;
            match file.write_all_at(&content(n, 0, 5000), 0) {
                Ok(()) => small.push(name),
                Err(error) => {
                    ensure!(error.raw_os_error() == Some(libc::ENOSPC), "{error}");
                    break;
                }
            }
            settle(file)?;
        }
        eprintln!("and {} small files", small.len());
        ensure!(small.len() < 2000, "2000 files of 5000 bytes in a full pool");
        for (n, name) in (0..).zip(&small) {
            verify(&b.join(name), n, 5000)?;
        }
        fs::remove_file(a.join("large"))?;
        until_written(&b.join("after"), 8 * MIB)?;
        verify(&a.join("after"), 9, 8 * MIB)
    })
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn two_mounts_fill_the_pool_at_once() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        // A third hoards: it has written a little to files that it keeps open.
        let hoarders: Vec<File> = (0..6)
            .map(|n| {
                let file = create(&cluster.mount(0).join(format!("h{n}")))?;
                file.write_all_at(&content(n, 0, 300_000), 0)?;
                Ok(file)
            })
            .collect::<io::Result<_>>()?;
        let lens = guard::together(4, |n| {
            let file = create(&cluster.mount(n % 2).join(format!("f{n}")))?;
            let n = n as u64;
            let len = fill(&file, 20 + n, 0, 10_000 + n * 50_000)?;
            settle(file)?;
            Ok(len)
        })?;
        let sum: u64 = lens.iter().sum();
        eprintln!("{lens:?}: {sum} bytes in a pool of {POOL} MiB");
        ensure!(sum > POOL * MIB / 2, "only {sum} bytes");
        for file in hoarders {
            settle(file)?;
        }
        for (n, len) in (0..).zip(&lens) {
            verify(
                &cluster.mount((n as usize + 1) % 2).join(format!("f{n}")),
                20 + n,
                *len,
            )?;
        }
        for n in 0..6 {
            verify(&cluster.mount(1).join(format!("h{n}")), n, 300_000)?;
        }
        // What nobody uses comes back to all, if not at once.
        fs::remove_file(cluster.mount(0).join("f0"))?;
        fs::remove_file(cluster.mount(1).join("f1"))?;
        until_written(&cluster.mount(0).join("after"), 4 * MIB)?;
        verify(&cluster.mount(1).join("after"), 9, 4 * MIB)
    })
}

/// Both append to the same file, whose end only the lease tells.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn appended_to_until_it_is_full() -> anyhow::Result<()> {
    const LINE: usize = 20_000;
    guard::with_cluster(options(), |cluster| {
        let filler = create(&cluster.mount(0).join("filler"))?;
        filler.write_all_at(&content(3, 0, (POOL - 20) * MIB), 0)?;
        settle(filler)?;
        File::create(cluster.mount(0).join("log"))?;
        let counts = guard::together(4, |n| {
            let mut file = File::options()
                .append(true)
                .open(cluster.mount(n % 2).join("log"))?;
            for count in 0..=4000 {
                // Perhaps a part of it, and then nothing more.
                if let Err(error) = io::Write::write(&mut file, &[n as u8 + 1; LINE]) {
                    ensure!(error.raw_os_error() == Some(libc::ENOSPC), "{error}");
                    settle(file)?;
                    return Ok(count);
                }
                ensure!(count < 4000, "no end");
            }
            Ok(0)
        })?;
        eprintln!("{counts:?} lines");
        let (one, other) = (
            fs::read(cluster.mount(0).join("log"))?,
            fs::read(cluster.mount(1).join("log"))?,
        );
        ensure!(one == other, "the mounts differ");
        ensure!(one.len() > 4 * MIB as usize, "only {} bytes", one.len());
        ensure!(one.iter().all(|byte| (1..=4).contains(byte)), "a hole in it");
        Ok(())
    })
}

/// How a child ended that stores to a mapping.
fn store_in_a_child(map: &sys::Map, at: usize) -> anyhow::Result<i32> {
    // SAFETY: the child stores to memory that it has mapped, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        map.write(at, b"stored");
        // SAFETY: ends the child without running anything of its parent's.
        unsafe { libc::_exit(0) };
    }
    ensure!(child > 0, "fork: {}", io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: our child; the status is ours.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    ensure!(waited == child, "waitpid: {}", io::Error::last_os_error());
    Ok(status)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_store_into_a_hole_of_a_full_pool() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let dir = cluster.mount(0);
        let sparse = create(&dir.join("sparse"))?;
        sparse.set_len(2 * MIB)?;
        sparse.write_all_at(&content(4, 0, PAGE), 0)?;
        sparse.sync_all()?;
        let map = sys::Map::writable(&sparse, 2 * MIB as usize)?;
        ensure!(map.read(MIB as usize, 8) == [0; 8], "a hole");
        let large = create(&dir.join("large"))?;
        let len = fill(&large, 5, 0, 300_000)?;
        // The rest goes in small pieces.
        for n in 0..64 {
            let file = create(&dir.join(format!("rest{n}")))?;
            fill(&file, n, 0, PAGE)?;
        }
        large.sync_all()?;
        for at in [MIB as usize, MIB as usize + 500_000] {
            let status = store_in_a_child(&map, at)?;
            ensure!(
                libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGBUS,
                "a store into a hole at {at} ends with {status:#x}"
            );
        }
        // Where there is a frame there is space.
        ensure!(store_in_a_child(&map, 100)? == 0, "a store to what is there");
        ensure!(map.read(100, 6) == b"stored", "what was stored");
        settle(large)?;
        verify(&cluster.mount(1).join("large"), 5, len)?;
        fs::remove_file(dir.join("large"))?;
        let end = Instant::now() + Duration::from_secs(30);
        while store_in_a_child(&map, MIB as usize)? != 0 {
            ensure!(Instant::now() < end, "no space after the removal");
            std::thread::sleep(Duration::from_millis(200));
        }
        let other = File::open(cluster.mount(1).join("sparse"))?;
        ensure!(sys::read_at(&other, MIB, 6)? == b"stored", "on the other mount");
        drop(map);
        settle(sparse)
    })
}

/// Where there is plenty, few writes have to ask: none to files of a page, and ever fewer the longer a file gets.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn space_is_seldom_asked_for() -> anyhow::Result<()> {
    let large = Options {
        pool_mib: 256,
        ..options()
    };
    guard::with_cluster(large, |cluster| {
        let dir = cluster.mount(0);
        let asked = |what: &str, most: u64, work: &dyn Fn() -> anyhow::Result<()>| -> anyhow::Result<()> {
            let before = counted(cluster, 0, "space_asked")?;
            work()?;
            let grown = counted(cluster, 0, "space_asked")? - before;
            eprintln!("{what}: asked {grown} times");
            ensure!(grown <= most, "{what}: asked {grown} times, not {most}");
            Ok(())
        };
        fs::write(dir.join("first"), b"fills what is reserved")?;
        asked("100 files of a page", 1, &|| {
            for n in 0..100 {
                fs::write(dir.join(format!("s{n}")), content(n, 0, PAGE))?;
            }
            Ok(())
        })?;
        asked("the same again", 1, &|| {
            for n in 0..100 {
                fs::write(dir.join(format!("s{n}")), content(n, 0, PAGE))?;
            }
            Ok(())
        })?;
        let file = create(&dir.join("long"))?;
        asked("16 MiB by pages", 14, &|| {
            for page in 0..16 * MIB / PAGE {
                file.write_all_at(&content(6, page * PAGE, PAGE), page * PAGE)?;
            }
            Ok(())
        })?;
        asked("1000 pages of it again", 0, &|| {
            for n in 0..1000 {
                let at = n * 7919 % 4096 * PAGE;
                file.write_all_at(&content(6, at, PAGE), at)?;
            }
            Ok(())
        })?;
        settle(file)?;
        verify(&cluster.mount(1).join("long"), 6, 16 * MIB)?;
        let sparse = create(&dir.join("sparse"))?;
        sparse.set_len(24 * MIB)?;
        let places: Vec<u64> = (0..600).map(|n| n * 7919 % (24 * 256) * PAGE).collect();
        asked("600 pages of a sparse file of 24 MiB", 10, &|| {
            for &at in &places {
                sparse.write_all_at(&content(8, at, PAGE), at)?;
            }
            Ok(())
        })?;
        settle(sparse)?;
        let other = File::open(cluster.mount(1).join("sparse"))?;
        for at in places {
            ensure!(
                sys::read_at(&other, at, PAGE as usize)? == content(8, at, PAGE),
                "the page at {at}"
            );
        }
        Ok(())
    })
}

/// What is reserved is taken away by some, and used by others, where there is hardly enough.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn truncated_and_punched_while_it_is_written() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        fn work(cluster: &Cluster, task: u64) -> anyhow::Result<()> {
            let path = cluster.mount(task as usize % 2).join("f");
            let file = File::options().read(true).write(true).open(path)?;
            for turn in 0..60u64 {
                let at = (task * 13 + turn * 7) % 24 * MIB / 2;
                let done = match task {
                    0 => file.set_len(at),
                    1 => sys::punch(&file, at, MIB),
                    _ => file.write_at(&content(1, at, MIB / 2), at).map(|_| ()),
                };
                if let Err(error) = done {
                    ensure!(error.raw_os_error() == Some(libc::ENOSPC), "{error}");
                }
            }
            settle(file)
        }
        let filler = create(&cluster.mount(0).join("filler"))?;
        filler.write_all_at(&content(3, 0, (POOL - 14) * MIB), 0)?;
        settle(filler)?;
        File::create(cluster.mount(0).join("f"))?;
        guard::together(5, |n| work(cluster, n as u64))?;
        ensure!(
            fs::read(cluster.mount(0).join("f"))? == fs::read(cluster.mount(1).join("f"))?,
            "the mounts differ"
        );
        Ok(())
    })
}

/// Space for all of a write is asked for before it begins, and not with half of it there to be seen.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_write_is_seen_whole() -> anyhow::Result<()> {
    const FILES: usize = 60;
    const LEN: u64 = 64 * PAGE;
    guard::with_cluster(options(), |cluster| {
        for n in 0..FILES {
            let [here, there] = [0, 1].map(|mount| cluster.mount(mount).join(format!("whole{n}")));
            let file = create(&here)?;
            let over = AtomicBool::new(false);
            let seen = guard::together(2, |who| {
                let mut seen = BTreeSet::new();
                if who == 0 {
                    let written = file.write_at(&content(n as u64, 0, LEN), 0);
                    over.store(true, Ordering::SeqCst);
                    ensure!(written? as u64 == LEN, "a short write of file {n}");
                }
                loop {
                    let last = over.load(Ordering::SeqCst);
                    seen.insert(fs::metadata(&there)?.len());
                    if last {
                        return Ok(seen);
                    }
                }
            })?;
            let parts: Vec<u64> = seen.into_iter().flatten().filter(|len| *len % LEN != 0).collect();
            ensure!(parts.is_empty(), "of file {n} so much was seen: {parts:?}");
            verify(&there, n as u64, LEN)?;
        }
        Ok(())
    })
}
