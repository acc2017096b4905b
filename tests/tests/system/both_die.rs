//! A host is gone that ran a mount and a storage node: only what they had is blocked, until the storage node is back.

use std::fs::{self, File, OpenOptions, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::guard;

const LIMIT: Duration = Duration::from_secs(120);
const TERM: Duration = Duration::from_secs(2);
const FILES: usize = 24;

/// The storage node that has the lease record of an inode (fsd/proto/src/ino.rs).
fn shard(ino: u64) -> u64 {
    ino >> 36 & 0xff
}

fn file(n: usize) -> String {
    format!("file-{n}")
}

fn until(what: &str, holds: impl FnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    guard::until(what, LIMIT / 3, holds).map(drop)
}

/// A change that needs the exclusive lease of each of these files, on one mount after the other.
fn hand_around(cluster: &Cluster, names: &[String], mounts: [usize; 2]) -> anyhow::Result<()> {
    for round in 0..3 {
        for mount in mounts {
            let mode = 0o600 + round * 0o11;
            for name in names {
                let path = cluster.mount(mount).join(name);
                fs::set_permissions(&path, Permissions::from_mode(mode)).context(name.clone())?;
            }
            for name in names {
                let seen = fs::metadata(cluster.mount(mounts[1]).join(name))?.mode() & 0o777;
                ensure!(seen == mode, "{name} has the mode {seen:o}, not {mode:o}");
            }
        }
    }
    Ok(())
}

fn both_die(fabric: Fabric) -> anyhow::Result<()> {
    let options = Options {
        fabric,
        cache: Cache::Direct,
        mounts: 3,
        term: TERM,
        ..Options::default()
    };
    guard::with_cluster_within(LIMIT, options, |cluster| {
        let [dead, first, second] = [0, 1, 2];
        let mut near = Vec::new();
        for n in 0..FILES {
            let path = cluster.mount(first).join(file(n));
            fs::write(&path, "old")?;
            File::open(&path)?.sync_all()?;
            if shard(fs::metadata(&path)?.ino()) == 0 {
                near.push(file(n));
            }
        }
        ensure!(near.len() > 2, "{} files of {FILES}", near.len());
        // The one that dies has one of them, changed since.
        let theirs: PathBuf = near.pop().context("no file")?.into();
        let open = OpenOptions::new()
            .write(true)
            .open(cluster.mount(dead).join(&theirs))?;
        open.write_all_at(b"new, and longer", 0)?;

        cluster.kill(Role::Storage(1));
        cluster.kill(Role::Mount(dead));
        until("the recovery to wait for the storage node", || {
            let status = cluster.status()?.to_string();
            Ok(status.contains("waits for storage node 1"))
        })?;
        hand_around(cluster, &near, [first, second])?;
        // What the dead mount had is nobody else's before it is kept out of both storage nodes.
        let blocked = cluster.mount(second).join(&theirs);
        let reader = std::thread::spawn(move || fs::read(blocked));
        std::thread::sleep(TERM);
        ensure!(
            !reader.is_finished(),
            "a file of the dead is given away: {:?}",
            reader.join()
        );

        cluster.start_role(Role::Storage(1))?;
        let read = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        ensure!(read == b"old" || read.starts_with(b"new"), "{read:?}");
        until("the recovery to end", || {
            Ok(!cluster.status()?.to_string().contains("recovery of"))
        })?;
        drop(open);
        cluster.start_role(Role::Mount(dead))?;
        let all: Vec<String> = (0..FILES).map(file).collect();
        hand_around(cluster, &all, [dead, second])
    })
}

/// Case 27.
#[test]
fn a_storage_node_and_a_mount_die_together() -> anyhow::Result<()> {
    both_die(Fabric::Tcp)?;
    both_die(Fabric::Shm)
}
