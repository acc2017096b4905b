//! A mount is stopped in the middle of what it does over shared memory, and declared dead, after the storage node's process that it is
//! connected to was killed: the next process shuts it out, though it has never seen it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;
use rustix::process::Signal;
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role, nodes};
use system_tests::guard;

const LIMIT: Duration = Duration::from_secs(180);
const TERM: Duration = Duration::from_secs(2);
const LEN: usize = 8 << 20;
const FILES: usize = 4;
/// A mount is seldom stopped between two operations where it does nothing else, but it may be.
const ROUNDS: usize = 6;

/// A program that overwrites a file, in a process of its own: who is killed here must not wait for a mount that is stopped.
struct Writer(Child);

impl Writer {
    fn start(bytes: &Path, file: &Path) -> anyhow::Result<Self> {
        let child = Command::new("sh")
            .args([
                "-c",
                "while dd if=$0 of=$1 bs=1M conv=notrunc status=none; do :; done",
            ])
            .args([bytes, file])
            .process_group(0)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        Ok(Self(child))
    }

    /// It begins nothing more; what it is waiting for is with its mount.
    fn kill(&self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.0.id() as i32) {
            // It may have ended.
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.kill();
        let _ = self.0.wait();
    }
}

/// The mounts there are.
fn mounts(cluster: &Cluster) -> anyhow::Result<usize> {
    Ok(nodes(&cluster.status()?)?.len())
}

fn round(cluster: &Cluster, round: usize) -> anyhow::Result<()> {
    let (old, new) = (cluster.path("old"), vec![100 + round as u8; LEN]);
    fs::write(&old, vec![round as u8 + 1; LEN])?;
    let of = |mount, n| cluster.mount(mount).join(format!("file{round}-{n}"));
    let writers = (0..FILES)
        .map(|n| {
            fs::write(of(0, n), vec![0; LEN])?;
            File::open(of(0, n))?.sync_all()?;
            Writer::start(&old, &of(0, n))
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    std::thread::sleep(Duration::from_millis(300));
    cluster.signal(Role::Mount(0), Signal::STOP)?;
    cluster.kill_and_restart(Role::Storage(0))?;
    writers.iter().for_each(Writer::kill);
    // Waits until the other mount is dead, and what it had is free.
    let files = (0..FILES)
        .map(|n| {
            let file = OpenOptions::new().read(true).write(true).open(of(1, n))?;
            file.write_all_at(&new, 0)?;
            file.sync_all()?;
            Ok(file)
        })
        .collect::<anyhow::Result<Vec<_>>>()?;
    // It is no more, or cannot do anything.
    let _ = cluster.signal(Role::Mount(0), Signal::CONT);
    let end = Instant::now() + Duration::from_secs(1);
    let mut bytes = vec![0; LEN];
    while Instant::now() < end {
        for file in &files {
            file.read_exact_at(&mut bytes, 0)?;
            let late = bytes.iter().zip(&new).position(|(a, b)| a != b);
            ensure!(
                late.is_none(),
                "round {round}: byte {late:?} of what was fsynced was overwritten by a mount that was declared dead before"
            );
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(writers);
    // Whether it was ended or has begun anew.
    cluster.kill(Role::Mount(0));
    let waiting = Instant::now();
    while mounts(cluster)? > 1 {
        ensure!(
            waiting.elapsed() < LIMIT / 3,
            "a mount that was killed is not declared dead"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.start_role(Role::Mount(0))?;
    ensure!(fs::read(of(0, 0))? == new, "the next life sees something else");
    Ok(())
}

#[test]
fn a_mount_that_was_connected_to_a_former_process_is_shut_out() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Shm,
        cache: Cache::Direct,
        storage: 1,
        pool_mib: 512,
        term: TERM,
        ..Options::default()
    };
    guard::with_cluster_within(LIMIT, options, |cluster| {
        (0..ROUNDS).try_for_each(|n| round(cluster, n))?;
        // Nothing is left of the connections that are no more.
        let left = fs::read_dir(cluster.memory())?.filter_map(Result::ok);
        let seats = left
            .filter(|e| e.file_name().to_string_lossy().contains(".seats."))
            .count();
        ensure!(seats < 20, "{seats} seats are left");
        Ok(())
    })
}
