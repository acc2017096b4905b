//! Several tasks of one mount against several of others, on the same files: nothing is lost, torn or stale.

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
