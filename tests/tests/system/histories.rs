//! Recorded concurrent histories, checked for linearizability.

use std::path::PathBuf;

use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::{chance, guard, history};

fn record(
    fabric: Fabric,
    cache: Cache,
    mounts: usize,
    job: impl Fn(&[PathBuf], u64) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache,
        mounts,
        ..Options::default()
    };
    guard::with_cluster(options, move |cluster| {
        let mounts: Vec<PathBuf> = (0..mounts).map(|i| cluster.mount(i)).collect();
        // Guests are slow.
        let times = if fabric == Fabric::Verbs { 1 } else { 4 };
        chance::seeds(times)?
            .into_iter()
            .try_for_each(|seed| job(&mounts, seed))
    })
}

fn all(fabric: Fabric, cache: Cache, mounts: usize) -> anyhow::Result<()> {
    let pages = cache != Cache::Direct;
    // What is read by O_DIRECT comes through the page cache there, too.
    let cut = cache != Cache::Writeback;
    let threads = if cache == Cache::Writeback {
        1
    } else {
        history::THREADS
    };
    record(fabric, cache, mounts, move |mounts, seed| {
        history::registers((mounts, history::THREADS), 8, 150, seed)?;
        history::registers((mounts, threads), 4096, 150, seed)?;
        history::registers((mounts, threads), 1000, 150, seed)?;
        if cut {
            history::records(mounts, pages, true, 100, seed)?;
        }
        history::records(mounts, pages, false, 60, seed)?;
        if cache == Cache::Writeback {
            history::mapped(mounts, 150, seed)?;
        }
        history::names(mounts, 100, seed)
    })
}

#[test]
fn shm_direct_two_mounts() -> anyhow::Result<()> {
    all(Fabric::Shm, Cache::Direct, 2)
}

#[test]
fn shm_direct_three_mounts() -> anyhow::Result<()> {
    all(Fabric::Shm, Cache::Direct, 3)
}

#[test]
fn shm_writethrough_two_mounts() -> anyhow::Result<()> {
    all(Fabric::Shm, Cache::Writethrough, 2)
}

#[test]
fn shm_writethrough_three_mounts() -> anyhow::Result<()> {
    all(Fabric::Shm, Cache::Writethrough, 3)
}

#[test]
fn tcp_direct_three_mounts() -> anyhow::Result<()> {
    all(Fabric::Tcp, Cache::Direct, 3)
}

#[test]
fn tcp_writethrough_two_mounts() -> anyhow::Result<()> {
    all(Fabric::Tcp, Cache::Writethrough, 2)
}

#[test]
#[ignore = "needs RDMA devices: make lab"]
fn verbs_direct_three_mounts() -> anyhow::Result<()> {
    all(Fabric::Verbs, Cache::Direct, 3)
}

#[test]
#[ignore = "needs RDMA devices: make lab"]
fn verbs_writethrough_two_mounts() -> anyhow::Result<()> {
    all(Fabric::Verbs, Cache::Writethrough, 2)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_two_mounts() -> anyhow::Result<()> {
    all(Fabric::Verbs, Cache::Writeback, 2)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_three_mounts() -> anyhow::Result<()> {
    all(Fabric::Verbs, Cache::Writeback, 3)
}
