//! Crashes and restarts of each role.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::{guard, sys};

/// Bytes of a file's blocks, which lie on the storage nodes in turn.
const BLOCK: usize = 256 << 10;

/// Files by name, and what their contents are made from.
type Written = BTreeMap<String, usize>;

/// Tasks that write while something goes wrong.
const WORKERS: usize = 4;

/// Longest time that work may stand still after a server is back.
const RECOVERY: Duration = Duration::from_secs(20);

fn content(key: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 3 + key * 7 + (i >> 9)) as u8).collect()
}

/// Writes files that are fsynced one after the other until told to stop; returns those for which fsync returned, and counts them.
fn worker(dir: &Path, id: usize, told: (&AtomicBool, &AtomicUsize)) -> anyhow::Result<Written> {
    let (stop, count) = told;
    let mut done = BTreeMap::new();
    let mut failing: Option<Instant> = None;
    for i in 0.. {
        if stop.load(Ordering::Relaxed) && failing.is_none() {
            return Ok(done);
        }
        let name = format!("w{id}-{i}");
        let make = || -> std::io::Result<()> {
            let file = File::create(dir.join(&name))?;
            file.write_all_at(&content(i, 3000 + i % 9000), 0)?;
            file.sync_all()?;
            if i % 5 == 4 {
                fs::rename(dir.join(&name), dir.join(format!("r{id}-{i}")))?;
            }
            Ok(())
        };
        match make() {
            Ok(()) => {
                failing = None;
                count.fetch_add(1, Ordering::Relaxed);
                done.insert(if i % 5 == 4 { format!("r{id}-{i}") } else { name }, i);
            }
            // During the outage calls may fail; they must succeed again in bounded time.
            Err(error) => {
                let since = *failing.get_or_insert_with(Instant::now);
                if since.elapsed() > RECOVERY {
                    return Err(anyhow!(error).context(format!("worker {id} still fails after {RECOVERY:?}")));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
    Ok(done)
}

/// Workers on both mounts while `fault` happens; then everything fsynced must be there, on every mount.
fn under_load(cluster: &Cluster, fault: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Written> {
    let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
    // Until each worker has written some more on the average, or none does any more, which they tell themselves.
    let goes_on = || {
        let (start, enough) = (Instant::now(), count.load(Ordering::Relaxed) + 4 * WORKERS);
        while count.load(Ordering::Relaxed) < enough && start.elapsed() < RECOVERY {
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let done = std::thread::scope(|scope| {
        let told = (&stop, &count);
        let threads: Vec<_> = (0..WORKERS)
            .map(|id| {
                let dir = cluster.mount(id % 2);
                scope.spawn(move || worker(&dir, id, told))
            })
            .collect();
        goes_on();
        let result = fault();
        goes_on();
        stop.store(true, Ordering::Relaxed);
        let mut done = BTreeMap::new();
        for thread in threads {
            done.extend(thread.join().map_err(|_| anyhow!("a worker panicked"))??);
        }
        result.map(|()| done)
    })?;
    ensure!(done.len() > 10, "only {} files were written", done.len());
    for mount in 0..2 {
        verify(&cluster.mount(mount), &done).with_context(|| format!("on mount {mount}"))?;
    }
    Ok(done)
}

fn verify(dir: &Path, done: &Written) -> anyhow::Result<()> {
    for (name, key) in done {
        let got = fs::read(dir.join(name)).with_context(|| format!("{name}, which was fsynced"))?;
        ensure!(
            got == content(*key, 3000 + key % 9000),
            "{name}: the content is not what was fsynced"
        );
    }
    // Names and inodes agree: everything that is listed can be looked at and removed.
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        entry
            .metadata()
            .with_context(|| format!("{:?} is listed but not there", entry.file_name()))?;
    }
    Ok(())
}

fn killed_under_load(options: Options, role: Role, pause: Duration) -> anyhow::Result<()> {
    guard::with_cluster(options, move |cluster| {
        for _ in 0..2 {
            let done = under_load(cluster, || {
                cluster.kill(role);
                std::thread::sleep(pause);
                cluster.start_role(role)
            })?;
            for name in done.keys() {
                fs::remove_file(cluster.mount(1).join(name)).with_context(|| name.clone())?;
            }
        }
        Ok(())
    })
}

#[test]
fn metadata_server_killed_under_load() -> anyhow::Result<()> {
    killed_under_load(Options::default(), Role::Meta, Duration::from_millis(300))
}

#[test]
fn metadata_server_killed_under_load_tcp_writethrough() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Writethrough,
        ..Options::default()
    };
    killed_under_load(options, Role::Meta, Duration::ZERO)
}

#[test]
fn storage_node_killed_under_load() -> anyhow::Result<()> {
    killed_under_load(Options::default(), Role::Storage(0), Duration::from_millis(300))
}

#[test]
fn storage_node_killed_under_load_tcp_writethrough() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Writethrough,
        ..Options::default()
    };
    killed_under_load(options, Role::Storage(1), Duration::ZERO)
}

fn write_all(dir: &Path, count: usize, sync: bool) -> anyhow::Result<Written> {
    let mut done = BTreeMap::new();
    for i in 0..count {
        let name = format!("f{i}");
        let file = File::create(dir.join(&name))?;
        file.write_all_at(&content(i, 3000 + i % 9000), 0)?;
        if sync {
            file.sync_all()?;
        }
        done.insert(name, i);
    }
    Ok(done)
}

/// Without mounts in the way: the storage nodes are killed, and what they remember in memory is gone, too.
#[test]
fn a_machine_crash_keeps_what_was_fsynced() -> anyhow::Result<()> {
    guard::with_cluster(Options::default(), |cluster| {
        let done = write_all(&cluster.mount(0), 60, true)?;
        let roles = cluster.roles();
        for role in roles.iter().rev() {
            cluster.kill(*role);
        }
        let mut files = 0;
        for entry in fs::read_dir(cluster.memory())? {
            fs::remove_file(entry?.path())?;
            files += 1;
        }
        ensure!(
            files > 0,
            "no memory file to delete in {}",
            cluster.memory().display()
        );
        cluster.start_all()?;
        (0..2).try_for_each(|m| verify(&cluster.mount(m), &done))
    })
}

/// What the mounts hold leases on stays coherent when the node that had the lease records lost its memory.
#[test]
fn a_storage_node_that_lost_its_leases_causes_no_stale_results() -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            storage: 1,
            ..Options::default()
        },
        |cluster| {
            let (a, b) = (cluster.mount(0), cluster.mount(1));
            write_all(&a, 10, true)?;
            ensure!(
                fs::read_dir(&b)?.count() == 10 && fs::read(b.join("f3"))?.len() == 3003,
                "before"
            );
            cluster.kill(Role::Storage(0));
            for entry in fs::read_dir(cluster.memory())? {
                fs::remove_file(entry?.path())?;
            }
            cluster.start_role(Role::Storage(0))?;
            // What the mounts cache is worth nothing without the leases: they begin anew, where they were.
            for mount in 0..2 {
                let log = cluster.log(Role::Mount(mount));
                let anew =
                    || fs::read_to_string(&log).is_ok_and(|text| text.matches("mounted on").count() == 2);
                let start = Instant::now();
                while !anew() {
                    ensure!(start.elapsed() < RECOVERY, "mount {mount} does not begin anew");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            for i in 0..10 {
                ensure!(
                    fs::read(a.join(format!("f{i}")))? == fs::read(b.join(format!("f{i}")))?,
                    "f{i}"
                );
            }
            for i in 0..5 {
                let name = format!("new{i}");
                retry("writing after the restart", || {
                    Ok(fs::write(a.join(&name), b"new")?)
                })?;
                retry("reading after the restart", || {
                    let got = fs::read(b.join(&name)).map_err(|e| {
                        if e.raw_os_error() == Some(libc::ENOENT) {
                            std::io::Error::other("a new file is not seen by the other mount")
                        } else {
                            e
                        }
                    })?;
                    ensure!(got == b"new", "content");
                    Ok(())
                })?;
            }
            Ok(())
        },
    )
}

/// Data that was acknowledged and is in one mount only, while its storage node is away and somebody wants it: for longer than
/// the mount tries at a time.
#[test]
fn acknowledged_data_waits_for_its_storage_node() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        storage: 2,
        timeout: Duration::from_millis(300),
        lease_wait: Duration::from_secs(60),
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        // A file whose lease record is on node 0, and its second block on node 1.
        let (name, file) = (0..8)
            .map(|i| {
                let name = format!("f{i}");
                let file = File::options()
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(cluster.mount(0).join(&name))?;
                Ok((name, file))
            })
            .collect::<std::io::Result<Vec<_>>>()?
            .into_iter()
            .find(|(_, file)| file.metadata().is_ok_and(|m| m.ino() >> 36 & 0xff == 0))
            .context("no file of node 0")?;
        file.write_all_at(&[b'o'; 2 * BLOCK], 0)?;
        file.sync_all()?;
        cluster.kill(Role::Storage(1));
        // It overwrites what is stored, so nothing has to be asked for.
        file.write_all_at(&[b'n'; 4096], BLOCK as u64)?;
        let there = cluster.mount(1).join(name);
        let reader = std::thread::spawn(move || fs::read(there));
        // So often the mount used to try before it threw the data away.
        std::thread::sleep(Duration::from_secs(4));
        cluster.start_role(Role::Storage(1))?;
        let seen = reader.join().map_err(|_| anyhow!("panic"))??;
        let (old, new) = ([b'o'; 4096], [b'n'; 4096]);
        ensure!(
            seen.len() == 2 * BLOCK && seen[BLOCK..][..4096] == new && seen[BLOCK + 4096..][..4096] == old,
            "read by the other mount: {:?}…",
            &seen[BLOCK..][..8]
        );
        // Nothing was lost, and nobody is told that something was.
        file.sync_all().context("fsync")
    })
}

