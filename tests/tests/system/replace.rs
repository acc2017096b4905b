//! A mount's daemon is replaced by another process, while programs go on.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role, nodes};
use system_tests::process::fsd_binary;
use system_tests::{guard, replaced, sys};

const MAKE: i32 = libc::O_RDWR | libc::O_CREAT;
const PATIENCE: Duration = Duration::from_secs(30);

fn options(fabric: Fabric, cache: Cache) -> Options {
    Options {
        fabric,
        cache,
        ..Options::default()
    }
}

/// Has a process ended? One that nobody has waited for yet has as well.
fn has_ended(process: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero()));
    stat.map_or(true, |stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
    })
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<Duration> {
    guard::until(what, PATIENCE, || Ok(holds()))
}

/// The process that serves a mount, as `fsd replace` says.
fn number_in(said: &str) -> anyhow::Result<Pid> {
    let mut words = said.split_whitespace().skip_while(|word| *word != "process");
    let number = words.nth(1).and_then(|word| Pid::from_raw(word.parse().ok()?));
    number.with_context(|| format!("fsd replace says {said}"))
}

/// A mount that is replaced; what serves it in the end is ended with this.
pub struct Served<'a> {
    cluster: &'a Cluster,
    mount: usize,
    /// The process that serves it now, where that is not the one the cluster has started.
    now: Option<Pid>,
}

impl<'a> Served<'a> {
    pub fn new(cluster: &'a Cluster, mount: usize) -> Self {
        Self {
            cluster,
            mount,
            now: None,
        }
    }

    /// The process that serves the mount.
    pub fn process(&self) -> anyhow::Result<Pid> {
        let first = self.cluster.pid(Role::Mount(self.mount));
        let first = first.and_then(|pid| Pid::from_raw(pid as i32));
        self.now.or(first).context("it does not run")
    }

    fn command(&self, program: Option<&Path>) -> anyhow::Result<std::process::Output> {
        let mut command = Command::new("timeout");
        command.arg("60").arg(fsd_binary()?).arg("replace");
        if let Some(program) = program {
            command.arg("--program").arg(program);
        }
        Ok(command.arg(self.cluster.mount(self.mount)).output()?)
    }

    /// Has it replaced; the process that served it before.
    pub fn replace(&mut self) -> anyhow::Result<Pid> {
        let before = self.process()?;
        let out = self.command(None)?;
        let (said, why) = (
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr),
        );
        ensure!(out.status.success(), "fsd replace: {why}");
        let number = said
            .split("process ")
            .nth(1)
            .and_then(|rest| rest.split(' ').next());
        let number = number.with_context(|| format!("fsd replace says {said}"))?;
        self.now = Pid::from_raw(number.parse()?);
        ensure!(self.process()? != before, "the same process");
        Ok(before)
    }

    /// Has it replaced by a program with which that does not work; what is said of that.
    pub fn replace_in_vain(&self, program: Option<&Path>) -> anyhow::Result<String> {
        let out = self.command(program)?;
        ensure!(!out.status.success(), "it was replaced");
        Ok(String::from_utf8_lossy(&out.stderr).into_owned())
    }

    /// Ends it in order.
    pub fn end(&mut self) -> anyhow::Result<()> {
        if let Some(now) = self.now {
            kill_process(now, Signal::TERM)?;
            until("the end of the mount", || has_ended(now))?;
            self.now = None;
        }
        Ok(())
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        if let Some(now) = self.now {
            // What waits there must not wait for ever.
            let _ = Command::new("umount")
                .arg("-l")
                .arg(self.cluster.mount(self.mount))
                .status();
            let _ = kill_process(now, Signal::KILL);
        }
    }
}

