//! What a mount keeps in memory.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::storm::leaks::Held;
use system_tests::{guard, sys};

fn inodes(cluster: &Cluster) -> anyhow::Result<Vec<u64>> {
    let status = cluster.status()?;
    let mounts = status["mounts"].as_array().context("no mounts in the status")?;
    mounts
        .iter()
        .map(|m| {
            m[1]["Ok"]["inodes"]
                .as_u64()
                .context("no inodes in the status of a mount")
        })
        .collect()
}

#[test]
fn inodes_the_kernel_has_forgotten_are_forgotten() -> anyhow::Result<()> {
    const FILES: usize = 2000;
    const LIMIT: usize = 200;
    let options = Options {
        cache: Cache::Writethrough,
        max_inodes: LIMIT,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let (a, b) = (cluster.mount(0).join("d"), cluster.mount(1).join("d"));
        let content = |i: usize| format!("{i}").repeat(20 + i % 300);
        fs::create_dir(&a)?;
        for i in 0..FILES {
            fs::write(a.join(format!("f{i}")), content(i))?;
        }
        let all_there = |dir: &std::path::Path| -> anyhow::Result<()> {
            for i in 0..FILES {
                let text = fs::read_to_string(dir.join(format!("f{i}")))?;
                ensure!(text == content(i), "contents of f{i}");
            }
            Ok(())
        };
        all_there(&b)?;
        ensure!(
            inodes(cluster)?.iter().all(|&n| n > FILES as u64),
            "the files are not known"
        );
        // The kernel forgets what nobody uses, but not all at once.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            fs::write("/proc/sys/vm/drop_caches", "2").context("dropping the kernel's inodes needs root")?;
            let known = inodes(cluster)?;
            if known.iter().all(|&n| n <= (LIMIT + LIMIT / 4) as u64) {
                break;
            }
            ensure!(Instant::now() < deadline, "still known after a minute: {known:?}");
            // So that there is something to be forgotten.
            for i in 0..50 {
                a.join(format!("f{i}")).metadata()?;
                b.join(format!("f{i}")).metadata()?;
            }
        }
        // Nothing was lost, and leases and caches begin anew.
        all_there(&a)?;
        fs::write(b.join("f7"), content(7) + "changed")?;
        ensure!(fs::read_to_string(a.join("f7"))? == content(7) + "changed");
        fs::write(b.join("f7"), content(7))?;
        all_there(&b)
    })
}

const MIB: usize = 1 << 20;

/// Has the kernel ask for a MiB at once when it reads ahead.
fn read_far_ahead(mount: &Path) -> anyhow::Result<()> {
    let dev = mount.metadata()?.dev();
    let (major, minor) = (libc::major(dev), libc::minor(dev));
    let setting = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    fs::write(setting, "1024").context("setting how far the kernel reads ahead needs root")
}

/// Reads each MiB of a file, all at the same time. The pages are the kernel's: the mount keeps none of them.
fn read_all_at_once(path: &Path, readers: usize) -> anyhow::Result<()> {
    let read = |i: usize| {
        let file = sys::open(path, libc::O_RDONLY)?;
        let bytes = sys::read_at(&file, (i * MIB) as u64, MIB)?;
        ensure!(bytes == vec![i as u8; MIB], "contents of MiB {i}");
        Ok(())
    };
    guard::together(readers, read).map(drop)
}

/// Each of them waits for the storage node in a thread of its own.
#[test]
fn threads_that_have_read_keep_no_buffers() -> anyhow::Result<()> {
    const READERS: usize = 60;
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Writethrough,
        mounts: 1,
        pool_mib: 256,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let path = cluster.mount(0).join("f");
        let text: Vec<u8> = (0..READERS).flat_map(|i| vec![i as u8; MIB]).collect();
        fs::write(&path, text)?;
        sys::open(&path, libc::O_RDWR)?.sync_all()?;
        read_far_ahead(&cluster.mount(0))?;
        let pid = cluster.pid(Role::Mount(0)).context("the mount does not run")?;
        let before = Held::of(pid)?.kib;
        for _ in 0..8 {
            fs::write("/proc/sys/vm/drop_caches", "1").context("dropping the kernel's pages needs root")?;
            read_all_at_once(&path, READERS)?;
        }
        let after = Held::of(pid)?.kib;
        ensure!(
            after < before + (16 << 10),
            "{before} KiB before {READERS} read at once, {after} after"
        );
        Ok(())
    })
}
