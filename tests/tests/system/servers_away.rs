//! A server is away for longer than an answer is waited for: programs wait, can be killed, and go on by themselves when it is back; with
//! `mount.hard_ms` they get an error after that time.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::guard;

/// Longest wait for an answer and for a lease: the server is away for several times as long.
const ANSWER: Duration = Duration::from_millis(500);
const LIMIT: Duration = Duration::from_secs(60);

/// What programs do, each in the folder of a mount, with a file `old` that the other mount has written, and a directory.
const PROGRAMS: [&str; 9] = [
    "echo $PPID > new-$1 && sync new-$1",
    "cat old > /dev/null",
    "echo more >> old && sync old",
    "dd if=/dev/zero of=large-$1 bs=1M count=2 conv=fsync status=none",
    "mkdir dir/made-$1",
    "mv dir/away-$1 dir/moved-$1",
    "ls dir > /dev/null && stat old > /dev/null",
    "flock old true",
    "rm -f dir/gone-$1 && sync dir",
];

fn options(fabric: Fabric, cache: Cache, hard: Option<Duration>) -> Options {
    Options {
        fabric,
        cache,
        hard,
        timeout: ANSWER,
        lease_wait: ANSWER,
        term: Duration::from_secs(2),
        ..Options::default()
    }
}

/// A program that is killed, and waited for, whatever becomes of the test.
struct Program {
    what: &'static str,
    child: Child,
}