fn idle(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    guard::with_cluster(options(fabric, cache), |cluster| {
        let (point, other) = (cluster.mount(0), cluster.mount(1));
        let mut served = Served::new(cluster, 0);
        let file = sys::open(&point.join("f"), MAKE)?;
        file.write_all_at(b"before", 0)?;
        let gone = sys::open(&point.join("gone"), MAKE)?;
        gone.write_all_at(b"nameless", 0)?;
        fs::remove_file(point.join("gone"))?;
        for round in 0..3u8 {
            let before = served.replace()?;
            ensure!(sys::read_at(&file, 0, 6)? == b"before", "what is open");
            ensure!(
                sys::read_at(&gone, 0, 8)? == b"nameless",
                "what is open and has no name"
            );
            file.write_all_at(&[round; 100], 6)?;
            file.sync_all()?;
            ensure!(fs::read(other.join("f"))?[6..] == [round; 100], "the other mount");
            fs::write(point.join(format!("new{round}")), "new")?;
            ensure!(fs::read_to_string(other.join(format!("new{round}")))? == "new");
            until("the end of the process before", || has_ended(before))?;
            ensure!(
                sys::read_at(&gone, 0, 8)? == b"nameless",
                "kept by who serves it now"
            );
            ensure!(nodes(&cluster.status()?)?.len() == 2, "mounts");
        }
        drop((file, gone));
        served.end()
    })
}

#[test]
fn what_is_open_goes_on_shm() -> anyhow::Result<()> {
    idle(Fabric::Shm, Cache::Writethrough)
}

#[test]
fn what_is_open_goes_on_tcp() -> anyhow::Result<()> {
    idle(Fabric::Tcp, Cache::Direct)
}

/// How often a daemon is replaced while programs are at work: `FSD_REPLACEMENTS`.
fn times() -> u32 {
    let times = std::env::var("FSD_REPLACEMENTS").ok();
    times.and_then(|times| times.parse().ok()).unwrap_or(5)
}

/// Prints how long nobody served the kernel, and why it had to be tried again.
fn tell_passes(cluster: &Cluster) -> anyhow::Result<()> {
    for line in fs::read_to_string(cluster.log(Role::Mount(0)))?.lines() {
        let said = line.split("replace::giving: ").nth(1);
        said.into_iter().for_each(|said| println!("{said}"));
    }
    Ok(())
}

fn under_load(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    let times = times();
    let limit = guard::TEST_LIMIT + Duration::from_secs(6) * times;
    guard::with_cluster_within(limit, options(fabric, cache), move |cluster| {
        let mut served = Served::new(cluster, 0);
        let done = replaced::work(&cluster.mount(0), &cluster.mount(1), || {
            for _ in 0..times {
                std::thread::sleep(Duration::from_millis(500));
                let begun = Instant::now();
                let before = served.replace()?;
                println!("{fabric:?} {cache:?}: replaced in {:?}", begun.elapsed());
                until("the end of the process before", || has_ended(before))?;
            }
            std::thread::sleep(Duration::from_millis(500));
            Ok(())
        })?;
        for (task, done) in &done {
            println!(
                "{fabric:?} {cache:?}: {task}: {} rounds, the longest {:?}",
                done.rounds, done.longest
            );
            ensure!(done.rounds > 0, "{task} has done nothing");
        }
        tell_passes(cluster)?;
        served.end()
    })
}

#[test]
fn programs_go_on_tcp_writethrough() -> anyhow::Result<()> {
    under_load(Fabric::Tcp, Cache::Writethrough)
}

#[test]
fn programs_go_on_tcp_direct() -> anyhow::Result<()> {
    under_load(Fabric::Tcp, Cache::Direct)
}

#[test]
fn programs_go_on_shm_writethrough() -> anyhow::Result<()> {
    under_load(Fabric::Shm, Cache::Writethrough)
}

#[test]
fn programs_go_on_shm_direct() -> anyhow::Result<()> {
    under_load(Fabric::Shm, Cache::Direct)
}

