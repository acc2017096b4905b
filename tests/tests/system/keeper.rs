//! A mount's daemon that dies is started again by its keeper, as a new life at the same mount point.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::process::fsd_binary;
use system_tests::{guard, sys};

const PATIENCE: Duration = Duration::from_secs(20);
/// Far less than the term of these clusters, after which a mount is dead that nobody has heard of.
const SOON: Duration = Duration::from_secs(5);

fn options(fabric: Fabric) -> Options {
    Options {
        fabric,
        cache: Cache::Writethrough,
        keep: true,
        ..Options::default()
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<Duration> {
    guard::until(what, PATIENCE, || Ok(holds()))
}

/// The keeper of a mount.
fn keeper(cluster: &Cluster, mount: usize) -> anyhow::Result<Pid> {
    let pid = cluster.pid(Role::Mount(mount)).context("it does not run")?;
    Pid::from_raw(pid as i32).context("a process id")
}

/// The daemon that a keeper has now.
fn daemon(keeper: Pid) -> Option<Pid> {
    let pid = keeper.as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

/// How much is mounted at a point, one above the other; without a look at what is there.
fn mounted_at(point: &Path) -> usize {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let text = point.to_string_lossy();
    let lines = mounts.lines();
    lines.filter(|l| l.split(' ').nth(1) == Some(&*text)).count()
}

/// Processor time that a process has used, in ticks (of 10 ms).
fn ticks(pid: Pid) -> anyhow::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()))?;
    let (_, rest) = stat.rsplit_once(')').context("its name")?;
    let words: Vec<&str> = rest.split_whitespace().collect();
    let word = |n: usize| -> anyhow::Result<u64> { Ok(words.get(n).context("times")?.parse()?) };
    Ok(word(11)? + word(12)?)
}

/// Makes a file that tells the mount from the directory below, for good.
fn mark(point: &Path) -> anyhow::Result<()> {
    File::create(point.join("marker"))?.sync_all()?;
    Ok(File::open(point)?.sync_all()?)
}

/// Kills the daemon, and waits until another one serves; with the number of it.
fn kill(keeper: Pid, point: &Path) -> anyhow::Result<Duration> {
    let killed = daemon(keeper).context("no daemon")?;
    kill_process(killed, Signal::KILL)?;
    until("the next life", || {
        // The directory below has no such file, and can be seen for a moment.
        daemon(keeper).is_some_and(|pid| pid != killed) && point.join("marker").exists()
    })
}

