//! Requests of several tasks for one inode are under way at the same time. Nothing is measured: the servers' answers are held
//! back, and all the questions come all the same.

use std::time::Duration;

use anyhow::Context;
use system_tests::cluster::Cluster;
use system_tests::guard;
use system_tests::proxy::Proxy;
use system_tests::side_by_side::{TASKS, look_up, open, options, prepare, read, with_tasks};

const LIMIT: Duration = Duration::from_secs(10);

/// What `one` asks these servers for, in bytes.
fn cost(proxies: &[&Proxy], one: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<u64> {
    let asked = || proxies.iter().map(|p| p.asked()).sum::<u64>();
    let before = asked();
    one()?;
    Ok(asked() - before)
}

/// All of `TASKS` ask before any has an answer.
fn all_ask(
    proxies: &[&Proxy],
    one: u64,
    act: impl Fn(usize) -> anyhow::Result<()> + Sync,
) -> anyhow::Result<()> {
    let (asked, act) = (|| proxies.iter().map(|p| p.asked()).sum::<u64>(), &act);
    let before = asked();
    proxies.iter().for_each(|p| p.hold(true));
    let (seen, done) = std::thread::scope(|scope| {
        let tasks = scope.spawn(|| with_tasks(TASKS, 2..2 + TASKS, act));
        let end = std::time::Instant::now() + LIMIT;
        while asked() < before + one * TASKS as u64 && std::time::Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let seen = asked() - before;
        proxies.iter().for_each(|p| p.hold(false));
        (seen, tasks.join())
    });
    done.ok().context("the tasks panicked")??;
    let wanted = one * TASKS as u64;
    anyhow::ensure!(
        seen >= wanted,
        "{seen} bytes were asked for side by side, not {wanted}"
    );
    Ok(())
}

fn storage(cluster: &Cluster) -> anyhow::Result<Vec<&Proxy>> {
    Ok(cluster.proxies()?.storage.iter().collect())
}

#[test]
fn cold_reads_of_one_file() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        prepare(cluster, 2)?;
        let file = open(cluster)?;
        let storage = storage(cluster)?;
        let one = cost(&storage, || read(&file, 1))?;
        all_ask(&storage, one, |place| read(&file, place))
    })
}

#[test]
fn look_ups_in_one_directory() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        prepare(cluster, 2)?;
        look_up(cluster, 0)?;
        let meta = vec![&cluster.proxies()?.meta];
        let one = cost(&meta, || look_up(cluster, 1))?;
        all_ask(&meta, one, |n| look_up(cluster, n))
    })
}