#[test]
fn a_graceful_restart_keeps_everything() -> anyhow::Result<()> {
    guard::with_cluster(
        Options {
            cache: Cache::Writethrough,
            ..Options::default()
        },
        |cluster| {
            // Not fsynced: whoever leaves in order loses nothing.
            let done = write_all(&cluster.mount(0), 200, false)?;
            fs::create_dir(cluster.mount(1).join("dir"))?;
            sys::setxattr(&cluster.mount(1).join("dir"), "user.k", b"v", 0)?;
            for _ in 0..2 {
                cluster.end_all()?;
                cluster.start_all()?;
                for m in 0..2 {
                    let dir = cluster.mount(m).join("dir");
                    ensure!(sys::getxattr(&dir, "user.k")? == b"v", "xattr");
                    fs::remove_dir(dir.with_file_name("none"))
                        .err()
                        .context("removed what is not there")?;
                }
                (0..2).try_for_each(|m| {
                    for (name, key) in &done {
                        let got = fs::read(cluster.mount(m).join(name)).with_context(|| name.clone())?;
                        ensure!(got == content(*key, 3000 + key % 9000), "{name} on mount {m}");
                    }
                    Ok::<(), anyhow::Error>(())
                })?;
            }
            Ok(())
        },
    )
}

fn retry(what: &str, mut job: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        match job() {
            Ok(()) => return Ok(()),
            Err(error) if start.elapsed() > RECOVERY => return Err(error.context(what.to_owned())),
            Err(_) => std::thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[test]
fn a_killed_client_blocks_the_others_for_a_bounded_time() -> anyhow::Result<()> {
    let options = Options {
        lease_wait: Duration::from_secs(4),
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let (a, b) = (cluster.mount(0), cluster.mount(1));
        fs::create_dir(b.join("others"))?;
        fs::write(b.join("others/f"), b"other")?;
        let file = File::create(a.join("held"))?;
        file.write_all_at(b"fsynced", 0)?;
        file.sync_all()?;
        fs::create_dir(a.join("dir"))?;
        fs::write(a.join("dir/x"), b"x")?;
        file.write_all_at(b"dirty!!", 0)?;
        // The root was given to the other mount; the file and `dir` are mount 0's.
        fs::read_dir(&b)?.count();
        fs::write(b.join("others/g"), b"g")?;
        cluster.kill(Role::Mount(0));
        drop(file);
        let start = Instant::now();
        let first = fs::read(b.join("held"));
        let waited = start.elapsed();
        ensure!(waited < Duration::from_secs(30), "the first read took {waited:?}");
        eprintln!(
            "read after {waited:?}: {:?}",
            first.as_ref().map_err(ToString::to_string).map(Vec::len)
        );
        if let Err(error) = &first {
            let known = [
                libc::EIO,
                libc::ETIMEDOUT,
                libc::EAGAIN,
                libc::EHOSTDOWN,
                libc::ENOTCONN,
            ];
            ensure!(
                error.raw_os_error().is_some_and(|e| known.contains(&e)),
                "an unclear error: {error}"
            );
        }
        // What has been read once stays so: what was not written when the mount died is never written any more.
        let mut seen: Option<Vec<u8>> = None;
        let mut check = |got: Vec<u8>, when: &str| {
            ensure!(got == b"fsynced" || got == b"dirty!!", "{when}: content {got:?}");
            let before = seen.get_or_insert_with(|| got.clone());
            ensure!(*before == got, "{when}: {got:?} where {before:?} was read before");
            Ok(())
        };
        first.iter().try_for_each(|got| check(got.clone(), "first"))?;
        // Files that it did not hold are served as before, and what it held after a restart of the servers.
        fs::read_dir(b.join("others"))?
            .next()
            .context("a listing that is empty")??;
        ensure!(fs::read(b.join("others/f"))? == b"other", "another file");
        fs::write(b.join("others/new"), b"new")?;
        cluster.restart_after_abort()?;
        for dir in [&b, &a] {
            check(fs::read(dir.join("held"))?, "after the restart")?;
            fs::write(dir.join("dir/y"), b"y")?;
            fs::remove_file(dir.join("dir/y"))?;
        }
        Ok(())
    })
}

fn processes_with(text: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if line.windows(text.len()).any(|w| w == text.as_bytes()) {
            found.push(pid);
        }
    }
    found
}

