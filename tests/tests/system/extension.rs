//! The kernel extension under a whole cluster: in guests of the lab.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{self, Cluster, Options, Role};
use system_tests::coherence::Choice;
use system_tests::pressure::Setting;
use system_tests::{coherence, guard, sys};

fn options() -> Options {
    Options {
        lease_wait: Duration::from_secs(8),
        ..Options::extension()
    }
}

/// All that a mount's kernel has counted.
fn counters(cluster: &Cluster, mount: usize) -> anyhow::Result<BTreeMap<String, u64>> {
    let status = cluster.status()?;
    let point = cluster.mount(mount).display().to_string();
    let all = cluster::nodes(&status)?;
    let node = all
        .iter()
        .find(|n| n["name"].as_str().is_some_and(|name| name.ends_with(&point)))
        .context("the mount is not in the status")?;
    let mounts = status["mounts"].as_array().context("no mounts")?;
    let mount = mounts
        .iter()
        .find(|m| m[0] == node["node"])
        .context("no such mount")?;
    let counters = mount[1]["Ok"]["kernel"].as_array().context("no counters")?;
    let pair = |c: &serde_json::Value| Some((c[0].as_str()?.to_owned(), c[1].as_u64()?));
    Ok(counters.iter().filter_map(pair).collect())
}

pub fn counted(cluster: &Cluster, mount: usize, name: &str) -> anyhow::Result<u64> {
    let all = counters(cluster, mount)?;
    all.get(name)
        .copied()
        .with_context(|| format!("no counter {name}"))
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn every_kind_of_check() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let choice = Choice {
            extension: true,
            ..Choice::default()
        };
        let outcomes = coherence::run(&cluster.mount(0), &cluster.mount(1), 3, choice)?;
        let violations = coherence::print(&outcomes);
        ensure!(violations == 0, "{violations} violations, see the table");
        Ok(())
    })
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn nothing_is_asked_under_a_held_lease() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let path = cluster.mount(0).join("f");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        file.write_all_at(&[1; 65_536], 0)?;
        // Nothing is written back meanwhile by the kernel's own clock.
        let _clock = Setting::set("vm/dirty_writeback_centisecs", "0")?;
        let before = (cluster.total("requests")?, counted(cluster, 0, "wakeups_made")?);
        let misses = counted(cluster, 0, "misses")?;
        let mut buffer = [0; 4096];
        for i in 0..500 {
            let at = i % 16 * 4096;
            file.write_all_at(&[i as u8; 4096], at)?;
            file.read_exact_at(&mut buffer, at)?;
            ensure!(buffer[4095] == i as u8, "what was just written");
        }
        // Asking is done by programs, each of which closes a copy of this file as it starts: a FLUSH, the first one with
        // a WRITE and a SETATTR. That much was asked between the two looks at the requests.
        let own = 3 + 2;
        let after = (cluster.total("requests")?, counted(cluster, 0, "wakeups_made")?);
        ensure!(
            after.0 <= before.0 + own && after.1 == before.1,
            "requests and wake-ups {before:?}, then {after:?}"
        );
        ensure!(counted(cluster, 0, "misses")? == misses, "a lease was asked for");
        ensure!(
            counted(cluster, 0, "hits")? >= 1000,
            "the kernel extension was not used"
        );
        Ok(())
    })
}

/// By how much the first mount's counters grow.
fn grown(
    cluster: &Cluster,
    work: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<BTreeMap<String, u64>> {
    let before = counters(cluster, 0)?;
    work()?;
    let mut after = counters(cluster, 0)?;
    after.retain(|name, n| {
        *n -= before.get(name).copied().unwrap_or(0);
        *n > 0
    });
    Ok(after)
}

fn of(counts: &BTreeMap<String, u64>, name: &str) -> u64 {
    counts.get(name).copied().unwrap_or(0)
}

/// A lease of clean pages is given back by changing its word alone: no flush, nobody to wait for. Getting it again takes one
/// wake-up of the daemon and one doorbell at most, for the task that waits.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_clean_lease_goes_and_comes_quietly() -> anyhow::Result<()> {
    const TURNS: u64 = 200;
    const FILES: usize = 6;
    // Too much at a time for the daemon to be asked to do it instead.
    const WORDS: usize = 2500;
    let files = |dir: PathBuf| -> anyhow::Result<Vec<File>> {
        let open = |i| sys::open(&dir.join(format!("f{i}")), libc::O_RDWR | libc::O_CREAT);
        Ok((0..FILES).map(open).collect::<Result<_, _>>()?)
    };
    guard::with_cluster(options(), move |cluster| {
        let (readers, writers) = (files(cluster.mount(0))?, files(cluster.mount(1))?);
        let turn = |file: usize, n: u64| -> anyhow::Result<()> {
            let written = n.to_le_bytes().repeat(WORDS);
            writers[file].write_all_at(&written, 0)?;
            let mut data = vec![0; written.len()];
            readers[file].read_exact_at(&mut data, 0)?;
            ensure!(data == written, "turn {n} of file {file}");
            Ok(())
        };
        turn(0, 0)?;
        let quiet = grown(cluster, || (1..=TURNS).try_for_each(|n| turn(0, n)))?;
        eprintln!("{TURNS} turns by one: {quiet:?}");
        let busy = grown(cluster, || {
            guard::together(FILES, |file| (1..=TURNS).try_for_each(|n| turn(file, n))).map(|_| ())
        })?;
        eprintln!("{TURNS} turns by each of {FILES}: {busy:?}");
        for (counts, turns) in [(&quiet, TURNS), (&busy, TURNS * FILES as u64)] {
            ensure!(
                of(counts, "misses") >= turns,
                "the lease was not given back: {counts:?}"
            );
            ensure!(
                of(counts, "wakeups_made").max(of(counts, "kicks")) <= of(counts, "misses"),
                "more than a wake-up or a doorbell for a lease: {counts:?}"
            );
            ensure!(
                of(counts, "flushes") + of(counts, "unmaps") + of(counts, "drains") == 0,
                "clean leases were not given back by the word alone: {counts:?}"
            );
        }
        Ok(())
    })
}

