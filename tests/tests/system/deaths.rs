//! A mount dies, stops or is evicted while it holds what others want: they go on, and nothing of it lands later.
//!
//! The numbers are those of the cases to survive in `docs/failures.md`.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use system_tests::cluster::{Cache, Fabric, Options, Role};
use system_tests::{guard, sys};

const LIMIT: Duration = Duration::from_secs(120);
const TERM: Duration = Duration::from_secs(2);
const LEN: usize = 100_000;

fn options(fabric: Fabric, cache: Cache) -> Options {
    Options {
        fabric,
        cache,
        term: TERM,
        ..Options::default()
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) -> anyhow::Result<Duration> {
    let start = Instant::now();
    while !holds() {
        ensure!(start.elapsed() < LIMIT / 3, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(start.elapsed())
}

/// The first mount has the root directory and two files exclusively: one fsynced, and changed since, the other not stored at all.
fn hold(dir: &Path) -> anyhow::Result<(File, File)> {
    let durable = File::create_new(dir.join("durable"))?;
    durable.write_all_at(&[1; LEN], 0)?;
    durable.sync_all()?;
    File::open(dir)?.sync_all()?;
    durable.write_all_at(&[2; LEN / 2], LEN as u64 / 2)?;
    // Beyond the end that anybody was told of.
    durable.write_all_at(&[3; LEN], 3 * LEN as u64)?;
    let lost = File::create_new(dir.join("lost"))?;
    lost.write_all_at(&[4; 10], 0)?;
    Ok((durable, lost))
}

/// The second mount finds what was durable and nothing else, and can use everything.
fn take_over(dir: &Path) -> anyhow::Result<()> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(dir.join("durable"))?;
    let size = file.metadata()?.len();
    ensure!(size >= LEN as u64, "{size} bytes of {LEN} that were fsynced");
    let bytes = sys::read_at(&file, 0, LEN)?;
    ensure!(
        bytes[..LEN / 2] == [1; LEN / 2],
        "what was fsynced and not changed since is lost"
    );
    ensure!(
        bytes[LEN / 2..].iter().all(|b| [1, 2].contains(b)),
        "neither old nor new"
    );
    // Bytes past the end are zero again.
    file.set_len(5 * LEN as u64)?;
    let end = sys::read_at(&file, size, 5 * LEN - size as usize)?;
    ensure!(
        end.iter().all(|b| *b == 0),
        "a byte beyond the end of file is not zero"
    );
    file.write_all_at(&[7; LEN], 0)?;
    file.sync_all()?;
    fs::write(dir.join("new"), "new")?;
    fs::rename(dir.join("new"), dir.join("newer"))?;
    // Its name was not made durable either: the metadata server may not have been told of it.
    match fs::remove_file(dir.join("lost")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

fn killed(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    guard::with_cluster_within(LIMIT, options(fabric, cache), move |cluster| {
        let held = hold(&cluster.mount(0))?;
        cluster.kill(Role::Mount(0));
        let start = Instant::now();
        take_over(&cluster.mount(1))?;
        // Far less than the term: the death was noticed. How long it takes is measured elsewhere.
        println!("{fabric:?} {cache:?}: usable after {:?}", start.elapsed());
        drop(held);
        // The same host mounts again at once, and everything is there.
        cluster.start_role(Role::Mount(0))?;
        let bytes = sys::read_at(&File::open(cluster.mount(0).join("durable"))?, 0, LEN)?;
        ensure!(bytes == [7; LEN], "another mount's fsynced data are not there");
        Ok(())
    })
}

/// Cases 7, 13, 18, 23.
#[test]
fn a_killed_mount_blocks_nobody() -> anyhow::Result<()> {
    killed(Fabric::Shm, Cache::Direct)?;
    killed(Fabric::Tcp, Cache::Writethrough)
}

/// Requests wait for what the dead had on every thread there is for waiting: their mount gets to the epoch all the same.
#[test]
fn a_death_that_hundreds_of_requests_wait_for() -> anyhow::Result<()> {
    const FILES: usize = 400;
    let options = Options {
        lease_wait: Duration::from_secs(20),
        term: Duration::from_secs(60),
        ..options(Fabric::Tcp, Cache::Direct)
    };
    guard::with_cluster_within(LIMIT, options, |cluster| {
        for n in 0..FILES {
            let mut file = File::create_new(cluster.mount(0).join(n.to_string()))?;
            file.write_all(n.to_string().as_bytes())?;
            file.sync_all()?;
        }
        // The directory's lease is not in the way.
        fs::read_dir(cluster.mount(1))?.for_each(drop);
        cluster.signal(Role::Mount(0), Signal::STOP)?;
        let readers: Vec<_> = (0..FILES)
            .map(|n| {
                let file = cluster.mount(1).join(n.to_string());
                std::thread::spawn(move || fs::read(file))
            })
            .collect();
        until("all threads of the mount to wait", || {
            cluster.total("waiting").is_ok_and(|waiting| waiting >= 256)
        })?;
        cluster.kill(Role::Mount(0));
        for (n, reader) in readers.into_iter().enumerate() {
            let read = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
            let read = read.with_context(|| format!("file {n}"))?;
            ensure!(read == n.to_string().as_bytes(), "file {n} is another's");
        }
        Ok(())
    })
}

/// Cases 11, 15: it comes back to find that it was declared dead, and nothing of its former life lands.
fn stopped(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    guard::with_cluster_within(LIMIT, options(fabric, cache), move |cluster| {
        let held = hold(&cluster.mount(0))?;
        cluster.signal(Role::Mount(0), Signal::STOP)?;
        let start = Instant::now();
        take_over(&cluster.mount(1))?;
        println!("{fabric:?} {cache:?}: usable after {:?}", start.elapsed());
        let node = cluster.mount(1).join("durable");
        cluster.signal(Role::Mount(0), Signal::CONT)?;
        // What the former life still has open fails; it neither hangs nor lands.
        let late = held.0.write_all_at(&[9; LEN], 0).and_then(|()| held.0.sync_all());
        ensure!(
            late.is_err(),
            "a write of a mount that was declared dead was acknowledged"
        );
        drop(held);
        let again = cluster.mount(0).join("durable");
        let back = until("the mount to begin anew", || {
            fs::read(&again).is_ok_and(|bytes| bytes[..LEN] == [7; LEN])
        })?;
        println!("{fabric:?} {cache:?}: serves again after {back:?}");
        ensure!(
            fs::read(&node)?[..LEN] == [7; LEN],
            "something of the former life has landed"
        );
        fs::write(&again, "mine again")?;
        ensure!(
            fs::read(&node)? == b"mine again",
            "the new life is not like any other mount"
        );
        Ok(())
    })
}

#[test]
fn a_stopped_mount_begins_anew() -> anyhow::Result<()> {
    stopped(Fabric::Tcp, Cache::Direct)?;
    stopped(Fabric::Shm, Cache::Writethrough)
}

/// A program that has a file open, and writes to it when it is told. In a process of its own: one that starts others closes its files
/// in them, and that waits for a daemon that is stopped.
struct Writer(Child);

impl Writer {
    fn start(file: &Path) -> anyhow::Result<Self> {
        let child = Command::new("sh")
            .arg("-c")
            .arg("exec 9<>\"$0\" && echo open && read go && if printf late >&9; then echo written; else echo failed; fi")
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut me = Self(child);
        ensure!(me.hears()? == "open", "the file cannot be opened");
        Ok(me)
    }

    fn hears(&mut self) -> anyhow::Result<String> {
        let out = self.0.stdout.as_mut().context("an output")?;
        let (mut line, mut byte) = (String::new(), [0]);
        while out.read(&mut byte)? == 1 && byte != *b"\n" {
            line.push(byte[0].into());
        }
        Ok(line)
    }

    fn write(&mut self) -> anyhow::Result<String> {
        self.0.stdin.as_mut().context("an input")?.write_all(b"go\n")?;
        self.hears()
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Case 8: at once, not after a term; case 9: its owner is told.
#[test]
fn an_evicted_mount_gives_everything_up() -> anyhow::Result<()> {
    let options = Options {
        term: Duration::from_secs(60),
        ..options(Fabric::Tcp, Cache::Direct)
    };
    guard::with_cluster_within(LIMIT, options, |cluster| {
        drop(hold(&cluster.mount(0))?);
        let mut writer = Writer::start(&cluster.mount(0).join("durable"))?;
        cluster.signal(Role::Mount(0), Signal::STOP)?;
        let config = cluster.config().display().to_string();
        let start = Instant::now();
        let said = cluster.tool(&["evict", "0", "--config", &config])?;
        println!("after {:?}: {said}", start.elapsed());
        take_over(&cluster.mount(1))?;
        cluster.signal(Role::Mount(0), Signal::CONT)?;
        ensure!(
            writer.write()? == "failed",
            "a write of a mount that was declared dead was acknowledged"
        );
        until("the mount to begin anew", || {
            fs::read(cluster.mount(0).join("durable")).is_ok_and(|bytes| bytes[..LEN] == [7; LEN])
        })?;
        Ok(())
    })
}

/// A program that stores to a mapped file without end, and says how far it has got with msync.
struct Mapper(Child, BufReader<ChildStdout>);

impl Mapper {
    fn start(file: &Path, pages: usize) -> anyhow::Result<Self> {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mapper"))
            .arg(file)
            .arg(pages.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let out = child.stdout.take().context("an output")?;
        Ok(Self(child, BufReader::new(out)))
    }

    /// How far it has got next; none: it has ended.
    fn next(&mut self) -> anyhow::Result<Option<u64>> {
        let mut line = String::new();
        self.1.read_line(&mut line)?;
        Ok(match line.trim() {
            "" => None,
            number => Some(number.parse()?),
        })
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Case 10: a mount is evicted while a program stores to a mapping. What msync has returned for is there, page by page; nothing
/// of it lands later; the program ends or fails.
fn evicted_while_mapped(fabric: Fabric, stop: bool) -> anyhow::Result<()> {
    const PAGES: usize = 64;
    const PAGE: usize = 4096;
    guard::with_cluster_within(LIMIT, options(fabric, Cache::Writethrough), move |cluster| {
        let (file, seen) = (cluster.mount(0).join("mapped"), cluster.mount(1).join("mapped"));
        fs::write(&file, vec![0; PAGES * PAGE])?;
        File::open(&file)?.sync_all()?;
        File::open(cluster.mount(0))?.sync_all()?;
        let mut mapper = Mapper::start(&file, PAGES)?;
        let mut done = 0;
        while done < 20 {
            done = mapper.next()?.context("the program has ended by itself")?;
        }
        if stop {
            cluster.signal(Role::Mount(0), Signal::STOP)?;
        }
        let config = cluster.config().display().to_string();
        cluster.tool(&["evict", "0", "--config", &config])?;
        let found = fs::read(&seen)?;
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let pages: Vec<u64> = found.chunks(PAGE).map(number).collect();
        let theirs = vec![0xee; PAGES * PAGE];
        fs::write(&seen, &theirs)?;
        File::open(&seen)?.sync_all()?;
        if stop {
            cluster.signal(Role::Mount(0), Signal::CONT)?;
        }
        // It ends: the file that it has mapped is no longer there.
        while let Some(number) = mapper.next()? {
            done = number;
        }
        let ended = mapper.0.wait()?;
        ensure!(!ended.success(), "the program does not know: {ended}");
        println!(
            "{fabric:?}: msync {done}, found {:?}, {ended}",
            (pages.iter().min(), pages.iter().max())
        );
        ensure!(
            pages.len() == PAGES && pages.iter().all(|&page| page >= done),
            "msync has returned for {done}, and found is {pages:?}"
        );
        until("the mount to begin anew", || {
            fs::read(&file).is_ok_and(|bytes| bytes == theirs)
        })?;
        ensure!(
            fs::read(&seen)? == theirs,
            "something of the former life has landed"
        );
        Ok(())
    })
}

#[test]
fn an_evicted_mount_whose_files_are_mapped() -> anyhow::Result<()> {
    for stop in [false, true] {
        evicted_while_mapped(Fabric::Tcp, stop)?;
        evicted_while_mapped(Fabric::Shm, stop)?;
    }
    Ok(())
}

/// While the metadata server is away nothing is answered from caches past the term; then everything goes on with what it had.
#[test]
fn a_frozen_mount_thaws_with_all_it_had() -> anyhow::Result<()> {
    guard::with_cluster_within(LIMIT, options(Fabric::Tcp, Cache::Direct), |cluster| {
        drop(hold(&cluster.mount(0))?);
        cluster.kill(Role::Meta);
        std::thread::sleep(TERM * 2);
        let file = cluster.mount(0).join("lost");
        let reader = std::thread::spawn(move || fs::read(file));
        std::thread::sleep(TERM / 4);
        ensure!(!reader.is_finished(), "a frozen mount has answered");
        cluster.start_role(Role::Meta)?;
        let read = reader
            .join()
            .map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        ensure!(read? == [4; 10], "what was not stored is lost though nobody died");
        let durable = cluster.mount(0).join("durable");
        let file = OpenOptions::new().write(true).open(durable)?;
        file.write_all_at(&[5; LEN], 0)?;
        file.sync_all()?;
        let seen = fs::read(cluster.mount(1).join("durable"))?;
        ensure!(seen[..LEN] == [5; LEN], "the other mount sees something else");
        Ok(())
    })
}
