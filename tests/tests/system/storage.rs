//! What a storage node keeps, and what it says where it cannot.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role, detach};
use system_tests::guard;

const FILES: usize = 20;

fn content(i: usize) -> Vec<u8> {
    vec![65 + i as u8; 3000]
}

fn options() -> Options {
    Options {
        mounts: 1,
        storage: 1,
        pool_mib: 64,
        fabric: Fabric::Tcp,
        cache: Cache::Writethrough,
        ..Options::default()
    }
}

fn write_files(dir: &Path) -> anyhow::Result<()> {
    for i in 0..FILES {
        let mut file = File::create(dir.join(format!("f{i}")))?;
        file.write_all(&content(i))?;
        file.sync_all()?;
    }
    Ok(())
}

/// Which files are not what was written, and whether that was said.
fn wrong(dir: &Path) -> anyhow::Result<Vec<(usize, Option<i32>)>> {
    let mut wrong = Vec::new();
    for i in 0..FILES {
        match fs::read(dir.join(format!("f{i}"))) {
            Ok(got) if got == content(i) => {}
            Ok(_) => wrong.push((i, None)),
            Err(error) => wrong.push((i, error.raw_os_error())),
        }
    }
    Ok(wrong)
}

/// The machine that runs the storage node is switched off.
fn lose_memory(cluster: &Cluster) -> anyhow::Result<()> {
    for entry in fs::read_dir(cluster.memory())? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

/// Flips a bit in the copy of a file's contents on disk.
fn flip(cluster: &Cluster, i: usize) -> anyhow::Result<()> {
    let path = cluster.path("storage0/pool.data");
    let there = |data: &[u8]| data.windows(100).position(|w| w == &content(i)[..100]);
    // What was fsynced is in the index's store for a while first.
    let end = Instant::now() + Duration::from_secs(20);
    let (data, at) = loop {
        let data = fs::read(&path)?;
        match there(&data) {
            Some(at) => break (data, at),
            None => ensure!(Instant::now() < end, "the file is not on disk"),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let file = OpenOptions::new().write(true).open(path)?;
    file.write_all_at(&[data[at + 50] ^ 1], at as u64 + 50)?;
    Ok(file.sync_all()?)
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

#[test]
fn what_the_disk_has_lost_is_an_error_of_that_block_alone() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let mount = cluster.mount(0);
        write_files(&mount)?;
        cluster.end_all()?;
        lose_memory(cluster)?;
        let config = cluster.config().display().to_string();
        let found = cluster.tool(&["check", "--config", &config])?;
        ensure!(found.contains(" 0 problems"), "{found}");
        flip(cluster, 7)?;
        ensure!(
            cluster.tool(&["check", "--config", &config]).is_err(),
            "fsd check has not noticed"
        );
        cluster.start_all()?;
        ensure!(wrong(&mount)? == [(7, Some(libc::EIO))], "{:?}", wrong(&mount)?);
        let status = cluster.status()?;
        ensure!(
            status["healthy"] == false && status["storage"][0][1]["Ok"]["lost"] == 1,
            "{status}"
        );
        // A part of it cannot be written, for the rest would become zeros.
        let file = OpenOptions::new().write(true).open(mount.join("f7"))?;
        ensure!(
            errno(file.write_all_at(b"x", 10)) == Some(libc::EIO),
            "a part was written"
        );
        drop(file);
        // The death of the process does not turn it into something.
        cluster.kill_and_restart(Role::Storage(0))?;
        // Leases cannot be had before the mount has connected again.
        let end = Instant::now() + Duration::from_secs(20);
        while wrong(&mount)? != [(7, Some(libc::EIO))] {
            ensure!(Instant::now() < end, "{:?}", wrong(&mount)?);
            std::thread::sleep(Duration::from_millis(100));
        }
        // It heals with new contents.
        fs::write(mount.join("f7"), content(7))?;
        ensure!(wrong(&mount)?.is_empty(), "{:?}", wrong(&mount)?);
        ensure!(cluster.status()?["healthy"] == true, "not healthy");
        cluster.end_all()?;
        lose_memory(cluster)?;
        cluster.start_all()?;
        ensure!(wrong(&mount)?.is_empty(), "{:?}", wrong(&mount)?);
        Ok(())
    })
}

#[test]
fn what_the_disk_loses_while_memory_has_it_is_mended() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        write_files(&cluster.mount(0))?;
        flip(cluster, 3)?;
        let end = Instant::now() + Duration::from_secs(30);
        while cluster.status()?["storage"][0][1]["Ok"]["damaged"] != 1 {
            ensure!(Instant::now() < end, "the scrub has not noticed");
            std::thread::sleep(Duration::from_millis(100));
        }
        cluster.end_all()?;
        lose_memory(cluster)?;
        cluster.start_all()?;
        ensure!(wrong(&cluster.mount(0))?.is_empty(), "it was not stored anew");
        Ok(())
    })
}