/// Where one lease after the other is given back and had again, a task whose answer comes while it looks for it costs no doorbell;
/// and the pages stay. How many those are is up to the machine: on one that is not busy otherwise, nearly all.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn leases_that_come_and_go_all_the_time() -> anyhow::Result<()> {
    const FILES: u64 = 200;
    const ROUNDS: u64 = 10;
    let small = Options {
        mounts: 1,
        lease_table: 64,
        // Emulated processors take their time.
        spin_us: 1000,
        ..options()
    };
    guard::with_cluster(small, |cluster| {
        let dir = cluster.mount(0);
        let mut files = Vec::new();
        for i in 0..FILES {
            let path = dir.join(format!("f{i}"));
            fs::write(&path, i.to_le_bytes().repeat(100))?;
            files.push(File::open(&path)?);
        }
        let round = || -> anyhow::Result<()> {
            (0..).zip(&files).try_for_each(|(i, file): (u64, _)| {
                let data = sys::read_at(file, 0, 800)?;
                ensure!(data == i.to_le_bytes().repeat(100), "file {i}");
                Ok(())
            })
        };
        round()?;
        let counts = grown(cluster, || (0..ROUNDS).try_for_each(|_| round()))?;
        eprintln!("{ROUNDS} rounds of {FILES} files: {counts:?}");
        let misses = of(&counts, "misses");
        ensure!(
            misses >= FILES * ROUNDS / 2,
            "the leases were not given back: {counts:?}"
        );
        let slept = of(&counts, "waits");
        ensure!(of(&counts, "spins") + slept == misses, "what else: {counts:?}");
        // Some are rung for what no task waits for: what is delegated ahead.
        ensure!(
            of(&counts, "kicks") <= slept + ROUNDS && of(&counts, "wakeups_made") <= misses,
            "more doorbells than sleepers: {counts:?}"
        );
        ensure!(
            of(&counts, "flushes") + of(&counts, "drains") + of(&counts, "pages_dropped") == 0,
            "clean leases were not given back by the word alone: {counts:?}"
        );
        Ok(())
    })
}

/// More files than entries: leases of those not used lately are taken back from the kernel, and nothing else happens.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn more_files_than_entries() -> anyhow::Result<()> {
    const FILES: usize = 400;
    let small = Options {
        lease_table: 64,
        ..options()
    };
    guard::with_cluster(small, |cluster| {
        let content = |i: usize| format!("{i}").repeat(10 + i % 400);
        let (a, b) = (cluster.mount(0).join("d"), cluster.mount(1).join("d"));
        fs::create_dir(&a)?;
        // Kept open, so that the kernel has dirty pages of all of them.
        let mut files = Vec::new();
        for i in 0..FILES {
            let mut file = File::create(a.join(format!("f{i}")))?;
            file.write_all(content(i).as_bytes())?;
            files.push(file);
        }
        for i in 0..FILES {
            let name = format!("f{i}");
            ensure!(
                fs::read_to_string(b.join(&name))? == content(i),
                "{name} on the other mount"
            );
            ensure!(
                fs::read_to_string(a.join(&name))? == content(i),
                "{name} on its own mount"
            );
        }
        Ok(())
    })
}

