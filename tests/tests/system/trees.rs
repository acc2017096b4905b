//! What a mount asks for that goes through what another has made: counted, never timed.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Fabric, Options};
use system_tests::guard;

const LIMIT: Duration = Duration::from_secs(20);
/// More than are asked for ahead at once.
const FILES: usize = 60;

fn options(fabric: Fabric) -> Options {
    Options {
        fabric,
        storage: 2,
        ..Options::default()
    }
}

fn name(n: usize) -> String {
    format!("file{n:02}")
}

/// A directory of small files that mount 0 has made.
fn make(cluster: &Cluster) -> anyhow::Result<()> {
    let dir = cluster.mount(0).join("d");
    fs::create_dir(&dir)?;
    (0..FILES).try_for_each(|n| Ok(fs::write(dir.join(name(n)), vec![n as u8; 3000 + n])?))
}

/// Has it stored.
fn store(cluster: &Cluster) -> anyhow::Result<()> {
    let dir = cluster.mount(0).join("d");
    (0..FILES).try_for_each(|n| File::open(dir.join(name(n)))?.sync_all())?;
    Ok(File::open(&dir)?.sync_all()?)
}

/// Requests that the metadata server has answered, and the storage nodes.
fn requests(cluster: &Cluster) -> anyhow::Result<(u64, u64)> {
    let status = cluster.status()?;
    let meta = status["meta"]["Ok"]["requests"].as_u64();
    let nodes = status["storage"].as_array().context("storage nodes")?;
    let storage = nodes.iter().map(|node| node[1]["Ok"]["requests"].as_u64());
    let storage: Option<u64> = storage.sum();
    Ok((
        meta.context("requests of the metadata server")?,
        storage.context("requests of storage nodes")?,
    ))
}

/// Leases that a mount holds.
fn held(cluster: &Cluster, mount: usize, mode: &str) -> anyhow::Result<u64> {
    let status = cluster.status()?;
    status["mounts"][mount][1]["Ok"][mode]
        .as_u64()
        .with_context(|| format!("{mode} leases of mount {mount}"))
}

fn check(dir: &Path, n: usize) -> anyhow::Result<()> {
    let found = fs::read(dir.join(name(n)))?;
    ensure!(found == vec![n as u8; 3000 + n], "{} has other contents", name(n));
    Ok(())
}

#[test]
fn names_and_places_do_not_cost_a_request_each() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster(options(fabric), |cluster| {
            make(cluster)?;
            store(cluster)?;
            let dir = cluster.mount(1).join("d");
            let before = requests(cluster)?;
            // By path, backwards: nothing is listed, and nothing foreseen.
            (0..FILES).rev().try_for_each(|n| check(&dir, n))?;
            let after = requests(cluster)?;
            let asked = (after.0 - before.0, after.1 - before.1);
            let few = FILES as u64 / 2;
            ensure!(
                asked.0 < few,
                "{} requests for the names of {FILES} files",
                asked.0
            );
            ensure!(
                asked.1 < few,
                "{} requests for the places of {FILES} files",
                asked.1
            );
            // What is not there is known, too.
            let before = requests(cluster)?.0;
            (0..FILES).for_each(|n| assert!(!dir.join(format!("other{n}")).exists()));
            let asked = requests(cluster)?.0 - before;
            ensure!(
                asked < few,
                "{asked} requests for {FILES} names that are not there"
            );
            Ok(())
        })?;
    }
    Ok(())
}

/// By path, and without listing anything, as a compiler does: each small directory is a single question.
#[test]
fn small_directories_are_read_as_a_program_comes_to_them() -> anyhow::Result<()> {
    const DIRECTORIES: usize = 12;
    const EACH: usize = 10;
    guard::with_cluster(options(Fabric::Tcp), |cluster| {
        let path = |mount: usize, dir: usize| cluster.mount(mount).join(format!("d{dir:02}"));
        for dir in 0..DIRECTORIES {
            fs::create_dir(path(0, dir))?;
            (0..EACH).try_for_each(|n| fs::write(path(0, dir).join(name(n)), b"x"))?;
        }
        let before = requests(cluster)?.0;
        for dir in 0..DIRECTORIES {
            for n in 0..EACH {
                ensure!(fs::metadata(path(1, dir).join(name(n)))?.len() == 1);
            }
            ensure!(!path(1, dir).join("other").exists());
        }
        let asked = requests(cluster)?.0 - before;
        // What is not durable yet is asked for by itself; one answer makes all durable that came before.
        let few = (2 * DIRECTORIES + 10) as u64;
        ensure!(
            asked < few,
            "{asked} requests for {DIRECTORIES} directories of {EACH} files"
        );
        Ok(())
    })
}