#[test]
fn a_pool_grows_but_never_shrinks() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        write_files(&cluster.mount(0))?;
        cluster.end_all()?;
        let resize = |from: &str, to: &str| -> anyhow::Result<()> {
            let text = fs::read_to_string(cluster.config())?;
            ensure!(text.contains(from), "no {from}");
            Ok(fs::write(cluster.config(), text.replace(from, to))?)
        };
        resize("64MiB", "8MiB")?;
        ensure!(
            cluster.start_role(Role::Storage(0)).is_err(),
            "it has started with a smaller pool"
        );
        let log = fs::read_to_string(cluster.log(Role::Storage(0)))?;
        ensure!(log.contains("a pool can be made larger, not smaller"), "{log}");
        resize("8MiB", "96MiB")?;
        cluster.start_all()?;
        ensure!(wrong(&cluster.mount(0))?.is_empty());
        let total = cluster.status()?["storage"][0][1]["Ok"]["total"].clone();
        ensure!(total == 96 << 20, "{total}");
        // What was in memory only when the process died is there, too.
        cluster.end_all()?;
        resize("96MiB", "128MiB")?;
        cluster.start_all()?;
        ensure!(wrong(&cluster.mount(0))?.is_empty());
        Ok(())
    })
}

#[test]
fn another_store_at_an_address_is_refused() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let mount = cluster.mount(0);
        write_files(&mount)?;
        cluster.end_all()?;
        let (own, other) = (cluster.path("storage0"), cluster.path("other"));
        fs::rename(&own, &other)?;
        cluster.tool(&[
            "format",
            "--role",
            "storage",
            "--id",
            "0",
            "--config",
            &cluster.config().display().to_string(),
        ])?;
        cluster.start_role(Role::Storage(0))?;
        cluster.start_role(Role::Meta)?;
        ensure!(
            cluster.start_role(Role::Mount(0)).is_err(),
            "mounted over an empty store"
        );
        let log = fs::read_to_string(cluster.log(Role::Mount(0)))?;
        ensure!(log.contains("start the node with the right directory"), "{log}");
        cluster.end(Role::Storage(0))?;
        fs::remove_dir_all(&own)?;
        fs::rename(&other, &own)?;
        cluster.start_all()?;
        ensure!(wrong(&mount)?.is_empty());
        Ok(())
    })
}

#[test]
fn each_host_formats_its_own() -> anyhow::Result<()> {
    let cluster = Cluster::formatted(Options {
        storage: 2,
        ..options()
    })?;
    let stores = ["meta", "storage0", "storage1"];
    let config = cluster.config().display().to_string();
    let format = |more: &[&str]| -> anyhow::Result<(String, Vec<&str>)> {
        let out = std::process::Command::new(system_tests::process::fsd_binary()?)
            .args(["format", "--config", &config])
            .args(more)
            .output()?;
        let there = stores.iter().filter(|store| cluster.path(store).exists());
        Ok((
            String::from_utf8_lossy(&out.stderr).into_owned(),
            there.copied().collect(),
        ))
    };
    for store in stores {
        fs::remove_dir_all(cluster.path(store))?;
    }
    for (args, words) in [
        (&["--role", "storage"][..], "--id N (the configuration has 0, 1)"),
        (
            &["--role", "storage", "--id", "2"],
            "has no storage node 2, but 0, 1",
        ),
        (&["--role", "meta", "--id", "0"], "takes no --id"),
        (&["--role", "mount"], "invalid value 'mount'"),
    ] {
        let (told, there) = format(args)?;
        ensure!(
            told.contains(words) && there.is_empty(),
            "{args:?}: {told} {there:?}"
        );
    }
    ensure!(format(&["--role", "storage", "--id", "1"])?.1 == ["storage1"]);
    let (told, there) = format(&["--role", "storage", "--id", "1"])?;
    ensure!(
        told.contains("is formatted already") && there == ["storage1"],
        "{told}"
    );
    // All or nothing.
    let (told, there) = format(&[])?;
    ensure!(
        told.contains("storage1: is formatted already") && there == ["storage1"],
        "{told} {there:?}"
    );
    ensure!(format(&["--role", "meta"])?.1 == ["meta", "storage1"]);
    ensure!(
        format(&["--role", "meta"])?
            .0
            .contains("meta: is formatted already")
    );
    ensure!(format(&["--role", "storage", "--id", "0"])?.1 == stores);
    let text = fs::read_to_string(&config)?;
    let elsewhere = text.replace("fabric = \"shm\"", "fabric = \"tcp\"");
    let mut port = 23_000;
    let listen = |line: &str| {
        port += 1;
        if line.starts_with("listen") {
            format!("listen = \"192.0.2.1:{port}\"")
        } else {
            line.to_owned()
        }
    };
    let lines: Vec<String> = elsewhere.lines().map(listen).collect();
    fs::write(&config, lines.join("\n"))?;
    let (told, _) = format(&[])?;
    ensure!(
        told.contains("not an address of this host") && told.contains("--role"),
        "{told}"
    );
    fs::write(&config, text)?;
    guard::with(cluster, |cluster| {
        cluster.start_all()?;
        write_files(&cluster.mount(0))?;
        ensure!(wrong(&cluster.mount(0))?.is_empty());
        Ok(())
    })
}