/// A program that cannot serve the mount.
fn script(cluster: &Cluster, text: &str) -> anyhow::Result<PathBuf> {
    let path = cluster.path("program");
    fs::write(&path, format!("#!/bin/sh\n{text}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

#[test]
fn what_cannot_replace_it_leaves_it_as_it_is() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Tcp, Cache::Writethrough), |cluster| {
        let point = cluster.mount(0);
        let served = Served::new(cluster, 0);
        let file = sys::open(&point.join("f"), MAKE)?;
        let serves = |what: &str| -> anyhow::Result<()> {
            file.write_all_at(what.as_bytes(), 0)?;
            file.sync_all()?;
            ensure!(
                fs::read(cluster.mount(1).join("f"))?.starts_with(what.as_bytes()),
                "{what}"
            );
            ensure!(!has_ended(served.process()?), "{what}: it has ended");
            Ok(())
        };
        let said = served.replace_in_vain(Some(Path::new("/bin/true")))?;
        ensure!(said.contains("the daemon of before goes on"), "{said}");
        serves("another program")?;
        let program = script(cluster, "exec /nonexistent/fsd")?;
        served.replace_in_vain(Some(&program))?;
        serves("no program")?;
        let settings = fs::read_to_string(cluster.config())?;
        fs::write(cluster.config(), "nonsense = 1")?;
        let said = served.replace_in_vain(None)?;
        ensure!(said.contains("nonsense"), "it does not say why: {said}");
        fs::write(
            cluster.config(),
            settings.replace("cluster = \"", "cluster = \"another-"),
        )?;
        let said = served.replace_in_vain(None)?;
        println!("another cluster: {said}");
        fs::write(cluster.config(), settings)?;
        serves("wrong settings")?;
        // One that has too few descriptors fails, at another place each time.
        let fsd = fsd_binary()?;
        let mut failed = 0;
        // Between those it tries for ten seconds to reach servers.
        for most in [12, 13].into_iter().chain(17..60) {
            let program = script(
                cluster,
                &format!("ulimit -n {most}; exec {} \"$@\"", fsd.display()),
            )?;
            let out = served.command(Some(&program))?;
            if out.status.success() {
                // It serves, and somebody else's test is whether it can go on.
                println!("{most} descriptors are enough");
                return end_of(cluster, &out.stdout);
            }
            failed += 1;
            println!("{most}: {}", String::from_utf8_lossy(&out.stderr).trim_end());
            serves(&format!("{most} descriptors"))?;
        }
        println!("{failed} have failed");
        Ok(())
    })
}

/// Ends what serves a mount, as `fsd replace` has said.
fn end_of(cluster: &Cluster, said: &[u8]) -> anyhow::Result<()> {
    let mut served = Served::new(cluster, 0);
    served.now = Some(number_in(&String::from_utf8_lossy(said))?);
    served.end()
}

#[test]
fn one_that_is_killed_meanwhile_leaves_it_as_it_is() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Shm, Cache::Writethrough), |cluster| {
        let point = cluster.mount(0);
        let fsd = fsd_binary()?;
        let mut killed = 0;
        for n in 0..40u64 {
            let delay = format!("0.{:03}", 2 + n % 20);
            let file = sys::open(&point.join("f"), MAKE)?;
            sys::lock(&file, libc::F_WRLCK, 0, 0, false)?;
            file.write_all_at(&n.to_le_bytes(), 0)?;
            let text = format!(
                "(sleep {delay}; kill -9 $$) >/dev/null 2>&1 </dev/null &\nexec {} \"$@\"",
                fsd.display()
            );
            let program = script(cluster, &text)?;
            let out = Served::new(cluster, 0).command(Some(&program))?;
            if out.status.success() {
                // It was killed when it served the mount, as any daemon may be.
                let successor = number_in(&String::from_utf8_lossy(&out.stdout))?;
                until("its end", || has_ended(successor))?;
                drop(file);
                cluster.kill_and_restart(Role::Mount(0))?;
                continue;
            }
            killed += 1;
            ensure!(sys::read_at(&file, 0, 8)? == n.to_le_bytes(), "what is open");
            file.write_all_at(&(n + 1).to_le_bytes(), 0)?;
            file.sync_all()?;
            let other = sys::open(&cluster.mount(1).join("f"), libc::O_RDWR)?;
            ensure!(
                sys::read_at(&other, 0, 8)? == (n + 1).to_le_bytes(),
                "the other mount"
            );
            let taken = sys::lock(&other, libc::F_WRLCK, 0, 0, false);
            ensure!(sys::errno(&taken) == libc::EAGAIN, "the lock is lost");
        }
        println!("{killed} of 40 were killed before they served");
        Ok(())
    })
}

/// The daemons that a keeper has.
fn children(keeper: Pid) -> Vec<Pid> {
    let pid = keeper.as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let numbers = children.split_whitespace().filter_map(|n| n.parse().ok());
    numbers.filter_map(Pid::from_raw).collect()
}

