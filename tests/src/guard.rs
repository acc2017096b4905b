//! Tests with a time limit: a hung test prints its logs, loses its cluster, and fails.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};

use crate::cluster::{Cluster, Options};

/// Longest time of one test, without the start and the end of its cluster.
pub const TEST_LIMIT: Duration = Duration::from_secs(90);
/// Lines of each log that a failed test prints.
const LOG_LINES: usize = 25;

/// How many times as long as elsewhere things may take here: guests of the lab are slow.
#[must_use]
pub fn patience() -> u32 {
    if std::env::var_os("LAB_NODE").is_some() {
        4
    } else {
        1
    }
}

/// Runs `body` on a thread of its own for at most `limit`; `stuck` is called when it takes longer.
///
/// # Errors
/// Those of the body, its panic, or its taking too long.
pub fn within<T: Send + 'static>(
    limit: Duration,
    body: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    stuck: impl FnOnce(),
) -> anyhow::Result<T> {
    let (tx, rx) = channel();
    std::thread::spawn(move || {
        let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            Err(anyhow!(
                "panic: {}",
                text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?")
            ))
        });
        // Nobody listens any more where it took too long.
        let _ = tx.send(result);
    });
    rx.recv_timeout(limit).unwrap_or_else(|_| {
        stuck();
        bail!("HUNG: not finished within {} s", limit.as_secs())
    })
}

/// Starts a cluster, runs `body` with it, ends it cleanly.
///
/// # Errors
/// Those of the body; a role that panicked or does not end; a test that takes too long. With the ends of
/// the logs.
pub fn with_cluster(
    options: Options,
    body: impl FnOnce(&Cluster) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    with(Cluster::start(options)?, body)
}

/// As [`with_cluster`], with a limit of its own.
///
/// # Errors
/// As [`with_cluster`].
pub fn with_cluster_within(
    limit: Duration,
    options: Options,
    body: impl FnOnce(&Cluster) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    run(Cluster::start(options)?, limit, body)
}

/// Waits until something holds; how long that took.
///
/// # Errors
/// It does not within the limit, or cannot be looked at.
pub fn until(
    what: &str,
    limit: Duration,
    mut holds: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<Duration> {
    let start = Instant::now();
    while !holds()? {
        ensure!(start.elapsed() < limit, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(start.elapsed())
}

/// As [`with_cluster`], with a cluster that need not run yet.
///
/// # Errors
/// As [`with_cluster`].
pub fn with(
    cluster: Cluster,
    body: impl FnOnce(&Cluster) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    run(cluster, TEST_LIMIT, body)
}

fn run(
    cluster: Cluster,
    limit: Duration,
    body: impl FnOnce(&Cluster) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let cluster = Arc::new(cluster);
    let shared = Arc::clone(&cluster);
    let result = within(
        limit * patience(),
        move || body(&shared),
        || {
            print_stacks(&cluster);
            cluster.abort();
        },
    );
    let result = result.and_then(|()| {
        cluster.end_all().context("at the end of the test")?;
        let panicked = cluster.panicked();
        ensure!(panicked.is_empty(), "panics in the logs of {panicked:?}");
        Ok(())
    });
    if let Err(e) = &result {
        // First of all: who sums up a run shows how its report begins.
        eprintln!("{e:#}");
        eprintln!("{:?}\n{}", cluster.options(), cluster.logs(LOG_LINES));
        cluster.abort();
    }
    result
}

/// Where the kernel holds the threads of the roles and of this program: tells a lost wake-up from a deadlock.
fn print_stacks(cluster: &Cluster) {
    let roles = cluster
        .roles()
        .into_iter()
        .filter_map(|r| Some((format!("{r:?}"), cluster.pid(r)?)));
    for (name, pid) in roles.chain([("this test".into(), std::process::id())]) {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let read = |file: &str| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
            let place = read("wchan");
            if !place.is_empty() && place != "0" && place != "futex_do_wait" {
                eprintln!("hung: {name} thread {} in {place}", read("comm").trim());
            }
        }
    }
}

/// Runs `job` with the numbers from 0 on, on so many threads at once; what came of each.
///
/// # Errors
/// That of one, or it panicked.
pub fn together<T: Send>(
    threads: usize,
    job: impl Fn(usize) -> anyhow::Result<T> + Sync,
) -> anyhow::Result<Vec<T>> {
    let job = &job;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|n| scope.spawn(move || job(n))).collect();
        // All are waited for, whatever came of the first.
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        ended
            .into_iter()
            .map(|result| result.unwrap_or_else(|_| anyhow::bail!("panic")))
            .collect()
    })
}