#[test]
fn a_killed_dev_cluster_leaves_nothing_behind() -> anyhow::Result<()> {
    let dir = tempfile::Builder::new().prefix("dfst-").tempdir_in("/tmp")?;
    let path = dir.path().to_owned();
    let (base, state) = (path.join("mnt"), path.join("state"));
    let mut command = std::process::Command::new(system_tests::process::fsd_binary()?);
    command
        .args(["dev", "--mounts", "2", "--pool", "64MiB", "--dir"])
        .arg(&base)
        .arg("--state")
        .arg(&state);
    let log = File::create(path.join("log"))?;
    let mut child = command.stderr(log).spawn()?;
    let mounted = || {
        let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        table
            .lines()
            .filter(|l| l.contains(&*path.to_string_lossy()))
            .count()
    };
    let wait = |what: &str, done: &dyn Fn() -> bool| -> anyhow::Result<()> {
        let start = Instant::now();
        while !done() {
            if start.elapsed() > Duration::from_secs(30) {
                bail!("{what}\n{}", system_tests::process::tail(&path.join("log"), 20));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    let ready = wait("not mounted", &|| mounted() == 2);
    let written = ready.and_then(|()| {
        guard::within(
            Duration::from_secs(10),
            {
                let file = base.join("0/f");
                move || Ok(fs::write(file, b"written")?)
            },
            || (),
        )
    });
    child.kill()?;
    child.wait()?;
    let text = state.to_string_lossy().into_owned();
    let gone = wait("mounts or processes are left", &|| {
        mounted() == 0 && processes_with(&text).is_empty()
    });
    for i in 0..2 {
        system_tests::cluster::detach(&base.join(i.to_string()));
    }
    for pid in processes_with(&text) {
        if let Some(pid) = rustix::process::Pid::from_raw(pid as i32) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
    written.and(gone)
}
