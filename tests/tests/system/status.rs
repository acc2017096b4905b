//! What `fsd status` says where something is wrong.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::{Pid, Signal, kill_process};
use system_tests::cluster::{Cluster, Fabric, Options, Role};
use system_tests::guard;
use system_tests::sys;

fn problems(cluster: &Cluster) -> anyhow::Result<Vec<String>> {
    let status = cluster.status()?;
    let problems: Vec<String> = serde_json::from_value(status["problems"].clone())?;
    ensure!(status["healthy"] == problems.is_empty(), "{status}");
    Ok(problems)
}

/// Waits until there is a problem with all these words, or none at all.
fn wait_for(cluster: &Cluster, words: &[&str]) -> anyhow::Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let all = problems(cluster)?;
        let found = if words.is_empty() {
            all.is_empty()
        } else {
            all.iter().any(|p| words.iter().all(|word| p.contains(word)))
        };
        if found {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "no {words:?} among {all:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// How long an answer is waited for where some do not come.
const ANSWER: Duration = Duration::from_secs(3);

fn stopped(cluster: &Cluster, role: Role, signal: Signal) -> anyhow::Result<()> {
    let pid = cluster.pid(role).and_then(|pid| Pid::from_raw(pid as i32));
    Ok(pid.map_or(Ok(()), |pid| kill_process(pid, signal))?)
}

fn has_thread(pid: u32, name: &str) -> anyhow::Result<bool> {
    let named = |task: std::io::Result<fs::DirEntry>| {
        let comm = fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        (comm.trim() == name).then_some(())
    };
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?
        .find_map(named)
        .is_some())
}

/// A mount that is asked looks whether the servers are there, which takes long where one is silent. It goes on meanwhile.
#[test]
fn who_is_asked_goes_on() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        mounts: 1,
        storage: 2,
        timeout: ANSWER,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        // One whose record and data the other storage node has.
        let near = (0..).find_map(|n| {
            let file = File::create_new(cluster.mount(0).join(format!("file{n}"))).ok()?;
            (file.metadata().ok()?.ino() >> 36 & 0xff == 0).then_some(file)
        });
        let file = near.context("a file")?;
        file.write_all_at(&[1; 4096], 0)?;
        let mount = cluster.pid(Role::Mount(0)).context("a mount")?;
        stopped(cluster, Role::Storage(1), Signal::STOP)?;
        std::thread::scope(|scope| {
            let status = scope.spawn(|| cluster.status());
            let asks = || has_thread(mount, "probe");
            guard::until("the mount to look for the servers", ANSWER * 10, asks)?;
            for _ in 0..3 {
                file.write_all_at(&[2; 4096], 0)?;
                ensure!(has_thread(mount, "fsd-status")?, "a write has waited for it");
            }
            stopped(cluster, Role::Storage(1), Signal::CONT)?;
            let told = status.join().map_err(|_| anyhow::anyhow!("it panicked"))?;
            told.map(drop)
        })
    })
}

#[test]
fn full_pools_and_disks_are_not_healthy() -> anyhow::Result<()> {
    let options = Options {
        storage: 2,
        mounts: 1,
        pool_mib: 16,
        meta_disk_mib: Some(64),
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        ensure!(problems(cluster)?.is_empty(), "{:?}", problems(cluster)?);
        let big = cluster.mount(0).join("big");
        ensure!(fs::write(&big, vec![7; 64 << 20]).is_err(), "it fits");
        wait_for(cluster, &["storage node 0", "pool of 16MiB is full"])?;
        wait_for(cluster, &["storage node 1", "pool of 16MiB is full"])?;
        fs::remove_file(&big)?;
        wait_for(cluster, &[])?;
        let hog = cluster.path("meta").join("hog");
        let file = File::create(&hog)?;
        let mut taken = 0;
        while sys::fallocate(&file, 0, taken, 1 << 20).is_ok() {
            taken += 1 << 20;
        }
        wait_for(cluster, &["metadata server", "disk that holds", "is full"])?;
        drop(file);
        fs::remove_file(&hog)?;
        wait_for(cluster, &[])
    })
}

#[test]
fn who_cannot_be_reached_is_told() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        let options = Options {
            fabric,
            storage: 2,
            mounts: 1,
            pool_mib: 16,
            timeout: ANSWER,
            ..Options::default()
        };
        guard::with_cluster(options, |cluster| {
            wait_for(cluster, &[])?;
            stopped(cluster, Role::Storage(1), Signal::STOP)?;
            let seen = problems(cluster);
            stopped(cluster, Role::Storage(1), Signal::CONT)?;
            let seen = seen?;
            // By everybody who needs it.
            for who in [
                "storage node 1: no answer",
                "metadata server: storage node 1",
                "mount 0: storage node 1",
            ] {
                ensure!(seen.iter().any(|p| p.starts_with(who)), "no '{who}' in {seen:?}");
            }
            wait_for(cluster, &[])?;
            cluster.kill(Role::Storage(0));
            wait_for(cluster, &["metadata server: storage node 0", "cannot be reached"])?;
            cluster.start_role(Role::Storage(0))?;
            wait_for(cluster, &[])?;
            cluster.kill(Role::Meta);
            wait_for(cluster, &["metadata server: no answer"])?;
            cluster.start_role(Role::Meta)?;
            wait_for(cluster, &[])
        })?;
    }
    Ok(())
}

