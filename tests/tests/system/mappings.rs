//! Shared mappings on a stock kernel: refused where other mounts have the file, and never a deadlock where they are not.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, fchown};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::guard;
use system_tests::sys::{self, errno};

const LEN: usize = 32_768;
/// A deadlock ends after this.
const LEASE_WAIT: Duration = Duration::from_secs(10);

fn check(options: Options, job: fn(&Path, &Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let options = Options {
            fabric,
            storage: 1,
            lease_wait: LEASE_WAIT,
            ..options.clone()
        };
        guard::with_cluster(options, move |cluster| {
            job(&cluster.mount(0), &cluster.mount(1)).with_context(|| format!("{fabric:?}"))
        })?;
    }
    Ok(())
}

fn new_file(dir: &Path) -> anyhow::Result<()> {
    Ok(fs::write(dir.join("f"), vec![b'a'; LEN])?)
}

fn both(path: &Path) -> anyhow::Result<File> {
    Ok(sys::open(path, libc::O_RDWR)?)
}

/// Does something that nobody may have to wait for until the lease is given up waiting for.
fn soon<T>(what: &str, job: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let begun = Instant::now();
    let done = job().with_context(|| what.to_owned())?;
    ensure!(
        begun.elapsed() < LEASE_WAIT / 2,
        "{what} took {:?}",
        begun.elapsed()
    );
    Ok(done)
}

#[test]
fn the_second_mount_is_refused() -> anyhow::Result<()> {
    let options = Options {
        cache: Cache::Writethrough,
        ..Options::default()
    };
    check(options, |a, b| {
        new_file(a)?;
        let first = both(&a.join("f"))?;
        let map = sys::Map::writable(&first, LEN).context("alone")?;
        map.write(0, b"1");
        let second = both(&b.join("f"))?;
        ensure!(errno(&sys::Map::writable(&second, LEN)) == libc::ENODEV, "shared");
        ensure!(
            errno(&sys::Map::new(&File::open(b.join("f"))?, LEN)) == libc::ENODEV,
            "for reading"
        );
        // Reading and writing goes on, and sees what was stored.
        second.write_all_at(b"2", 4096)?;
        map.sync(libc::MS_SYNC)?;
        ensure!(sys::read_at(&second, 0, 1)? == b"1", "the store");
        ensure!(map.read(4096, 1) == b"2", "the write");
        drop((map, first));
        // The kernel tells of the last close late.
        drop(second);
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let alone = both(&b.join("f"))?;
            match sys::Map::writable(&alone, LEN) {
                Ok(_) => return Ok(()),
                Err(error) => ensure!(Instant::now() < end, "alone again: {error}"),
            }
        }
    })
}

#[test]
fn what_was_just_closed_elsewhere_can_be_mapped() -> anyhow::Result<()> {
    let options = Options {
        cache: Cache::Writethrough,
        ..Options::default()
    };
    check(options, |a, b| {
        for i in 0..50 {
            let name = format!("f{i}");
            fs::write(a.join(&name), vec![b'a'; LEN])?;
            let map = sys::Map::new(&File::open(b.join(&name))?, LEN).with_context(|| name.clone())?;
            ensure!(map.read(LEN - 1, 1) == b"a", "{name}");
        }
        Ok(())
    })
}

#[test]
fn past_the_page_cache_nothing_is_shared() -> anyhow::Result<()> {
    check(Options::default(), |a, _| {
        new_file(a)?;
        ensure!(
            errno(&sys::Map::writable(&both(&a.join("f"))?, LEN)) == libc::ENODEV,
            "direct"
        );
        Ok(())
    })
}

fn dirty_mapping(a: &Path, b: &Path) -> anyhow::Result<()> {
    new_file(a)?;
    let here = both(&a.join("f"))?;
    let map = sys::Map::writable(&here, LEN)?;
    let there = both(&b.join("f"))?;
    let step = |what: &str, job: &dyn Fn() -> anyhow::Result<()>| {
        map.write(0, b"x");
        map.write(4096, b"y");
        soon(what, job)
    };
    step("chown", &|| Ok(fchown(&there, Some(0), Some(0))?))?;
    step("read", &|| {
        sys::read_at(&there, 0, 10).map(drop).map_err(Into::into)
    })?;
    step("write", &|| Ok(there.write_all_at(b"z", 100)?))?;
    step("stat", &|| there.metadata().map(drop).map_err(Into::into))?;
    step("truncate", &|| Ok(there.set_len(LEN as u64 + 4096)?))?;
    step("unlink", &|| Ok(fs::remove_file(b.join("f"))?))?;
    soon("msync", || Ok(map.sync(libc::MS_SYNC)?))
}

/// Two mounts store to the same pages: what is seen is not promised, that nothing hangs or fails is.
fn two_dirty_mappings(a: &Path, b: &Path) -> anyhow::Result<()> {
    new_file(a)?;
    let (barrier, failed) = (Barrier::new(2), AtomicBool::new(false));
    guard::together(2, |n| {
        let file = both(&[a, b][n].join("f"))?;
        let map = sys::Map::writable(&file, LEN)?;
        let mut first = Ok(());
        for i in 0..60u8 {
            barrier.wait();
            if failed.load(Ordering::SeqCst) {
                continue;
            }
            // Each on a page of its own, and both on one.
            let step = soon("a store", || {
                map.write((n + 1) * 4096 + 5, &[i]);
                map.write(100 + n, &[i]);
                let _ = map.read(4096 * (2 - n), 10);
                Ok(())
            });
            let synced = soon("msync", || Ok(map.sync(libc::MS_SYNC)?));
            let looked = soon("fstat", || file.metadata().map(drop).map_err(Into::into));
            if let Err(error) = step.and(synced).and(looked) {
                failed.store(true, Ordering::SeqCst);
                first = first.and(Err(error));
            }
        }
        first
    })?;
    let left = |dir: &Path| fs::read(dir.join("f")).map(|data| (data[4096 + 5], data[8192 + 5]));
    ensure!(
        left(a)? == left(b)? && left(a)? == (59, 59),
        "{:?} {:?}",
        left(a)?,
        left(b)?
    );
    Ok(())
}

