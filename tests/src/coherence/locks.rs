//! Byte-range locks and whole-file locks across mounts.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use super::Pair;
use crate::sys;

const RDWR: i32 = libc::O_RDWR | libc::O_CREAT;
/// How long a lock that must be granted may take.
const GRANT: Duration = Duration::from_secs(10);
/// How long a lock that must wait is watched.
const WATCH: Duration = Duration::from_millis(30);

fn refused(what: &str, result: &std::io::Result<()>) -> anyhow::Result<()> {
    let errno = sys::errno(result);
    ensure!(
        errno == libc::EAGAIN || errno == libc::EACCES,
        "{what}: errno {errno} instead of a refusal"
    );
    Ok(())
}

pub(super) fn ranges(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let (a, b) = (sys::open(&a, RDWR)?, sys::open(&b, RDWR)?);
    let start = (round * 100) as i64;
    sys::lock(&a, libc::F_WRLCK, start, 50, false)?;
    refused(
        "write lock on a locked range",
        &sys::lock(&b, libc::F_WRLCK, start + 49, 10, false),
    )?;
    refused(
        "read lock on a locked range",
        &sys::lock(&b, libc::F_RDLCK, start, 1, false),
    )?;
    ensure!(
        sys::locked(&b, start, 50)?,
        "F_GETLK does not tell of the other's lock"
    );
    sys::lock(&b, libc::F_WRLCK, start + 50, 10, false).context("a free range")?;
    sys::lock(&a, libc::F_RDLCK, start, 50, false).context("downgrade")?;
    sys::lock(&b, libc::F_RDLCK, start, 50, false).context("shared with a reader")?;
    refused(
        "upgrade while another reads",
        &sys::lock(&a, libc::F_WRLCK, start, 50, false),
    )?;
    sys::lock(&b, libc::F_UNLCK, 0, 0, false)?;
    sys::lock(&a, libc::F_WRLCK, 0, 0, false).context("all after the other's unlock")?;
    drop(a);
    sys::lock(&b, libc::F_WRLCK, 0, 0, false).context("all after the other's close")
}

/// Starts `wait` on a thread, sees that it waits, runs `release`, sees that it gets what it waits for.
fn waits(
    wait: impl FnOnce() -> std::io::Result<()> + Send,
    release: impl FnOnce() -> std::io::Result<()>,
) -> anyhow::Result<()> {
    std::thread::scope(|scope| {
        let (tx, rx) = channel();
        // The receiver waits for it below.
        scope.spawn(move || drop(tx.send(wait())));
        let early = rx.recv_timeout(WATCH);
        release()?;
        if let Ok(result) = early {
            bail!("it did not wait: {result:?}");
        }
        Ok(rx
            .recv_timeout(GRANT)
            .context("not granted after the release")??)
    })
}

pub(super) fn ranges_wait(pair: &Pair, _round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let (a, b) = (sys::open(&a, RDWR)?, sys::open(&b, RDWR)?);
    sys::lock(&a, libc::F_WRLCK, 0, 10, false)?;
    waits(
        || sys::lock(&b, libc::F_WRLCK, 5, 10, true),
        || sys::lock(&a, libc::F_UNLCK, 0, 10, false),
    )?;
    // A close releases, too.
    waits(
        || sys::lock(&a, libc::F_RDLCK, 0, 0, true),
        || {
            drop(b);
            Ok(())
        },
    )
}

pub(super) fn whole(pair: &Pair, _round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let (a, b) = (sys::open(&a, RDWR)?, sys::open(&b, RDWR)?);
    sys::flock(&a, libc::LOCK_EX)?;
    refused("exclusive twice", &sys::flock(&b, libc::LOCK_EX | libc::LOCK_NB))?;
    refused(
        "shared beside exclusive",
        &sys::flock(&b, libc::LOCK_SH | libc::LOCK_NB),
    )?;
    sys::flock(&a, libc::LOCK_SH)?;
    sys::flock(&b, libc::LOCK_SH | libc::LOCK_NB).context("shared twice")?;
    refused(
        "upgrade while another shares",
        &sys::flock(&a, libc::LOCK_EX | libc::LOCK_NB),
    )?;
    sys::flock(&a, libc::LOCK_UN)?;
    sys::flock(&b, libc::LOCK_EX | libc::LOCK_NB).context("after the unlock")
}

pub(super) fn whole_wait(pair: &Pair, _round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let (a, b) = (sys::open(&a, RDWR)?, sys::open(&b, RDWR)?);
    sys::flock(&a, libc::LOCK_EX)?;
    waits(|| sys::flock(&b, libc::LOCK_EX), || sys::flock(&a, libc::LOCK_UN))?;
    waits(
        || sys::flock(&a, libc::LOCK_SH),
        || {
            drop(b);
            Ok(())
        },
    )
}

fn count(file: &File) -> anyhow::Result<u64> {
    let bytes = sys::read_at(file, 0, 8)?;
    Ok(bytes.try_into().map(u64::from_le_bytes).unwrap_or(0))
}

fn increment(path: &Path, by_range: bool, times: u64) -> anyhow::Result<()> {
    let (write, read) = (sys::open(path, libc::O_WRONLY)?, File::open(path)?);
    for _ in 0..times {
        if by_range {
            sys::lock(&write, libc::F_WRLCK, 100, 1, true)?;
        } else {
            sys::flock(&write, libc::LOCK_EX)?;
        }
        write.write_all_at(&(count(&read)? + 1).to_le_bytes(), 0)?;
        if by_range {
            sys::lock(&write, libc::F_UNLCK, 100, 1, false)?;
        } else {
            sys::flock(&write, libc::LOCK_UN)?;
        }
    }
    Ok(())
}

pub(super) fn counter(pair: &Pair, _round: usize) -> anyhow::Result<()> {
    const EACH: u64 = 25;
    let (a, b) = pair.both("f");
    File::create(&a)?;
    for by_range in [true, false] {
        let before = count(&File::open(&a)?)?;
        std::thread::scope(|scope| {
            let other = scope.spawn(|| increment(&b, by_range, EACH));
            increment(&a, by_range, EACH)?;
            other.join().unwrap_or_else(|_| bail!("panic"))
        })?;
        let (got, want) = (count(&File::open(&b)?)?, before + 2 * EACH);
        ensure!(
            got == want,
            "{got} increments instead of {want} (by range: {by_range})"
        );
    }
    Ok(())
}