impl Program {
    /// The shell goes into the directory by itself: were it done before it is executed (`current_dir`), this thread would wait along
    /// with it for the server that is away, which only this thread starts again.
    fn start(dir: &Path, what: &'static str, tag: &str) -> anyhow::Result<Self> {
        let child = Command::new("sh")
            .args(["-c", &format!("cd \"$DIR\" || exit; {what}"), "sh", tag])
            .env("DIR", dir)
            .process_group(0)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self { what, child })
    }

    fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Kills the shell and what it runs.
    fn kill(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            // It may have ended.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }

    /// Its end, within the limit.
    fn end(&mut self) -> anyhow::Result<std::process::ExitStatus> {
        let start = Instant::now();
        while !self.has_ended()? {
            ensure!(start.elapsed() < LIMIT, "still waits: {}", self.what);
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(self.child.wait()?)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}

fn prepare(cluster: &Cluster, round: usize) -> anyhow::Result<()> {
    let dir = cluster.mount(0);
    fs::create_dir(dir.join("dir")).or_else(|error| if round > 0 { Ok(()) } else { Err(error) })?;
    for mount in 0..2 {
        fs::write(dir.join(format!("dir/away-{round}-{mount}")), "x")?;
        fs::write(dir.join(format!("dir/gone-{round}-{mount}")), "x")?;
    }
    fs::write(dir.join("old"), vec![b'x'; 300_000])?;
    fs::File::open(dir.join("old"))?.sync_all()?;
    // The other mount has looked at everything.
    Command::new("ls")
        .arg("-lR")
        .arg(cluster.mount(1))
        .stdout(Stdio::null())
        .status()
        .map(drop)
        .map_err(Into::into)
}

/// Everything on both mounts.
fn start_all(cluster: &Cluster, round: usize) -> anyhow::Result<Vec<Program>> {
    let mut programs = Vec::new();
    for mount in 0..2 {
        for what in PROGRAMS {
            programs.push(Program::start(
                &cluster.mount(mount),
                what,
                &format!("{round}-{mount}"),
            )?);
        }
    }
    Ok(programs)
}

fn check(cluster: &Cluster, round: usize) -> anyhow::Result<()> {
    for seen in 0..2 {
        let dir = cluster.mount(seen);
        for mount in 0..2 {
            let tag = format!("{round}-{mount}");
            ensure!(fs::metadata(dir.join(format!("large-{tag}")))?.len() == 2 << 20);
            ensure!(!fs::read(dir.join(format!("new-{tag}")))?.is_empty());
            ensure!(dir.join(format!("dir/made-{tag}")).is_dir());
            ensure!(dir.join(format!("dir/moved-{tag}")).is_file());
            ensure!(!dir.join(format!("dir/gone-{tag}")).exists());
        }
        let old = fs::read(dir.join("old"))?;
        ensure!(old.len() == 300_010, "{} bytes", old.len());
    }
    Ok(())
}

fn programs_wait(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    guard::with_cluster(options(fabric, cache, None), |cluster| {
        for (round, role) in [Role::Meta, Role::Storage(0), Role::Storage(1)]
            .into_iter()
            .enumerate()
        {
            prepare(cluster, round)?;
            cluster.kill(role);
            let mut programs = start_all(cluster, round)?;
            std::thread::sleep(ANSWER * 10);
            let mut waiting = 0;
            for program in &mut programs {
                // What it needs was here.
                if program.has_ended()? {
                    let status = program.end()?;
                    ensure!(status.success(), "{status} without {role:?}: {}", program.what);
                } else {
                    waiting += 1;
                }
            }
            ensure!(waiting > 0, "nobody needed {role:?}");
            cluster.start_role(role)?;
            for mut program in programs {
                let status = program.end()?;
                ensure!(
                    status.success(),
                    "{status} when {role:?} was back: {}",
                    program.what
                );
            }
            check(cluster, round).with_context(|| format!("after {role:?} was away"))?;
        }
        Ok(())
    })
}

#[test]
fn programs_wait_for_servers_over_tcp() -> anyhow::Result<()> {
    programs_wait(Fabric::Tcp, Cache::Writethrough)
}

#[test]
fn programs_wait_for_servers_on_shared_memory() -> anyhow::Result<()> {
    programs_wait(Fabric::Shm, Cache::Direct)
}

/// Inodes in use: one whose last name is gone stays while it is open somewhere.
fn inodes(cluster: &Cluster) -> anyhow::Result<u64> {
    let space = rustix::fs::statvfs(cluster.mount(0))?;
    Ok(space.f_files - space.f_ffree)
}

fn programs_are_killed(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    guard::with_cluster(options(fabric, cache, None), |cluster| {
        for (round, role) in [Role::Meta, Role::Storage(0)].into_iter().enumerate() {
            let before = inodes(cluster)?;
            prepare(cluster, round)?;
            cluster.kill(role);
            let mut programs = start_all(cluster, round)?;
            std::thread::sleep(ANSWER * 4);
            let mut killed = 0;
            for program in &mut programs {
                if !program.has_ended()? {
                    program.kill();
                }
            }
            for program in &mut programs {
                let status = program
                    .end()
                    .with_context(|| format!("killed without {role:?}"))?;
                killed += usize::from(!status.success() || status.signal().is_some());
            }
            ensure!(killed > 0, "nobody needed {role:?}");
            cluster.start_role(role)?;
            // Nothing is left of them that would be in the way.
            for mount in 0..2 {
                let dir = cluster.mount(mount);
                for what in ["flock old true", "cat old > /dev/null", "ls dir > /dev/null"] {
                    let status = Program::start(&dir, what, "")?.end()?;
                    ensure!(status.success(), "{status} after {role:?} was away: {what}");
                }
            }
            // What they had asked for may still be done, and is then removed.
            let start = Instant::now();
            while {
                let removed = Program::start(&cluster.mount(0), "rm -rf *", "")?.end()?;
                ensure!(removed.success(), "{removed} after {role:?} was away: rm -rf *");
                inodes(cluster)? != before
            } {
                ensure!(
                    start.elapsed() < LIMIT,
                    "{before} inodes before, {} after: files stay open",
                    inodes(cluster)?
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    })
}

#[test]
fn programs_that_wait_for_servers_can_be_killed_over_tcp() -> anyhow::Result<()> {
    programs_are_killed(Fabric::Tcp, Cache::Writethrough)
}

#[test]
fn programs_that_wait_for_servers_can_be_killed_on_shared_memory() -> anyhow::Result<()> {
    programs_are_killed(Fabric::Shm, Cache::Direct)
}

#[test]
fn programs_get_an_error_after_a_time() -> anyhow::Result<()> {
    let hard = Some(Duration::from_secs(1));
    guard::with_cluster(options(Fabric::Tcp, Cache::Writethrough, hard), |cluster| {
        for (round, role) in [Role::Meta, Role::Storage(0)].into_iter().enumerate() {
            prepare(cluster, round)?;
            cluster.kill(role);
            let mut failed = 0;
            for mut program in start_all(cluster, round)? {
                failed += usize::from(!program.end()?.success());
            }
            ensure!(failed > 0, "nobody needed {role:?}");
            cluster.start_role(role)?;
            let mut again = start_all(cluster, round + 10)?;
            // There is nothing to be moved.
            again.retain(|program| !program.what.starts_with("mv"));
            for mut program in again {
                let status = program.end()?;
                ensure!(
                    status.success(),
                    "{status} when {role:?} was back: {}",
                    program.what
                );
            }
        }
        Ok(())
    })
}
