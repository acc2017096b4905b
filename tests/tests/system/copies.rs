//! Stores that are put back from an older copy.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Options, Role};
use system_tests::guard;
use system_tests::process::Process;

fn options() -> Options {
    Options {
        storage: 1,
        mounts: 1,
        pool_mib: 16,
        ..Options::default()
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}

/// Waits until the servers know how new each other's stores are.
fn known(cluster: &Cluster) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        let status = cluster.status()?;
        let (meta, storage) = (&status["meta"]["Ok"], &status["storage"][0][1]["Ok"]);
        let at = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
        if at(&storage["generation"]) > 0
            && meta["generations"][0] == storage["generation"]
            && at(&storage["place"]) > 0
            && meta["durable"] == storage["place"]
        {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    ensure!(copied.success(), "cp {}", from.display());
    Ok(())
}

/// A cluster that has ended, with the newest store of a role and, beside it, an older copy; it has a file that the copy
/// does not know.
fn with_copy(cluster: &Cluster, store: &str) -> anyhow::Result<()> {
    let mount = cluster.mount(0);
    cluster.start_all()?;
    write(&mount.join("first"), "first")?;
    cluster.end_all()?;
    copy(&cluster.path(store), &cluster.path("old"))?;
    cluster.start_all()?;
    write(&mount.join("second"), "second")?;
    known(cluster)?;
    cluster.end_all()
}

fn exchange(cluster: &Cluster, store: &str, with: &str, away: &str) -> anyhow::Result<()> {
    fs::rename(cluster.path(store), cluster.path(away))?;
    Ok(fs::rename(cluster.path(with), cluster.path(store))?)
}

/// What is in memory is gone, as after a restart of the host.
fn lose_memory(cluster: &Cluster) -> anyhow::Result<()> {
    for entry in fs::read_dir(cluster.memory())? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

fn told(cluster: &Cluster, role: Role) -> anyhow::Result<()> {
    let log = fs::read_to_string(cluster.log(role))?;
    ensure!(
        log.contains("older copy") && log.contains("--accept-older"),
        "{role:?}: {log}"
    );
    Ok(())
}

/// Starts a server that takes older copies as they are.
fn accepting(cluster: &Cluster, role: &[&str]) -> anyhow::Result<Process> {
    let config = cluster.config().display().to_string();
    let args = role
        .iter()
        .copied()
        .chain(["--accept-older", "--config", &config]);
    let args: Vec<String> = args.map(str::to_owned).collect();
    Process::start(&args, &cluster.path("accepting.log"), &cluster.path("."), None)
}

fn ended(mut process: Process) -> anyhow::Result<()> {
    let status = process.end(Duration::from_secs(20)).context("it does not end")?;
    ensure!(status.success(), "{status}");
    Ok(())
}

#[test]
fn an_older_copy_of_a_storage_nodes_store_is_refused() -> anyhow::Result<()> {
    guard::with(Cluster::formatted(options())?, |cluster| {
        let mount = cluster.mount(0);
        with_copy(cluster, "storage0")?;
        exchange(cluster, "storage0", "old", "new")?;
        // Memory is newer.
        ensure!(
            cluster.start_role(Role::Storage(0)).is_err(),
            "an older store than memory was taken"
        );
        told(cluster, Role::Storage(0))?;
        // The metadata server knows better.
        lose_memory(cluster)?;
        cluster.start_role(Role::Storage(0))?;
        cluster.start_role(Role::Meta)?;
        ensure!(
            cluster.start_role(Role::Mount(0)).is_err(),
            "mounted over an older store"
        );
        told(cluster, Role::Mount(0))?;
        let status = cluster.status()?;
        ensure!(status["problems"].to_string().contains("older copy"), "{status}");
        cluster.end_all()?;
        // The newest one is right, of course, and a mount that is there refuses an older one, too.
        exchange(cluster, "storage0", "new", "old")?;
        lose_memory(cluster)?;
        cluster.start_all()?;
        ensure!(fs::read_to_string(mount.join("second"))? == "second");
        known(cluster)?;
        cluster.end_all()?;
        // Or it is taken deliberately.
        exchange(cluster, "storage0", "old", "new")?;
        let storage = accepting(cluster, &["storage", "--id", "0"])?;
        let meta = accepting(cluster, &["meta"])?;
        known(cluster)?;
        ended(meta)?;
        ended(storage)?;
        cluster.start_all()?;
        ensure!(fs::read_to_string(mount.join("first"))? == "first");
        Ok(())
    })
}

#[test]
fn an_older_copy_of_the_metadata_store_is_refused() -> anyhow::Result<()> {
    guard::with(Cluster::formatted(options())?, |cluster| {
        let mount = cluster.mount(0);
        with_copy(cluster, "meta")?;
        exchange(cluster, "meta", "old", "new")?;
        for lost in [false, true] {
            if lost {
                lose_memory(cluster)?;
            }
            cluster.start_role(Role::Storage(0))?;
            cluster.start_role(Role::Meta)?;
            let status = cluster.wait(Role::Meta, Duration::from_secs(20))?;
            ensure!(status.code() == Some(1), "{status}");
            told(cluster, Role::Meta)?;
            cluster.end_all()?;
        }
        exchange(cluster, "meta", "new", "old")?;
        cluster.start_all()?;
        ensure!(fs::read_to_string(mount.join("second"))? == "second");
        // A mount that is there knows, too, whatever the storage nodes do.
        known(cluster)?;
        cluster.end(Role::Storage(0))?;
        cluster.end(Role::Meta)?;
        exchange(cluster, "meta", "old", "new")?;
        cluster.start_role(Role::Meta)?;
        let status = cluster.wait(Role::Meta, Duration::from_secs(20))?;
        ensure!(status.code() == Some(1), "{status}");
        cluster.kill(Role::Mount(0));
        cluster.start_role(Role::Storage(0))?;
        let meta = accepting(cluster, &["meta"])?;
        known(cluster)?;
        ended(meta)?;
        cluster.start_all()?;
        ensure!(fs::read_to_string(mount.join("first"))? == "first");
        ensure!(!mount.join("second").exists());
        Ok(())
    })
}
