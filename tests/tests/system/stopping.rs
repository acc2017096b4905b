//! Orderly ends in any order.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::ensure;
use rustix::process::{Pid, Signal, kill_process};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::guard;

fn options(fabric: Fabric) -> Options {
    Options {
        fabric,
        cache: Cache::Writethrough,
        storage: 1,
        pool_mib: 16,
        ..Options::default()
    }
}

fn servers_end(cluster: &Cluster) -> anyhow::Result<()> {
    cluster.end(Role::Storage(0))?;
    cluster.end(Role::Meta)
}

/// Half as long as a mount waits for servers that may come back.
const SOON: Duration = Duration::from_secs(8);

#[test]
fn mounts_end_after_their_servers_and_are_not_waited_for() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster(options(fabric), |cluster| {
            let (a, b) = (cluster.mount(0).join("f"), cluster.mount(1).join("f"));
            fs::write(&a, b"text")?;
            ensure!(fs::read(&b)? == b"text");
            File::open(&a)?.sync_all()?;
            servers_end(cluster)?;
            for mount in [0, 1] {
                let begun = Instant::now();
                cluster.end(Role::Mount(mount))?;
                ensure!(
                    begun.elapsed() < SOON,
                    "mount {mount} took {:?} to end",
                    begun.elapsed()
                );
            }
            let begun = Instant::now();
            cluster.start_all()?;
            ensure!(begun.elapsed() < SOON, "it took {:?} to start", begun.elapsed());
            ensure!(fs::read(&b)? == b"text");
            fs::write(&b, b"more")?;
            Ok(())
        })?;
    }
    Ok(())
}

/// What is not stored keeps a mount until its servers are back.
#[test]
fn a_mount_with_unstored_data_waits_for_its_servers() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Tcp), |cluster| {
        let path = cluster.mount(0).join("f");
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)?;
        file.write_all_at(b"old text", 0)?;
        file.sync_all()?;
        servers_end(cluster)?;
        file.write_all_at(b"new", 0)?;
        drop(file);
        let pid = cluster
            .pid(Role::Mount(0))
            .and_then(|pid| Pid::from_raw(pid as i32));
        pid.map_or(Ok(()), |pid| kill_process(pid, Signal::TERM))?;
        std::thread::sleep(Duration::from_secs(4));
        ensure!(
            pid.is_some_and(|pid| rustix::process::test_kill_process(pid).is_ok()),
            "it has ended with unstored data"
        );
        cluster.start_role(Role::Storage(0))?;
        cluster.start_role(Role::Meta)?;
        let status = cluster.wait(Role::Mount(0), Duration::from_secs(30))?;
        ensure!(status.success(), "{status}");
        cluster.start_role(Role::Mount(0))?;
        ensure!(fs::read(&path)? == b"new text", "{:?}", fs::read(&path)?);
        Ok(())
    })
}