/// A mount that has died is told of as long as what it had cannot be taken back, because a storage node is away.
#[test]
fn a_recovery_that_waits_is_told() -> anyhow::Result<()> {
    let options = Options {
        storage: 2,
        pool_mib: 16,
        timeout: ANSWER,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        fs::write(cluster.mount(1).join("f"), b"x")?;
        stopped(cluster, Role::Storage(1), Signal::STOP)?;
        cluster.kill(Role::Mount(1));
        let waits = wait_for(cluster, &["recovery of mount 1", "waits for storage node 1"]);
        let told = fsd(cluster, &["status"])?;
        stopped(cluster, Role::Storage(1), Signal::CONT)?;
        waits?;
        let text = String::from_utf8_lossy(&told.stdout).into_owned();
        ensure!(told.status.code() == Some(1), "{}", told.status);
        ensure!(text.contains("NOT HEALTHY") && text.contains("is dead"), "{text}");
        wait_for(cluster, &[])?;
        let told = std::process::Command::new(system_tests::process::fsd_binary()?)
            .args(["status", "--config", "/nonexistent"])
            .output()?;
        ensure!(told.status.code() == Some(2), "{}", told.status);
        Ok(())
    })
}

/// A file that somebody waits for is told by name, and who has it.
#[test]
fn a_file_that_is_waited_for_is_told() -> anyhow::Result<()> {
    let options = Options {
        term: Duration::from_secs(60),
        timeout: ANSWER,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        fs::create_dir(cluster.mount(0).join("sub"))?;
        fs::write(cluster.mount(1).join("sub/wanted"), b"x")?;
        // Names are known here, the file's lease is there.
        fs::read_dir(cluster.mount(0).join("sub"))?.for_each(drop);
        stopped(cluster, Role::Mount(1), Signal::STOP)?;
        let mut reader = std::process::Command::new("cat")
            .arg(cluster.mount(0).join("sub/wanted"))
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let told = wait_for(
            cluster,
            &["mount 0: ", "sub/wanted: 1 requests have waited", "for mount 1"],
        );
        stopped(cluster, Role::Mount(1), Signal::CONT)?;
        let read = reader.wait()?;
        told?;
        ensure!(read.success(), "{read}");
        wait_for(cluster, &[])
    })
}

/// Case 8: an operator evicts a mount, and what it had is there for others at once.
#[test]
fn an_operator_evicts_a_mount() -> anyhow::Result<()> {
    guard::with_cluster(Options::default(), |cluster| {
        fs::write(cluster.mount(1).join("f"), b"x")?;
        File::open(cluster.mount(1).join("f"))?.sync_all()?;
        stopped(cluster, Role::Mount(1), Signal::STOP)?;
        let told = fsd(cluster, &["evict", "1"])?;
        let start = Instant::now();
        let read = fs::read(cluster.mount(0).join("f"));
        let waited = start.elapsed();
        stopped(cluster, Role::Mount(1), Signal::CONT)?;
        ensure!(told.status.success(), "{told:?}");
        ensure!(
            String::from_utf8_lossy(&told.stdout).contains("mount 1 is declared dead"),
            "{told:?}"
        );
        ensure!(read? == b"x" && waited < Duration::from_secs(5), "{waited:?}");
        // It begins anew by itself, and everything is well again.
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::read(cluster.mount(1).join("f")).ok().as_deref() != Some(b"x") {
            ensure!(Instant::now() < deadline, "the evicted mount does not come back");
            std::thread::sleep(Duration::from_millis(50));
        }
        wait_for(cluster, &[])?;
        let none = fsd(cluster, &["evict", "77"])?;
        ensure!(
            none.status.code() == Some(1)
                && String::from_utf8_lossy(&none.stderr).contains("there is no mount 77"),
            "{none:?}"
        );
        Ok(())
    })
}

/// Runs a command of `fsd` on the cluster.
fn fsd(cluster: &Cluster, args: &[&str]) -> anyhow::Result<std::process::Output> {
    Ok(std::process::Command::new(system_tests::process::fsd_binary()?)
        .args(args)
        .arg("--config")
        .arg(cluster.config())
        .output()?)
}
