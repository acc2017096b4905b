//! Files that one mount alone has open: nothing of that is said to anybody until another mount could ask, and then it is known.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Duration;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::guard;

const LIMIT: Duration = Duration::from_secs(120);
const TERM: Duration = Duration::from_secs(2);
/// So long, and longer, an inode is kept that was looked up a moment ago, whether anybody has it open or not.
const KEPT: Duration = Duration::from_secs(3);
/// So long after they were written, and a little longer, data are in their mount's memory alone.
const STORED: Duration = Duration::from_secs(4);

fn options(fabric: Fabric, mounts: usize) -> Options {
    Options {
        fabric,
        cache: Cache::Direct,
        mounts,
        term: TERM,
        ..Options::default()
    }
}

fn orphans(cluster: &Cluster) -> anyhow::Result<u64> {
    let status = cluster.status()?;
    status["meta"]["Ok"]["orphans"].as_u64().context("no such number")
}

/// A new file that mount 0 has open, and nobody else has had.
fn open_new(cluster: &Cluster, name: &str) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(cluster.mount(0).join(name))?;
    file.write_all_at(name.as_bytes(), 0)?;
    Ok(file)
}

/// It has no name, and is what it was and can be changed; and is gone with its last close.
fn lives_until_closed(cluster: &Cluster, file: File, name: &str) -> anyhow::Result<()> {
    std::thread::sleep(KEPT);
    ensure!(file.metadata()?.nlink() == 0, "{name} has a name");
    let mut content = vec![0; name.len()];
    file.read_exact_at(&mut content, 0)?;
    ensure!(content == name.as_bytes(), "{name} contains {content:?}");
    file.write_all_at(b"later", 100_000)?;
    ensure!(file.metadata()?.len() == 100_005, "{name} does not grow");
    drop(file);
    guard::until("the file to be removed", LIMIT / 4, || Ok(orphans(cluster)? == 0)).map(drop)
}

fn removed_elsewhere(fabric: Fabric) -> anyhow::Result<()> {
    guard::with_cluster_within(LIMIT, options(fabric, 2), |cluster| {
        let far = |name: &str| cluster.mount(1).join(name);
        let removed = open_new(cluster, "removed")?;
        fs::remove_file(far("removed"))?;
        lives_until_closed(cluster, removed, "removed")?;

        let replaced = open_new(cluster, "replaced")?;
        fs::write(far("other"), b"another")?;
        fs::rename(far("other"), far("replaced"))?;
        lives_until_closed(cluster, replaced, "replaced")?;
        ensure!(fs::read(cluster.mount(0).join("replaced"))? == b"another");

        // Closed and opened again under the same lease.
        drop(open_new(cluster, "again")?);
        for _ in 0..3 {
            drop(File::open(cluster.mount(0).join("again"))?);
        }
        let again = OpenOptions::new()
            .read(true)
            .write(true)
            .open(cluster.mount(0).join("again"))?;
        fs::remove_file(far("again"))?;
        lives_until_closed(cluster, again, "again")
    })
}

#[test]
fn a_file_that_another_mount_removes_lives_while_open() -> anyhow::Result<()> {
    removed_elsewhere(Fabric::Shm)?;
    removed_elsewhere(Fabric::Tcp)
}

#[test]
fn what_its_mount_removes_lives_while_open_though_another_mount_dies() -> anyhow::Result<()> {
    guard::with_cluster_within(LIMIT, options(Fabric::Tcp, 2), |cluster| {
        let file = open_new(cluster, "file")?;
        fs::write(cluster.mount(1).join("theirs"), b"something")?;
        fs::remove_file(cluster.mount(0).join("file"))?;
        cluster.kill(Role::Mount(1));
        guard::until("the dead mount's file", LIMIT / 4, || {
            Ok(OpenOptions::new()
                .write(true)
                .open(cluster.mount(0).join("theirs"))
                .is_ok())
        })?;
        // Orphans are looked at once more a term after a recovery.
        std::thread::sleep(TERM * 2);
        ensure!(orphans(cluster)? == 1, "{} orphans", orphans(cluster)?);
        lives_until_closed(cluster, file, "file")
    })
}

#[test]
fn making_and_opening_files_asks_nobody() -> anyhow::Result<()> {
    const FILES: u64 = 600;
    guard::with_cluster_within(LIMIT, options(Fabric::Tcp, 1), |cluster| {
        let dir = cluster.mount(0).join("dir");
        fs::create_dir(&dir)?;
        // Leases of new inodes are asked for many together, and what changed is told many together.
        let old = |n: u64| dir.join(n.to_string());
        let new = |n: u64| dir.join(format!("{n}a"));
        cluster.messages_below(0.5, "created", FILES, |n| {
            File::create(old(n)).map(drop).map_err(Into::into)
        })?;
        cluster.messages_below(0.1, "opened", FILES, |n| {
            File::open(old(n)).map(drop).map_err(Into::into)
        })?;
        cluster.messages_below(0.3, "renamed", FILES, |n| Ok(fs::rename(old(n), new(n))?))?;
        cluster.messages_below(0.5, "removed", FILES, |n| Ok(fs::remove_file(new(n))?))
    })
}