#[test]
fn a_mount_that_is_kept_stays_so() -> anyhow::Result<()> {
    let options = Options {
        keep: true,
        ..options(Fabric::Shm, Cache::Writethrough)
    };
    guard::with_cluster(options, |cluster| {
        let point = cluster.mount(0);
        let mut served = Served::new(cluster, 0);
        let keeper = served.process()?;
        let first = children(keeper);
        let file = sys::open(&point.join("f"), MAKE)?;
        file.write_all_at(b"before", 0)?;
        for _ in 0..2 {
            served.replace()?;
            let now = served.process()?;
            until("the successor to be kept", || children(keeper) == [now])?;
            ensure!(sys::read_at(&file, 0, 6)? == b"before", "what is open");
            file.sync_all()?;
        }
        let now = served.now.take().context("nobody")?;
        ensure!(!has_ended(keeper) && first != [now], "the keeper");
        kill_process(now, Signal::KILL)?;
        until("another life", || {
            children(keeper).first().is_some_and(|pid| *pid != now)
                && fs::read(point.join("f")).is_ok_and(|found| found == b"before")
        })?;
        ensure!(sys::errno(&file.sync_all()) == libc::ENOTCONN, "of a former life");
        // That one can be replaced as well, and the signal to the keeper ends who serves the mount then.
        served.replace()?;
        let now = served.now.take().context("nobody")?;
        cluster.end(Role::Mount(0))?;
        until("the end of the successor", || has_ended(now))?;
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        ensure!(!mounts.contains(&*point.to_string_lossy()), "it is still mounted");
        Ok(())
    })
}

/// What is stored to a shared mapping, and what others read of it.
#[test]
fn mappings_go_on() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Tcp, Cache::Writethrough), |cluster| {
        const LEN: usize = 16 << 12;
        let (point, other) = (cluster.mount(0), cluster.mount(1));
        let mut served = Served::new(cluster, 0);
        let file = sys::open(&point.join("f"), MAKE)?;
        file.set_len(LEN as u64)?;
        let map = sys::Map::writable(&file, LEN)?;
        for round in 1..=5u8 {
            map.write(0, &[round; LEN / 2]);
            served.replace()?;
            ensure!(map.read(0, LEN / 2) == [round; LEN / 2], "before it was replaced");
            map.write(LEN / 2, &[round; LEN / 2]);
            ensure!(map.read(0, LEN) == [round; LEN], "after it was replaced");
            map.sync(libc::MS_SYNC)?;
            ensure!(fs::read(other.join("f"))? == [round; LEN], "elsewhere");
            // A new file can be mapped at once, though the one before has not left yet.
            let new = sys::open(&point.join(format!("new{round}")), MAKE)?;
            new.set_len(4096)?;
            sys::Map::writable(&new, 4096).context("a new file")?;
        }
        drop((map, file));
        served.end()
    })
}

/// How long nobody serves the kernel where that knows many inodes, and has many files open; printed.
#[test]
fn a_mount_that_knows_many_inodes() -> anyhow::Result<()> {
    const FILES: usize = 20_000;
    const OPEN: usize = 500;
    guard::with_cluster(options(Fabric::Tcp, Cache::Writethrough), |cluster| {
        let point = cluster.mount(0);
        let mut served = Served::new(cluster, 0);
        fs::create_dir(point.join("d"))?;
        let name = |n: usize| point.join("d").join(format!("f{n}"));
        let mut open = Vec::new();
        for n in 0..FILES {
            let file = sys::open(&name(n), MAKE)?;
            if n % (FILES / OPEN) == 0 {
                file.write_all_at(format!("{n:09}").as_bytes(), 0)?;
                open.push((n, file));
            }
        }
        for _ in 0..3 {
            served.replace()?;
            for (n, file) in &open {
                ensure!(sys::read_at(file, 0, 9)? == format!("{n:09}").as_bytes(), "{n}");
            }
            ensure!(fs::read_dir(point.join("d"))?.count() == FILES);
        }
        drop(open);
        tell_passes(cluster)?;
        served.end()
    })
}
