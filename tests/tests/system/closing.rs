//! The last close of a file meets the removal of its last name, on the same mount: whichever comes first, nothing stays.

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options};
use system_tests::guard;

const THREADS: usize = 8;
const LIMIT: Duration = Duration::from_secs(150);
const LENGTH: Duration = Duration::from_secs(6);
/// What is kept for who looked it up goes after two seconds, what storage nodes are to free a little later.
const PATIENCE: Duration = Duration::from_secs(60);

/// One task closes files that another removes just then, in a folder of its own so that nobody waits for the folder.
fn close_and_remove(dir: &Path, end: Instant) -> anyhow::Result<u64> {
    fs::create_dir(dir)?;
    let mut rounds = 0;
    while Instant::now() < end {
        let name = dir.join(rounds.to_string());
        let file = File::create_new(&name)?;
        fs::write(&name, [1; 5000])?;
        std::thread::scope(|scope| {
            scope.spawn(move || drop(file));
            if rounds % 2 == 0 {
                fs::remove_file(&name)
            } else {
                let other = dir.join("other");
                fs::write(&other, [2; 5000])?;
                fs::rename(&other, &name)?;
                fs::remove_file(&name)
            }
        })?;
        rounds += 1;
    }
    fs::remove_dir(dir)?;
    Ok(rounds)
}

/// Orphans, and inodes that are being freed.
fn left(cluster: &Cluster) -> anyhow::Result<(u64, u64)> {
    let status = cluster.status()?;
    let number = |name: &str| status["meta"]["Ok"][name].as_u64().context("no such number");
    Ok((number("orphans")?, number("freeing")?))
}

fn nothing_stays(fabric: Fabric) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache: Cache::Direct,
        ..Options::default()
    };
    guard::with_cluster_within(LIMIT, options, move |cluster| {
        let end = Instant::now() + LENGTH;
        let rounds = std::thread::scope(|scope| {
            let one = |n: usize| {
                let dir = cluster.mount(0).join(n.to_string());
                scope.spawn(move || close_and_remove(&dir, end))
            };
            let all: Vec<_> = (0..THREADS).map(one).collect();
            let ended = all.into_iter().map(|t| t.join().unwrap());
            ended.sum::<anyhow::Result<u64>>()
        })?;
        println!("{fabric:?}: {rounds} rounds");
        let begun = Instant::now();
        while left(cluster)? != (0, 0) {
            ensure!(
                begun.elapsed() < PATIENCE,
                "orphans, and inodes being freed, after {rounds} rounds: {:?}",
                left(cluster)?
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    })
}

#[test]
fn a_close_that_meets_a_removal_leaves_nothing() -> anyhow::Result<()> {
    nothing_stays(Fabric::Shm)
}

#[test]
fn a_close_that_meets_a_removal_leaves_nothing_over_tcp() -> anyhow::Result<()> {
    nothing_stays(Fabric::Tcp)
}
