//! Space set aside with fallocate, in a pool that is nearly too small.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Fabric, Options};
use system_tests::guard;
use system_tests::sys::{self, errno};

const MIB: u64 = 1 << 20;
/// Unit of allocation, bytes.
const BLOCK: u64 = 256 << 10;

fn check(
    fabric: Fabric,
    storage: usize,
    job: fn(&Path, &Path, &Cluster) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            fabric,
            storage,
            pool_mib: 128 / storage as u64,
            ..Options::default()
        },
        move |cluster| job(&cluster.mount(0), &cluster.mount(1), cluster),
    )
}

fn bytes(path: &Path) -> anyhow::Result<(u64, u64)> {
    let meta = path.metadata()?;
    Ok((meta.len(), meta.blocks() * 512))
}

/// Free bytes as `statfs` tells them.
fn free(at: &Path) -> anyhow::Result<u64> {
    let fs = rustix::fs::statvfs(at)?;
    Ok(fs.f_bavail * fs.f_frsize)
}

/// Waits for freed frames to be cleaned.
fn wait_free(at: &Path, least: u64) -> anyhow::Result<()> {
    let start = Instant::now();
    while free(at)? < least {
        ensure!(
            start.elapsed() < Duration::from_secs(15),
            "{} of {least} bytes are free",
            free(at)?
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[test]
fn what_fits_is_allocated() -> anyhow::Result<()> {
    for (fabric, storage) in [(Fabric::Shm, 1), (Fabric::Tcp, 2)] {
        check(fabric, storage, |a, b, _| {
            let file = sys::open(&a.join("f"), libc::O_RDWR | libc::O_CREAT)?;
            file.write_all_at(b"begin", 0)?;
            sys::fallocate(&file, 0, 0, 64 * MIB).context("64 MiB")?;
            for side in [a, b] {
                let got = bytes(&side.join("f"))?;
                ensure!(got == (64 * MIB, 64 * MIB), "size and blocks: {got:?}");
            }
            let data = fs::read(b.join("f"))?;
            ensure!(data.starts_with(b"begin"), "what was written before");
            ensure!(data[5..].iter().all(|&x| x == 0), "new blocks are not zero");
            // Beyond the end, the size is kept; the part that is there already takes no more space.
            sys::fallocate(&file, libc::FALLOC_FL_KEEP_SIZE, 32 * MIB, 64 * MIB).context("32 MiB more")?;
            let got = bytes(&b.join("f"))?;
            ensure!(got == (64 * MIB, 96 * MIB), "after KEEP_SIZE: {got:?}");
            // The space is this file's: others do not get it, the file needs no more.
            ensure!(
                errno(&fs::write(b.join("other"), vec![1; 40 << 20])) == libc::ENOSPC,
                "40 MiB beside 96 of 128"
            );
            fs::remove_file(b.join("other"))?;
            for i in 0..96 {
                file.write_all_at(&vec![i as u8 + 1; MIB as usize], i * MIB)
                    .with_context(|| format!("MiB {i} of what is allocated"))?;
            }
            file.sync_all()?;
            // Zeros in the whole file, although there is no room for a second copy of it.
            sys::fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 3, 96 * MIB - 3).context("zeros")?;
            let got = bytes(&b.join("f"))?;
            ensure!(got == (96 * MIB, 96 * MIB), "after ZERO_RANGE: {got:?}");
            let data = fs::read(b.join("f"))?;
            ensure!(data[..3] == [1; 3], "what lies before the range");
            ensure!(data[3..].iter().all(|&x| x == 0), "ZERO_RANGE leaves something");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_was_written_has_its_space_though_another_mount_fills_the_pool() -> anyhow::Result<()> {
    const BLOCKS: u64 = 40;
    check(Fabric::Shm, 1, |a, b, _| {
        let content = |block: u64| vec![block as u8 + 1; 4096];
        let scattered = sys::open(&b.join("scattered"), libc::O_RDWR | libc::O_CREAT)?;
        for block in 0..BLOCKS {
            scattered.write_all_at(&content(block), block * BLOCK)?;
        }
        let hog = sys::open(&a.join("hog"), libc::O_RDWR | libc::O_CREAT)?;
        let chunk = vec![7; MIB as usize];
        let mut written = 0;
        let refused = loop {
            match hog.write_at(&chunk, written) {
                Ok(n) => written += n as u64,
                Err(error) => break error,
            }
        };
        ensure!(refused.raw_os_error() == Some(libc::ENOSPC), "{refused}");
        // Neither was there room for more, nor did it take what was reserved.
        ensure!(written >= 100 * MIB, "only {written} bytes until ENOSPC");
        scattered
            .sync_all()
            .context("data whose writes had been acknowledged")?;
        let seen = File::open(a.join("scattered"))?;
        for block in 0..BLOCKS {
            let mut bytes = vec![0; 4096];
            seen.read_exact_at(&mut bytes, block * BLOCK)?;
            ensure!(bytes == content(block), "block {block}");
        }
        Ok(())
    })
}

#[test]
fn what_does_not_fit_changes_nothing() -> anyhow::Result<()> {
    check(Fabric::Shm, 1, |a, b, cluster| {
        let file = sys::open(&a.join("f"), libc::O_RDWR | libc::O_CREAT)?;
        file.write_all_at(b"0123456789", 0)?;
        file.sync_all()?;
        let before = bytes(&b.join("f"))?;
        let refused = |from: u64, len: u64, mode: i32, want: i32| -> anyhow::Result<()> {
            let got = errno(&sys::fallocate(&file, mode, from, len));
            ensure!(
                got == want,
                "{len} bytes from {from}: errno {got} instead of {want}"
            );
            let now = bytes(&b.join("f"))?;
            ensure!(
                now == before,
                "{len} bytes from {from}: {before:?} became {now:?}"
            );
            Ok(())
        };
        let empty = free(a)?;
        refused(0, 200 * MIB, 0, libc::ENOSPC)?;
        refused(0, 2 << 40, 0, libc::ENOSPC)?;
        refused(1 << 40, 2 << 40, libc::FALLOC_FL_KEEP_SIZE, libc::ENOSPC)?;
        refused(0, 1 << 60, libc::FALLOC_FL_ZERO_RANGE, libc::ENOSPC)?;
        refused(1 << 60, 4096, 0, libc::EFBIG)?;
        ensure!(
            free(a)? == empty,
            "{empty} bytes were free, now {}: {:?}",
            free(a)?,
            cluster.status()?["storage"]
        );
        ensure!(
            fs::read(b.join("f"))? == b"0123456789",
            "contents after refused calls"
        );
        // While one mount is refused again and again, another finds all the space there is.
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let asker = scope.spawn(|| -> anyhow::Result<u64> {
                let mut times = 0;
                while !over.load(Ordering::Acquire) {
                    refused(0, 2 << 40, 0, libc::ENOSPC)?;
                    times += 1;
                }
                Ok(times)
            });
            let written = (0..60).try_for_each(|i| -> anyhow::Result<()> {
                let made = File::create(b.join(format!("n{i}")))?;
                made.write_all_at(&vec![7; MIB as usize], 0)
                    .and_then(|()| made.sync_all())
                    .with_context(|| format!("MiB {i} of 60 in a pool of 128"))
            });
            over.store(true, Ordering::Release);
            let times = asker.join().unwrap()?;
            written?;
            ensure!(times > 0, "nothing was asked for meanwhile");
            Ok(())
        })?;
        for i in 0..60 {
            fs::remove_file(b.join(format!("n{i}")))?;
        }
        wait_free(a, 100 * MIB)?;
        sys::fallocate(&file, 0, 0, 100 * MIB)?;
        ensure!(bytes(&b.join("f"))?.0 == 100 * MIB, "what fits now");
        Ok(())
    })
}

/// `df` shows the space of a file as soon as it has been removed, so it can be had.
#[test]
fn what_was_removed_makes_room_at_once() -> anyhow::Result<()> {
    let options = Options {
        pool_mib: 64,
        storage: 1,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        for round in 0..6 {
            // By turns on both mounts, and by what asks for frames and what asks for space.
            let path = cluster.mount(round % 2).join("big");
            let file = File::create(&path)?;
            let done = if round % 3 == 0 {
                file.write_all_at(&vec![1; 48 << 20], 0)
            } else {
                sys::fallocate(&file, 0, 0, 48 << 20)
            };
            done.with_context(|| format!("round {round}"))?;
            drop(file);
            fs::remove_file(cluster.mount((round + 1) % 2).join("big"))?;
        }
        Ok(())
    })
}