/// A mount dies with dirty pages: its processes get errors, everything else goes on, and what it had not written is
/// not half there.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_mount_that_is_killed_with_dirty_pages() -> anyhow::Result<()> {
    const PAGE: usize = 4096;
    const TEXT: &[u8] = b"in the mapping";
    guard::with_cluster(options(), |cluster| {
        let (mine, other) = (cluster.mount(0).join("f"), cluster.mount(1));
        // In a directory of its own: the root's lease is the dead mount's, which makes a file in it.
        let theirs = other.join("theirs");
        fs::create_dir(&theirs)?;
        fs::write(theirs.join("f"), b"goes on")?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&mine)?;
        let (fsynced, written) = (vec![b'a'; 20_000], vec![b'b'; 20_000]);
        let mut mapped = written.clone();
        mapped[100..][..TEXT.len()].copy_from_slice(TEXT);
        file.write_all(&fsynced)?;
        file.sync_all()?;
        file.write_all_at(&written, 0)?;
        let map = sys::Map::writable(&file, 16_384).context("mmap")?;
        map.write(100, TEXT);
        std::env::set_current_dir(&theirs)?;
        cluster.kill(Role::Mount(0));
        let start = Instant::now();
        let write = file.write_at(b"x", 0);
        let sync = file.sync_all();
        ensure!(
            write.is_err() && sync.is_err(),
            "written without a daemon: {write:?} {sync:?}"
        );
        ensure!(
            start.elapsed() < Duration::from_secs(20),
            "errors after {:?}",
            start.elapsed()
        );
        drop(map);
        drop(file);
        // The lease it died with: bounded, then an error; or, once all of it is recovered, one state or the other.
        // The kernel writes page by page: each is as it was at one moment, and none has some of both.
        let whole = |data: &[u8]| {
            let page = |n: usize| n * PAGE..((n + 1) * PAGE).min(fsynced.len());
            data.len() == fsynced.len()
                && (0..data.len().div_ceil(PAGE)).map(page).all(|range| {
                    let states = [&fsynced, &written, &mapped];
                    states
                        .iter()
                        .any(|state| state[range.clone()] == data[range.clone()])
                })
        };
        match fs::read(other.join("f")) {
            Ok(data) => ensure!(whole(&data), "what the file never was"),
            Err(error) => ensure!(
                start.elapsed() < Duration::from_secs(40),
                "{error} after {:?}",
                start.elapsed()
            ),
        }
        // From within: the way there leads through the root.
        ensure!(fs::read("f")? == b"goes on", "the other mount's own files");
        fs::write("more", b"more")?;
        std::env::set_current_dir("/")?;
        // The other mount cannot leave while leases are a dead one's; a new start of all of them finds the file whole.
        cluster.restart_after_abort()?;
        for mount in 0..2 {
            ensure!(
                whole(&fs::read(cluster.mount(mount).join("f"))?),
                "not what was fsynced, nor what came after"
            );
        }
        Ok(())
    })
}

/// A program that copies only what is not a hole must find what the server has not been given yet.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn no_holes_where_something_is_not_flushed_yet() -> anyhow::Result<()> {
    const AT: u64 = 1 << 20;
    let seek = |file: &File, from: u64, whence| {
        // SAFETY: an open descriptor; nothing else is passed.
        let found = unsafe { libc::lseek(std::os::fd::AsRawFd::as_raw_fd(file), from as i64, whence) };
        u64::try_from(found).map_err(|_| std::io::Error::last_os_error())
    };
    guard::with_cluster(options(), move |cluster| {
        for round in 0..20 {
            let name = format!("f{round}");
            let file = File::create(cluster.mount(0).join(&name))?;
            let reader = File::open(cluster.mount(0).join(&name))?;
            file.write_all_at(&[1; 65_536], AT)?;
            let (data, hole) = (
                seek(&reader, 0, libc::SEEK_DATA)?,
                seek(&reader, AT, libc::SEEK_HOLE)?,
            );
            ensure!(
                data <= AT && hole >= AT + 65_536,
                "data at {data}, a hole at {hole}"
            );
            file.write_all_at(&[2; 4096], 2 * AT)?;
            let other = File::open(cluster.mount(1).join(&name))?;
            let data = seek(&other, AT + 262_144, libc::SEEK_DATA)?;
            ensure!(data <= 2 * AT, "on the other mount: data at {data}");
        }
        Ok(())
    })
}

/// What the kernel knows of a file it may drop, and learn again while it has been delegated the same lease: that must not be as
/// the file was when it was delegated.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_size_survives_the_kernels_inode() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let (first, second) = (cluster.mount(0).join("f"), cluster.mount(1).join("f"));
        let append = |path: &Path, bytes: usize| {
            let mut file = File::options().append(true).open(path)?;
            file.write_all(&vec![7; bytes])
        };
        for round in 0..200u64 {
            fs::write(&first, [1; 10_000])?;
            append(&second, 20_000)?;
            // The other one only reads, so a shared lease stays here. In half of the rounds nobody asks.
            if round % 2 == 0 {
                ensure!(fs::metadata(&first)?.len() == 30_000, "on the other mount");
            }
            // Names, and with them inodes that nobody has open.
            fs::write("/proc/sys/vm/drop_caches", "2")?;
            let (size, bytes) = (fs::metadata(&second)?.len(), fs::read(&second)?.len());
            ensure!(
                (size, bytes) == (30_000, 30_000),
                "round {round}: {size}, {bytes} bytes"
            );
        }
        Ok(())
    })
}
