//! A mount that was evicted begins anew whatever its threads wait for.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::{guard, sys};

const TERM: Duration = Duration::from_secs(2);
/// Longest wait for what has to come.
const LIMIT: Duration = Duration::from_secs(15);

fn until(what: &str, holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    guard::until(what, LIMIT, holds).map(drop)
}

/// Whether a thread of a process waits in the kernel for a page that is locked.
fn waits_for_a_page(pid: u32) -> anyhow::Result<bool> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    let places = tasks.map(|t| fs::read_to_string(t.path().join("wchan")).unwrap_or_default());
    Ok(places.into_iter().any(|place| place.contains("folio")))
}

/// How many lives the first mount has begun.
fn lives(cluster: &Cluster) -> anyhow::Result<usize> {
    let log = fs::read_to_string(cluster.log(Role::Mount(0)))?;
    Ok(log.matches("mounted on").count())
}

/// A read waits for a lease and keeps its page locked; an invalidation before the end of the term waits for the page; then the mount is
/// evicted. The thread that invalidates cannot be ended while the page is locked, and kept the process from its next life.
#[test]
fn a_mount_that_invalidates_what_is_being_read() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Writethrough,
        term: TERM,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let path = |mount: usize| cluster.mount(mount).join("f");
        fs::write(path(1), vec![1; 64 << 10])?;
        fs::File::open(path(1))?.sync_all()?;
        // Nobody else writes it: through the page cache. So that the kernel has something of it, and not all.
        let reader = sys::open(&path(0), libc::O_RDONLY)?;
        rustix::fs::fadvise(&reader, 0, None, rustix::fs::Advice::Random)?;
        ensure!(sys::read_at(&reader, 0, 2)? == [1, 1], "it is not there");
        let writer = sys::open(&path(1), libc::O_WRONLY)?;
        writer.write_all_at(&[2], 0)?;
        drop(writer);
        let pid = cluster.pid(Role::Mount(0)).context("it does not run")?;
        let config = cluster.config().display().to_string();
        cluster.signal(Role::Mount(1), Signal::STOP)?;
        let reading = std::thread::spawn(move || sys::read_at(&reader, 32 << 10, 4096));
        cluster.signal(Role::Meta, Signal::STOP)?;
        let waits = until("an invalidation that waits for a page", || waits_for_a_page(pid));
        cluster.signal(Role::Meta, Signal::CONT)?;
        waits?;
        cluster.tool(&["evict", "0", "--config", &config])?;
        until("the next life", || Ok(lives(cluster)? > 1))?;
        cluster.signal(Role::Mount(1), Signal::CONT)?;
        let read = reading.join().map_err(|_| anyhow::anyhow!("panic"))?;
        ensure!(read.is_err(), "a mount that was evicted has answered");
        Ok(())
    })
}

/// The signal to end comes when the mount has just learnt that it was evicted: it ends, and does not begin anew.
#[test]
fn a_mount_that_was_evicted_is_told_to_end() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        term: TERM,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let config = cluster.config().display().to_string();
        std::thread::scope(|scope| {
            let evicting = scope.spawn(|| cluster.tool(&["evict", "0", "--config", &config]));
            // As soon as can be: before it begins anew, while it does, or when it has.
            let start = Instant::now();
            while !fs::read_to_string(cluster.log(Role::Mount(0)))?.contains("was declared dead") {
                ensure!(start.elapsed() < LIMIT, "it does not learn that it was evicted");
                std::thread::yield_now();
            }
            cluster.signal(Role::Mount(0), Signal::TERM)?;
            evicting.join().map_err(|_| anyhow::anyhow!("panic"))?.map(drop)
        })?;
        cluster.wait(Role::Mount(0), LIMIT)?;
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let point = cluster.mount(0).display().to_string();
        ensure!(!mounts.contains(&point), "it has ended, and is still mounted");
        Ok(())
    })
}