/// Files that this mount has made, and those two have read.
fn read_by_two(cluster: &Cluster, files: u64) -> anyhow::Result<()> {
    for n in 0..files {
        let file = File::create(cluster.mount(0).join(n.to_string()))?;
        file.write_all_at(&n.to_le_bytes(), 0)?;
    }
    File::open(cluster.mount(0))?.sync_all()?;
    for mount in [1, 0] {
        for n in 0..files {
            let content = fs::read(cluster.mount(mount).join(n.to_string()))?;
            ensure!(
                content == n.to_le_bytes(),
                "file {n} on mount {mount}: {content:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn reading_what_others_read_asks_nobody() -> anyhow::Result<()> {
    const FILES: u64 = 100;
    guard::with_cluster_within(LIMIT, options(Fabric::Tcp, 2), |cluster| {
        read_by_two(cluster, FILES)?;
        let path = |n: u64| cluster.mount(n as usize % 2).join((n / 2 % FILES).to_string());
        cluster.messages_below(0.1, "opened, read and closed", FILES * 20, |n| {
            let content = fs::read(path(n))?;
            ensure!(content == (n / 2 % FILES).to_le_bytes(), "{content:?}");
            Ok(())
        })
    })
}

#[test]
fn the_contents_of_a_small_file_come_when_it_is_opened() -> anyhow::Result<()> {
    const SIZE: usize = 5000;
    let options = Options {
        storage: 1,
        // The file is not to be taken for one of a mount that is cut off.
        term: Duration::from_secs(20),
        ..options(Fabric::Tcp, 2)
    };
    guard::with_cluster_within(LIMIT, options, |cluster| {
        let (near, far) = (cluster.mount(0).join("small"), cluster.mount(1).join("small"));
        fs::write(&near, [7; SIZE])?;
        File::open(&near)?.sync_all()?;
        // What it has not seen of a file comes with its name.
        ensure!(far.metadata()?.len() == SIZE as u64);
        let file = File::open(&far)?;
        let stopped = cluster.stopped(Role::Storage(0))?;
        let (read, done) = std::sync::mpsc::channel();
        let reader = std::thread::spawn(move || {
            let mut content = [0; SIZE];
            let _ = read.send(file.read_exact_at(&mut content, 0).map(|()| content));
        });
        let content = done.recv_timeout(Duration::from_secs(8));
        drop(stopped);
        ensure!(
            reader.join().is_ok() && content.context("it waits for the storage node")?? == [7; SIZE],
            "other contents"
        );
        Ok(())
    })
}

#[test]
fn who_only_reads_is_known_to_who_removes_or_writes() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster_within(LIMIT, options(fabric, 3), move |cluster| {
            read_by_two(cluster, 4)?;
            let open = |mount: usize, n: u64| File::open(cluster.mount(mount).join(n.to_string()));
            // Open on one that has made it, on one that has only read it, on both; and on one that had another before.
            let held = [open(0, 0)?, open(1, 1)?, open(0, 2)?, open(1, 2)?, open(1, 3)?];
            drop(open(1, 3)?);
            for n in 0..4 {
                fs::remove_file(cluster.mount(2).join(n.to_string()))?;
            }
            std::thread::sleep(KEPT);
            for (file, n) in held.iter().zip([0u64, 1, 2, 2, 3]) {
                let mut content = [0; 8];
                file.read_exact_at(&mut content, 0)?;
                ensure!(content == n.to_le_bytes(), "file {n}: {content:?}");
                ensure!(file.metadata()?.nlink() == 0, "file {n} has a name");
            }
            ensure!(orphans(cluster)? == 4, "{} orphans", orphans(cluster)?);
            drop(held);
            guard::until(
                "the files to be removed",
                LIMIT / 4,
                || Ok(orphans(cluster)? == 0),
            )
            .map(drop)
        })?;
    }
    Ok(())
}

#[test]
fn small_files_are_stored_together() -> anyhow::Result<()> {
    const FILES: u64 = 600;
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster_within(LIMIT, options(fabric, 2), move |cluster| {
            let path = |mount: usize, n: u64| cluster.mount(mount).join(n.to_string());
            let content = |n: u64| n.to_le_bytes().repeat(512 + n as usize % 300);
            let before = cluster.total("messages")?;
            (0..FILES).try_for_each(|n| fs::write(path(0, n), content(n)))?;
            // Asking for the status costs messages, too.
            std::thread::sleep(STORED);
            guard::until("all to be stored", LIMIT / 4, || {
                Ok(cluster.total("dirty_files")? == 0)
            })?;
            let each = (cluster.total("messages")? - before) as f64 / FILES as f64;
            println!("{each:.3} messages and batches of operations each");
            ensure!(each < 0.5, "{each} messages and batches of operations each");
            for n in 0..FILES {
                ensure!(fs::read(path(1, n))? == content(n), "file {n}");
            }
            Ok(())
        })?;
    }
    Ok(())
}
