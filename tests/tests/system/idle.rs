//! A cluster that nobody uses sleeps: its threads wake up for what is promised (heartbeats), and for what nobody can tell them.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Fabric, Options};
use system_tests::guard;
use system_tests::process::fsd_binary;

/// Threads that wake up by themselves, and how often in ten seconds ([docs/operations.md](../../../docs/operations.md) says what for).
const WAKES: &[(&str, u64)] = &[
    // Of the metadata server: two heartbeats a second, and the answers of two storage nodes every two.
    ("fabric-", 30),
    ("fsd-heartbeat", 10),
    ("meta-members", 30),
    ("meta-copies", 15),
    ("meta-sync", 10),
    ("storage-flush", 5),
];
/// All others, in ten seconds.
const OTHERS: u64 = 2;
/// How long is counted.
const WINDOW: Duration = Duration::from_secs(5);
/// Longest wait for a window in which they sleep: what has to do with the start, or with what was done last, is over by then.
const LIMIT: Duration = Duration::from_secs(30);

/// A thread: its process, its number, its name.
type Thread = (u32, String, String);

/// How often each thread of some processes has slept so far.
fn slept(pids: &[u32]) -> anyhow::Result<BTreeMap<Thread, u64>> {
    let mut all = BTreeMap::new();
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            let read = |name: &str| fs::read_to_string(task.path().join(name));
            // It may have ended.
            let (Ok(name), Ok(status)) = (read("comm"), read("status")) else {
                continue;
            };
            let count = status
                .lines()
                .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))
                .context("no count")?;
            let number = task.file_name().to_string_lossy().into_owned();
            all.insert((*pid, number, name.trim().to_owned()), count.trim().parse()?);
        }
    }
    Ok(all)
}

/// Who has woken up more often than is due in this time.
fn sleepless(
    before: &BTreeMap<Thread, u64>,
    after: &BTreeMap<Thread, u64>,
    time: Duration,
) -> Vec<(Thread, u64)> {
    let woken = after.iter().map(|(thread, count)| {
        let since = count - before.get(thread).copied().unwrap_or(0);
        (thread.clone(), since)
    });
    woken
        .filter(|((_, _, name), count)| {
            let own = WAKES.iter().find(|(own, _)| name.starts_with(own));
            let due = own.map_or(OTHERS, |(_, due)| *due);
            // Half as often again, for what meets a lock; and once where a period begins.
            *count > 1 + due * 3 * time.as_millis() as u64 / 20_000
        })
        .collect()
}

/// Waits until these processes sleep.
fn sleep_at_last(pids: &[u32]) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let (before, start) = (slept(pids)?, Instant::now());
        std::thread::sleep(WINDOW);
        let after = slept(pids)?;
        let restless = sleepless(&before, &after, start.elapsed());
        if restless.is_empty() {
            return Ok(());
        }
        ensure!(
            begun.elapsed() < LIMIT,
            "they do not sleep: {restless:?}, all: {after:?}"
        );
    }
}

/// Makes files, reads, appends to, syncs, and removes them on both mounts.
fn use_it(cluster: &Cluster) -> anyhow::Result<()> {
    for i in 0..60 {
        let name = format!("f{i}");
        let (here, there) = (
            cluster.mount(i % 2).join(&name),
            cluster.mount(1 - i % 2).join(&name),
        );
        fs::write(&here, vec![1; 20_000])?;
        ensure!(fs::read(&there)?.len() == 20_000);
        let mut file = OpenOptions::new().append(true).open(&there)?;
        file.write_all(&[2; 100])?;
        if i % 3 == 0 {
            file.sync_all()?;
        }
        ensure!(fs::read(&here)?.len() == 20_100);
        if i % 4 != 0 {
            fs::remove_file(if i % 4 == 1 { here } else { there })?;
        }
    }
    Ok(())
}

fn idle(fabric: Fabric) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        storage: 2,
        ..Options::default()
    };
    let cluster = Cluster::formatted(options)?;
    // As it is where nothing else is said: tests have the disk checked all the time.
    let config = fs::read_to_string(cluster.config())?.replace("scrub_pause_s = 0\n", "");
    ensure!(!config.contains("scrub"), "{config}");
    fs::write(cluster.config(), config)?;
    cluster.start_all()?;
    guard::with(cluster, |cluster| {
        let pids: Vec<u32> = cluster
            .roles()
            .into_iter()
            .filter_map(|role| cluster.pid(role))
            .collect();
        ensure!(pids.len() == 5, "{pids:?}");
        sleep_at_last(&pids)?;
        use_it(cluster)?;
        sleep_at_last(&pids)
    })
}

#[test]
fn a_cluster_that_nobody_uses_sleeps_shm() -> anyhow::Result<()> {
    idle(Fabric::Shm)
}

#[test]
fn a_cluster_that_nobody_uses_sleeps_tcp() -> anyhow::Result<()> {
    idle(Fabric::Tcp)
}

/// Whoever watches a cluster for a user is no more awake than it, with a command and without, and sees the end of either.
#[test]
fn who_watches_a_cluster_sleeps() -> anyhow::Result<()> {
    for command in [&["--", "sleep", "600"][..], &[]] {
        let dir = tempfile::tempdir()?;
        let mut dev = Command::new(fsd_binary()?)
            .args([
                "dev",
                "--mounts",
                "1",
                "--storage",
                "1",
                "--pool",
                "64MiB",
                "--dir",
            ])
            .arg(dir.path())
            .args(command)
            .process_group(0)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = dev.id();
        let watched = guard::within(2 * LIMIT, move || sleep_at_last(&[pid]), || {});
        let ended = watched.and_then(|()| end_of_a_child(pid, !command.is_empty()));
        // What it still has it takes down.
        let _ = Command::new("kill").args(["-TERM", &pid.to_string()]).status();
        let status = dev.wait()?;
        ended?;
        ensure!(!status.success(), "{status}: it was told of no death");
    }
    Ok(())
}

/// Kills a process that it has started: its command, or else a server.
fn end_of_a_child(pid: u32, commanded: bool) -> anyhow::Result<()> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let is_command = |child: &&str| {
        let name = fs::read_to_string(format!("/proc/{child}/comm"));
        name.is_ok_and(|name| (name.trim() == "sleep") == commanded)
    };
    let child = children.split_whitespace().find(is_command).context("no child")?;
    Command::new("kill").args(["-KILL", child]).status()?;
    guard::until("its end", LIMIT, || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
        Ok(stat.map_or(true, |stat| stat.contains(") Z ")))
    })?;
    Ok(())
}