/// Two mounts make files in one directory by turns: what the other one has made is told by a single answer.
#[test]
fn names_that_the_other_mount_has_not_changed_are_still_known() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster(options(fabric), |cluster| {
            fs::create_dir(cluster.mount(0).join("d"))?;
            let turn = |mount: usize, turn: usize| -> anyhow::Result<u64> {
                let dir = cluster.mount(mount).join("d");
                let before = requests(cluster)?.0;
                for n in 0..FILES {
                    File::create_new(dir.join(format!("{mount}-{turn}-{n}")))?;
                }
                Ok(requests(cluster)?.0 - before)
            };
            // The directory becomes known to both.
            for (mount, first) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                turn(mount, first)?;
            }
            for again in 2..6 {
                for mount in [0, 1] {
                    let asked = turn(mount, again)?;
                    ensure!(
                        asked < FILES as u64 / 2,
                        "{asked} requests for {FILES} files that mount {mount} has made in turn {again}"
                    );
                }
            }
            // Each knows what the other one has made, and removed.
            fs::remove_file(cluster.mount(0).join("d/1-2-7"))?;
            fs::rename(cluster.mount(0).join("d/1-2-8"), cluster.mount(0).join("d/other"))?;
            let other = cluster.mount(1).join("d");
            ensure!(!other.join("1-2-7").exists() && !other.join("1-2-8").exists());
            ensure!(other.join("other").exists() && other.join("0-2-9").exists());
            for mount in [0, 1] {
                let listed = fs::read_dir(cluster.mount(mount).join("d"))?.count();
                ensure!(listed == FILES * 12 - 1, "{listed} names");
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_is_not_stored_is_stored_together_when_it_is_asked_for() -> anyhow::Result<()> {
    guard::with_cluster(options(Fabric::Shm), |cluster| {
        make(cluster)?;
        let dir = cluster.mount(1).join("d");
        let before = requests(cluster)?.1;
        (0..FILES).try_for_each(|n| check(&dir, n))?;
        let asked = requests(cluster)?.1 - before;
        ensure!(
            asked < FILES as u64 / 2,
            "{asked} requests to store {FILES} files"
        );
        Ok(())
    })
}

#[test]
fn leases_come_ahead_of_who_goes_through_a_directory() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster(options(fabric), |cluster| {
            make(cluster)?;
            store(cluster)?;
            let dir = cluster.mount(1).join("d");
            let names = || -> anyhow::Result<Vec<_>> {
                Ok(fs::read_dir(&dir)?
                    .map(|e| e.map(|e| e.path()))
                    .collect::<Result<_, _>>()?)
            };
            let listed = names()?;
            ensure!(listed.len() == FILES);
            let base = held(cluster, 1, "shared")?;
            for path in &listed[..4] {
                fs::metadata(path)?;
            }
            guard::until("leases of names that were not looked up", LIMIT, || {
                Ok(held(cluster, 1, "shared")? >= base + 10)
            })?;
            let base = held(cluster, 1, "exclusive")?;
            for path in &listed[..4] {
                fs::remove_file(path)?;
            }
            guard::until("leases of names that were not removed", LIMIT, || {
                Ok(held(cluster, 1, "exclusive")? >= base + 8)
            })?;
            // They are what they were, wherever their leases are.
            ensure!(names()?.len() == FILES - 4);
            (4..FILES).try_for_each(|n| check(&cluster.mount(0).join("d"), n))?;
            listed[4..].iter().try_for_each(fs::remove_file)?;
            ensure!(fs::read_dir(cluster.mount(0).join("d"))?.count() == 0);
            Ok(fs::remove_dir(cluster.mount(0).join("d"))?)
        })?;
    }
    Ok(())
}

/// Neither mount has listed them.
#[test]
fn leases_come_ahead_of_who_renames_or_removes_what_others_have_read() -> anyhow::Result<()> {
    const FEW: usize = 4;
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster(options(fabric), |cluster| {
            make(cluster)?;
            store(cluster)?;
            let all_read = || (0..FILES).try_for_each(|n| check(&cluster.mount(1).join("d"), n));
            let dir = cluster.mount(0).join("d");
            let path = |n: usize| dir.join(name(n));
            all_read()?;
            let base = held(cluster, 0, "exclusive")?;
            for n in 0..FEW {
                fs::rename(path(n), dir.join(format!("{}-", name(n))))?;
            }
            guard::until("leases of names that were not changed", LIMIT, || {
                Ok(held(cluster, 0, "exclusive")? >= base + 8)
            })?;
            for n in 0..FEW {
                fs::rename(dir.join(format!("{}-", name(n))), path(n))?;
            }
            all_read()?;
            let base = held(cluster, 0, "exclusive")?;
            (0..FEW).try_for_each(|n| fs::remove_file(path(n)))?;
            guard::until("leases of names that were not removed", LIMIT, || {
                Ok(held(cluster, 0, "exclusive")? >= base + 4)
            })?;
            ensure!(fs::read_dir(cluster.mount(1).join("d"))?.count() == FILES - FEW);
            (FEW..FILES).try_for_each(|n| check(&cluster.mount(1).join("d"), n))
        })?;
    }
    Ok(())
}
