//! Random operations against a local directory, and fsx.

use std::path::PathBuf;

use anyhow::Context;
use system_tests::cluster::{Cache, Cluster, Fabric, Options};
use system_tests::{chance, fsx, guard, model};

fn mounts(cluster: &Cluster) -> Vec<PathBuf> {
    (0..cluster.options().mounts).map(|i| cluster.mount(i)).collect()
}

fn numbers(variable: &str) -> anyhow::Result<Vec<u64>> {
    let text = std::env::var(variable).unwrap_or_default();
    let numbers = text
        .split_whitespace()
        .map(|s| s.parse().with_context(|| format!("{variable}: {s}")));
    numbers.collect()
}

/// Sequences to be played again instead of the usual ones: the numbers in `FSD_SEEDS`.
fn again() -> anyhow::Result<Vec<u64>> {
    numbers("FSD_SEEDS")
}

fn like_local(fabric: Fabric, cache: Cache, mounts_wanted: usize) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache,
        mounts: mounts_wanted,
        ..Options::default()
    };
    guard::with_cluster(options, move |cluster| {
        let local = cluster.path("local");
        std::fs::create_dir(&local)?;
        // Fixed seeds, so that a known sequence is never lost, and new ones. Guests are slow.
        let new = if fabric == Fabric::Verbs { 1 } else { 5 };
        let seeds = match again()? {
            seeds if seeds.is_empty() => (1..=new).chain(chance::seeds(new as usize)?).collect(),
            seeds => seeds,
        };
        for (round, &seed) in seeds.iter().enumerate() {
            let local = local.join(round.to_string());
            std::fs::create_dir(&local)?;
            model::run(&mounts(cluster), &local, 500, seed)
                .with_context(|| format!("FSD_SEEDS={seed} plays it again"))?;
        }
        Ok(())
    })
}

#[test]
fn one_mount_is_like_a_local_directory() -> anyhow::Result<()> {
    like_local(Fabric::Shm, Cache::Writethrough, 1)
}

#[test]
fn two_mounts_are_like_a_local_directory_direct() -> anyhow::Result<()> {
    like_local(Fabric::Shm, Cache::Direct, 2)
}

#[test]
fn two_mounts_are_like_a_local_directory_writethrough() -> anyhow::Result<()> {
    like_local(Fabric::Shm, Cache::Writethrough, 2)
}

#[test]
fn three_mounts_over_tcp_are_like_a_local_directory() -> anyhow::Result<()> {
    like_local(Fabric::Tcp, Cache::Writethrough, 3)
}

fn fsx_on(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    // `FSD_STEPS` makes runs longer.
    let usual = if fabric == Fabric::Verbs { 400 } else { 1000 };
    let steps = numbers("FSD_STEPS")?.first().map_or(usual, |n| *n as usize);
    let limit = guard::TEST_LIMIT * (1 + steps / 1000) as u32;
    let options = Options {
        fabric,
        cache,
        // It maps what its other mounts have open.
        shared_mappings: true,
        ..Options::default()
    };
    guard::with_cluster_within(limit, options, move |cluster| {
        let (known, new) = if fabric == Fabric::Verbs { (1, 1) } else { (3, 2) };
        let seeds = match again()? {
            seeds if seeds.is_empty() => (1..=known).chain(chance::seeds(new)?).collect(),
            seeds => seeds,
        };
        seeds.into_iter().try_for_each(|seed| {
            let paths: Vec<_> = mounts(cluster)
                .iter()
                .map(|m| m.join(format!("fsx-{seed}")))
                .collect();
            fsx::run(&paths, steps, seed, cache == Cache::Writeback)
                .with_context(|| format!("FSD_SEEDS={seed} plays it again"))
        })
    })
}

#[test]
fn fsx_through_two_mounts_shm_direct() -> anyhow::Result<()> {
    fsx_on(Fabric::Shm, Cache::Direct)
}

#[test]
fn fsx_through_two_mounts_shm_writethrough() -> anyhow::Result<()> {
    fsx_on(Fabric::Shm, Cache::Writethrough)
}

#[test]
fn fsx_through_two_mounts_tcp_direct() -> anyhow::Result<()> {
    fsx_on(Fabric::Tcp, Cache::Direct)
}

#[test]
fn fsx_through_two_mounts_tcp_writethrough() -> anyhow::Result<()> {
    fsx_on(Fabric::Tcp, Cache::Writethrough)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_two_mounts_are_like_a_local_directory() -> anyhow::Result<()> {
    like_local(Fabric::Verbs, Cache::Writeback, 2)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_fsx_through_two_mounts() -> anyhow::Result<()> {
    fsx_on(Fabric::Verbs, Cache::Writeback)
}