fn allowed(cache: Cache, job: fn(&Path, &Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let options = Options {
        cache,
        shared_mappings: true,
        ..Options::default()
    };
    check(options, job)
}

#[test]
fn a_dirty_mapping_makes_nobody_wait() -> anyhow::Result<()> {
    allowed(Cache::Writethrough, dirty_mapping)
}

#[test]
fn a_dirty_mapping_makes_nobody_wait_direct() -> anyhow::Result<()> {
    allowed(Cache::Direct, dirty_mapping)
}

#[test]
fn two_dirty_mappings_make_nobody_wait() -> anyhow::Result<()> {
    allowed(Cache::Writethrough, two_dirty_mappings)
}

#[test]
fn two_dirty_mappings_make_nobody_wait_direct() -> anyhow::Result<()> {
    allowed(Cache::Direct, two_dirty_mappings)
}

/// A revocation makes the kernel write a dirty mapped page and drop it; the WRITE is answered before the lease for it has come back.
/// Whoever looks at the page meanwhile gets it anew, and must find the store in it.
#[test]
fn a_process_never_loses_sight_of_its_own_stores() -> anyhow::Result<()> {
    let options = Options {
        cache: Cache::Writethrough,
        ..Options::default()
    };
    check(options, |a, b| {
        const STORES: u64 = 10_000;
        new_file(a)?;
        let file = both(&a.join("f"))?;
        let map = sys::Map::writable(&file, LEN)?;
        // Takes the lease away, and changes nothing in the file's data.
        let other = File::open(b.join("f"))?;
        // Brings it back to be shared, which is less than the WRITE waits for.
        let beside = sys::open(&a.join("f"), libc::O_RDONLY | libc::O_DIRECT)?;
        let stopped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stopped.load(Ordering::SeqCst) {
                    let _ = sys::read_at(&beside, 8192, 4096);
                }
            });
            scope.spawn(|| {
                while !stopped.load(Ordering::SeqCst) {
                    let _ = fchown(&other, Some(0), Some(0));
                }
            });
            let looked = || -> anyhow::Result<()> {
                for n in 1..=STORES {
                    map.write(0, &n.to_ne_bytes());
                    for _ in 0..20 {
                        let seen = u64::from_ne_bytes(map.read(0, 8).try_into().unwrap_or_default());
                        ensure!(seen == n, "{seen} there after a store of {n}");
                    }
                    // Also one that the page cache is asked for.
                    let read = sys::read_at(&file, 0, 8)?;
                    let seen = u64::from_ne_bytes(read.try_into().unwrap_or_default());
                    ensure!(seen == n, "{seen} read after a store of {n}");
                }
                Ok(())
            };
            let result = looked();
            stopped.store(true, Ordering::SeqCst);
            result
        })?;
        map.sync(libc::MS_SYNC)?;
        let last = sys::read_at(&File::open(b.join("f"))?, 0, 8)?;
        ensure!(last == STORES.to_ne_bytes(), "the last store on the other mount");
        Ok(())
    })
}

/// Its index is a shared writable mapping: two mounts cannot have it, and what is confirmed is there.
#[test]
fn sqlite_in_wal_mode_is_right_or_refused() -> anyhow::Result<()> {
    const COMMITS: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
db.execute('pragma journal_mode=wal')
for _ in range(30):
    db.execute('begin immediate')
    n = db.execute('select n from t').fetchone()[0]
    db.execute('update t set n = ?', (n + 1,))
    db.execute('commit')
    print(flush=True)
";
    const MAKE: &str = "
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute('pragma journal_mode=wal'); db.execute('create table t(n)'); db.execute('insert into t values(0)')
";
    const LOOK: &str = "
import sqlite3, sys
print(sqlite3.connect(sys.argv[1]).execute('select n from t').fetchone()[0])
";
    let options = Options {
        cache: Cache::Writethrough,
        ..Options::default()
    };
    check(options, move |a, b| {
        let python = |code: &str, path: &Path| {
            let out = std::process::Command::new("python3")
                .args(["-c", code])
                .arg(path)
                .output();
            out.context("python3")
        };
        ensure!(python(MAKE, &a.join("db"))?.status.success(), "no database");
        let run = |dir: &Path| -> anyhow::Result<(bool, usize)> {
            let out = python(COMMITS, &dir.join("db"))?;
            let confirmed = out.stdout.iter().filter(|c| **c == b'\n').count();
            Ok((out.status.success(), confirmed))
        };
        let together = guard::together(2, |n| run([a, b][n]))?;
        let mut all: usize = together.iter().map(|(_, confirmed)| confirmed).sum();
        // Once the other is gone it works; the kernel tells of its last close late.
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let (whole, confirmed) = run(b)?;
            all += confirmed;
            if whole {
                break;
            }
            ensure!(Instant::now() < end, "refused alone");
        }
        let there = String::from_utf8(python(LOOK, &a.join("db"))?.stdout)?;
        ensure!(there.trim() == all.to_string(), "{all} confirmed, {there} there");
        Ok(())
    })
}
