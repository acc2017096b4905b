//! Faults at random on all processes of a cluster under a workload that knows what it may see: `system_tests::storm`.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use rand::SeedableRng;
use rand::rngs::StdRng;
use system_tests::chance;
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::guard::{self, patience};
use system_tests::storm::MOUNTS;
use system_tests::storm::board::Count;
use system_tests::storm::faults::Storm;

const TERM: Duration = Duration::from_secs(2);
/// In guests of the lab, whose processors are emulated.
const LAB_TERM: Duration = Duration::from_secs(6);

/// How long faults are done: `FSD_STORM_SECONDS`.
fn length() -> anyhow::Result<Duration> {
    let seconds = std::env::var("FSD_STORM_SECONDS").unwrap_or_else(|_| "60".into());
    Ok(Duration::from_secs(seconds.parse().context("FSD_STORM_SECONDS")?))
}

/// `FSD_STORM_CACHE`, or what a test takes without it.
fn cache(usual: Cache) -> anyhow::Result<Cache> {
    match std::env::var("FSD_STORM_CACHE").ok().as_deref() {
        None => Ok(usual),
        Some("direct") => Ok(Cache::Direct),
        Some("writethrough") => Ok(Cache::Writethrough),
        Some(other) => bail!("FSD_STORM_CACHE: {other}"),
    }
}

fn storm(fabric: Fabric, usual: Cache, apart: bool) -> anyhow::Result<()> {
    storm_on(Options {
        fabric,
        cache: cache(usual)?,
        mounts: MOUNTS,
        term: TERM,
        apart,
        ..Options::default()
    })
}

/// With the kernel extension, in a guest.
fn storm_with_the_extension(fabric: Fabric) -> anyhow::Result<()> {
    storm_on(Options {
        fabric,
        cache: Cache::Writeback,
        mounts: MOUNTS,
        term: LAB_TERM,
        // A mount that is started waits no longer for a server, which may be stopped for three terms.
        timeout: LAB_TERM * 4,
        ..Options::default()
    })
}

fn storm_on(options: Options) -> anyhow::Result<()> {
    let (fabric, cache) = (options.fabric, options.cache);
    let length = length()?;
    let seed = chance::seeds(1)?[0];
    println!("{fabric:?} {cache:?}, seed {seed:#x}, {length:?}");
    guard::with_cluster_within(length + Duration::from_secs(180), options, move |cluster| {
        let mut storm = Storm::start(cluster, StdRng::seed_from_u64(seed), seed)?;
        storm.run(length)?;
        // A storm that is none, or in which nothing was looked at, says nothing.
        // Guests of the lab are too slow for a rate.
        let (least, faults) = if patience() > 1 {
            (1, 1)
        } else {
            (length.as_secs(), length.as_secs() / 6)
        };
        ensure!(storm.faults() as u64 >= faults, "only {} faults", storm.faults());
        for (what, a_second) in [
            (Count::Writes, 20),
            (Count::Fsyncs, 5),
            (Count::Strict, 100),
            (Count::Loose, 1),
            (Count::Recovered, 10),
            (Count::Looks, 3),
            (Count::Locks, 1),
        ] {
            let n = storm.board().count(what).load(SeqCst);
            ensure!(n >= least * a_second, "only {n} of {what:?}");
        }
        if cache == Cache::Writeback {
            let visits = cluster.total("visits")?;
            println!("{:>9} operations forwarded to mounts that live", visits);
            ensure!(visits > 0, "nothing was forwarded");
        }
        Ok(())
    })
}

#[test]
fn storm_over_tcp() -> anyhow::Result<()> {
    storm(Fabric::Tcp, Cache::Direct, false)
}

#[test]
fn storm_over_shared_memory() -> anyhow::Result<()> {
    storm(Fabric::Shm, Cache::Writethrough, false)
}

/// Each process on a host of its own, and every other fault is a link that is cut.
#[test]
fn storm_between_hosts() -> anyhow::Result<()> {
    storm(Fabric::Tcp, Cache::Direct, true)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_storm_over_tcp() -> anyhow::Result<()> {
    storm_with_the_extension(Fabric::Tcp)
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_storm_over_shared_memory() -> anyhow::Result<()> {
    storm_with_the_extension(Fabric::Shm)
}

#[test]
#[ignore = "needs the kernel extension and RDMA: make lab"]
fn extension_storm_over_verbs() -> anyhow::Result<()> {
    storm_with_the_extension(Fabric::Verbs)
}