fn served_again(fabric: Fabric) -> anyhow::Result<()> {
    guard::with_cluster(options(fabric), move |cluster| {
        let (kept, other) = (cluster.mount(0), cluster.mount(1));
        let keeper = keeper(cluster, 0)?;
        fs::write(other.join("apart"), "apart")?;
        mark(&kept)?;
        let over = AtomicBool::new(false);
        let slowest = std::thread::scope(|scope| {
            // The other mount goes on with what the dead one has nothing of.
            let going_on = scope.spawn(|| -> anyhow::Result<Duration> {
                let mut slowest = Duration::ZERO;
                while !over.load(Ordering::SeqCst) {
                    let begun = Instant::now();
                    ensure!(fs::read_to_string(other.join("apart"))? == "apart");
                    slowest = slowest.max(begun.elapsed());
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(slowest)
            });
            let twice = || -> anyhow::Result<()> {
                for round in 0..2u8 {
                    let name = format!("f{round}");
                    let file = File::create_new(kept.join(&name))?;
                    file.write_all_at(&[round; 50_000], 0)?;
                    file.sync_all()?;
                    File::open(&kept)?.sync_all()?;
                    file.write_all_at(&[0xff; 50_000], 50_000)?;
                    let reader = File::open(other.join("apart"))?;
                    let again = kill(keeper, &kept)?;
                    println!("{fabric:?}: serves again after {again:?}");
                    ensure!(again < SOON, "{again:?}");
                    ensure!(mounted_at(&kept) == 1, "what was there before is still mounted");
                    ensure!(
                        sys::errno(&file.sync_all()) == libc::ENOTCONN,
                        "a file of the dead one"
                    );
                    let begun = Instant::now();
                    let found = fs::read(other.join(&name))?;
                    ensure!(begun.elapsed() < SOON, "blocked for {:?}", begun.elapsed());
                    ensure!(
                        found.len() >= 50_000 && found[..50_000] == [round; 50_000],
                        "lost"
                    );
                    ensure!(fs::read(kept.join(&name))? == found, "the two mounts differ");
                    fs::write(kept.join(&name), "anew")?;
                    ensure!(fs::read_to_string(other.join(&name))? == "anew");
                    ensure!(sys::read_at(&reader, 0, 5)? == b"apart");
                }
                Ok(())
            };
            let result = twice();
            over.store(true, Ordering::SeqCst);
            let slowest = going_on.join().map_err(|_| anyhow::anyhow!("panic"))?;
            result.and(slowest)
        })?;
        println!("{fabric:?}: the other mount was blocked for {slowest:?} at most");
        ensure!(slowest < SOON, "the other mount was blocked for {slowest:?}");
        ensure!(
            ticks(keeper)? <= 5,
            "the keeper has used {} ticks",
            ticks(keeper)?
        );
        let last = daemon(keeper).context("no daemon")?;
        cluster.end(Role::Mount(0))?;
        ensure!(mounted_at(&kept) == 0 && test_kill_process(last).is_err());
        Ok(())
    })
}

#[test]
fn a_killed_daemon_is_started_again() -> anyhow::Result<()> {
    served_again(Fabric::Tcp)?;
    served_again(Fabric::Shm)
}

/// The pause is growing by then; nothing is left of the mount when the keeper has ended, nor was it ever looked into.
#[test]
fn a_keeper_ends_while_its_daemon_is_dead() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Shm), |cluster| {
        let (point, keeper) = (cluster.mount(0), keeper(cluster, 0)?);
        mark(&point)?;
        for _ in 0..5 {
            kill(keeper, &point)?;
        }
        let killed = daemon(keeper).context("no daemon")?;
        kill_process(killed, Signal::KILL)?;
        until("the end of the daemon", || daemon(keeper).is_none())?;
        ensure!(mounted_at(&point) == 1);
        let begun = Instant::now();
        cluster.end(Role::Mount(0))?;
        ensure!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        ensure!(mounted_at(&point) == 0, "still mounted");
        Ok(())
    })
}

#[test]
fn a_daemon_ends_in_order_when_its_keeper_is_killed() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Tcp), |cluster| {
        let (point, keeper) = (cluster.mount(0), keeper(cluster, 0)?);
        let daemon = daemon(keeper).context("no daemon")?;
        fs::write(point.join("f"), "written, not synced")?;
        kill_process(keeper, Signal::KILL)?;
        until("unmounted", || mounted_at(&point) == 0)?;
        until("the end of the daemon", || test_kill_process(daemon).is_err())?;
        ensure!(fs::read_to_string(cluster.mount(1).join("f"))? == "written, not synced");
        cluster.wait(Role::Mount(0), PATIENCE)?;
        cluster.start_role(Role::Mount(0))?;
        ensure!(fs::read_to_string(point.join("f"))? == "written, not synced");
        Ok(())
    })
}

/// What cannot be mounted once would not be the second time either.
#[test]
fn a_first_life_that_cannot_begin_is_the_last() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Shm), |cluster| {
        let told = Command::new("timeout")
            .arg("20")
            .arg(fsd_binary()?)
            .args(["mount", "--keep", "--config"])
            .arg(cluster.config())
            .arg(cluster.path("nowhere"))
            .output()?;
        let text = String::from_utf8_lossy(&told.stderr);
        ensure!(
            told.status.code() == Some(1) && text.matches("create it with mkdir").count() == 1,
            "{} {text}",
            told.status
        );
        // One that is unmounted by somebody ends, and is not mounted again.
        ensure!(
            Command::new("umount").arg(cluster.mount(0)).status()?.success(),
            "umount"
        );
        let ended = cluster.wait(Role::Mount(0), PATIENCE)?;
        ensure!(ended.success() && mounted_at(&cluster.mount(0)) == 0, "{ended}");
        Ok(())
    })
}