/// Unmounts it at the end, whatever happens.
struct Tmpfs<'a>(&'a Path);

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        detach(self.0);
    }
}

#[test]
fn a_full_memory_file_system_is_no_space_left_and_kills_nobody() -> anyhow::Result<()> {
    let options = Options {
        pool_mib: 128,
        ..options()
    };
    let cluster = Cluster::formatted(options)?;
    let small = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=40m", "tmpfs"])
        .arg(cluster.memory())
        .status()?;
    ensure!(small.success(), "no small memory file system");
    let memory = cluster.memory().to_owned();
    let _tmpfs = Tmpfs(&memory);
    cluster.start_all()?;
    let fill = |name: &str| -> anyhow::Result<(usize, Option<i32>)> {
        let file = File::create(cluster.mount(0).join(name))?;
        let block = vec![7; 1 << 20];
        for n in 0..100 {
            if let Err(error) = file.write_all_at(&block, n << 20) {
                return Ok((n as usize, error.raw_os_error()));
            }
        }
        Ok((100, None))
    };
    let pid = cluster.pid(Role::Storage(0));
    for _ in 0..3 {
        let (mib, error) = fill("big")?;
        ensure!(
            error == Some(libc::ENOSPC) && mib > 20,
            "{mib} MiB, then {error:?}"
        );
        fs::remove_file(cluster.mount(0).join("big"))?;
    }
    ensure!(fs::metadata(cluster.memory().join("."))?.is_dir());
    let status = cluster.status()?;
    let problems = status["problems"].as_array().context("no problems")?;
    ensure!(
        cluster.pid(Role::Storage(0)) == pid
            && problems
                .iter()
                .all(|p| p.as_str().is_some_and(|p| p.contains("is full"))),
        "{problems:?}"
    );
    cluster.end_all()
}

#[test]
fn memory_is_taken_as_data_come_and_given_back() -> anyhow::Result<()> {
    let options = Options {
        pool_mib: 512,
        ..options()
    };
    guard::with_cluster(options, |cluster| {
        let used = || -> anyhow::Result<u64> {
            let mut blocks = 0;
            for entry in fs::read_dir(cluster.memory())? {
                blocks += entry?.metadata()?.blocks();
            }
            Ok((blocks * 512) >> 20)
        };
        let disk = || -> anyhow::Result<u64> {
            Ok((fs::metadata(cluster.path("storage0/pool.data"))?.blocks() * 512) >> 20)
        };
        ensure!(used()? < 64, "{} MiB at start", used()?);
        let path = cluster.mount(0).join("big");
        let mut file = File::create(&path)?;
        for _ in 0..200 {
            file.write_all(&vec![9; 1 << 20])?;
        }
        file.sync_all()?;
        drop(file);
        ensure!(
            used()? >= 200 && disk()? >= 200,
            "{} and {} MiB",
            used()?,
            disk()?
        );
        fs::remove_file(&path)?;
        let end = Instant::now() + Duration::from_secs(40);
        while used()? > 64 || disk()? > 64 {
            ensure!(Instant::now() < end, "still {} and {} MiB", used()?, disk()?);
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    })
}
