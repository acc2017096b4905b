//! Several tasks of one mount against several of others, on the same files: nothing is lost, torn or stale.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::ensure;
use system_tests::chance::seeds;
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::contended::{Plan, prove};
use system_tests::guard;

/// (mounts, tasks of each): one writer a mount, as programs that nobody shares have, and several.
const SIZES: &[(usize, usize)] = &[(2, 1), (2, 4), (3, 2)];

fn mixed(fabric: Fabric, cache: Cache, steps: usize) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache,
        mounts: 3,
        ..Options::default()
    };
    guard::with_cluster(options, move |cluster| {
        let seeds = seeds(SIZES.len())?;
        for (&(mounts, tasks), seed) in SIZES.iter().zip(seeds) {
            let dirs: Vec<_> = (0..mounts).map(|mount| cluster.mount(mount)).collect();
            let dirs: Vec<_> = dirs.iter().map(|dir| dir.as_ref()).collect();
            let plan = Plan {
                tasks,
                steps,
                seed,
                extension: cache == Cache::Writeback,
            };
            prove(&dirs, &plan)?;
        }
        Ok(())
    })
}

#[test]
fn writethrough_shm() -> anyhow::Result<()> {
    mixed(Fabric::Shm, Cache::Writethrough, 400)
}

#[test]
fn writethrough_tcp() -> anyhow::Result<()> {
    mixed(Fabric::Tcp, Cache::Writethrough, 400)
}

#[test]
fn direct_shm() -> anyhow::Result<()> {
    mixed(Fabric::Shm, Cache::Direct, 300)
}

#[test]
fn direct_tcp() -> anyhow::Result<()> {
    mixed(Fabric::Tcp, Cache::Direct, 300)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_shm() -> anyhow::Result<()> {
    mixed(Fabric::Shm, Cache::Writeback, 200)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_tcp() -> anyhow::Result<()> {
    mixed(Fabric::Tcp, Cache::Writeback, 200)
}

#[test]
#[ignore = "needs the kernel extension and RDMA: make lab"]
fn extension_verbs() -> anyhow::Result<()> {
    mixed(Fabric::Verbs, Cache::Writeback, 150)
}

/// Files that have outgrown their frames get larger ones when they are written back together, and are read all the while.
#[test]
fn growing_beside_reads() -> anyhow::Result<()> {
    const FILES: usize = 64;
    const ROUNDS: usize = 3;
    let options = Options {
        fabric: Fabric::Shm,
        cache: Cache::Direct,
        mounts: 1,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let dir = cluster.mount(0);
        for round in 0..ROUNDS {
            let files = (0..FILES)
                .map(|n| {
                    let path = dir.join(format!("{round}-{n}"));
                    let file = File::options()
                        .read(true)
                        .write(true)
                        .create(true)
                        .truncate(false)
                        .open(path)?;
                    file.write_all_at(&[b'S'; 3000], 0)?;
                    file.sync_all()?;
                    // In a page of its own: what was stored is not in this mount's cache.
                    file.write_all_at(&[b'T'; 3000], 8192)?;
                    Ok(file)
                })
                .collect::<std::io::Result<Vec<_>>>()?;
            let end = Instant::now() + Duration::from_millis(3000);
            guard::together(2, |reader| {
                let mut page = [0; 3000];
                let mut n = reader;
                while Instant::now() < end {
                    files[n % FILES].read_exact_at(&mut page, 0)?;
                    ensure!(
                        page == [b'S'; 3000],
                        "file {n} of round {round}: {:?}…",
                        &page[..8]
                    );
                    n += 1;
                }
                Ok(())
            })?;
        }
        Ok(())
    })
}
