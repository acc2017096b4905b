//! The daemon's term: past its end nothing is answered from what the kernel has.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use anyhow::{Result, ensure};
use distfuse_abi::Mode;

use super::{ensure_eq, names::grant_root, read_at};
use crate::fixture::{Fixture, Task, WHILE, ino, until};
use crate::memory::Mapping;

/// A term that is over soon.
const SHORT: Duration = Duration::from_millis(700);
/// By now it is over, and so is what the module does then.
const OVER: Duration = Duration::from_millis(2500);

/// The end of one that begins now.
fn end_in(time: Duration) -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs() as u32);
    u64::try_from((now + time).as_nanos()).unwrap_or(u64::MAX)
}

pub fn over() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    grant_root(&fixture, 1)?;
    // f0 is dirty, and in the page cache; f1 is clean, and mapped.
    let (dirty, clean) = (fixture.open(0, "f0")?, fixture.open(0, "f1")?);
    dirty.write_all_at(&[b'd'; 4096], 0)?;
    read_at(&clean, 0, 65536)?;
    fs::metadata(fixture.path(0, "f1"))?;
    manager.automatic.store(false, SeqCst);
    manager.mount(0)?.set_term(0);
    let lookups = fixture.control.block().lookups.load(SeqCst);
    ensure!(
        fixture
            .path(0, "f1")
            .parent()
            .is_some_and(std::path::Path::exists),
        "root"
    );
    let (a, b, c, d) = (
        dirty.try_clone()?,
        dirty.try_clone()?,
        clean.try_clone()?,
        clean.try_clone()?,
    );
    let rewrite = Task::start(move || a.write_all_at(b"x", 5));
    let append = Task::start(move || b.write_all_at(&[b'y'; 8192], 65536));
    let read = Task::start(move || read_at(&c, 0, 10));
    let end_of_file = Task::start(move || read_at(&d, 65536, 10));
    let path = fixture.path(0, "f1");
    let stat = Task::start(move || fs::metadata(path));
    rewrite.waits("a write into a dirty page")?;
    append.waits("a longer write")?;
    read.waits("a read of what is cached")?;
    end_of_file.waits("a read at the end of the file")?;
    stat.waits("stat")?;
    ensure!(
        fixture.control.block().lookups.load(SeqCst) > lookups,
        "the server is not asked for a name"
    );
    manager.mount(0)?.set_term(end_in(Duration::from_secs(3600)));
    for n in 0..2 {
        manager.give(0, ino(n), Mode::Exclusive)?;
    }
    // It may have asked for space.
    manager.automatic.store(true, SeqCst);
    manager.carry_out(0)?;
    rewrite.end("the write")??;
    append.end("the longer write")??;
    ensure_eq!(read.end("the read")??, vec![b'b'; 10], "what is read");
    ensure_eq!(
        end_of_file.end("the read at the end")??.len(),
        0,
        "bytes behind the end"
    );
    ensure_eq!(stat.end("stat")??.len(), 65536, "size");
    ensure_eq!(read_at(&dirty, 4, 3)?, b"dxd".to_vec(), "what was written");
    ensure_eq!(
        dirty.metadata()?.len(),
        65536 + 8192,
        "size after the longer write"
    );
    drop((dirty, clean));
    fixture.end()
}

/// What is in page tables is read without asking: it has to be taken out of them in time.
pub fn mapped() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let files = [fixture.open(0, "f0")?, fixture.open(0, "f1")?];
    let maps: Vec<_> = files
        .iter()
        .map(|file| Ok(Arc::new(Mapping::new(file, 65536)?)))
        .collect::<Result<_>>()?;
    for round in 1..=3u8 {
        manager.mount(0)?.set_term(end_in(SHORT));
        manager.automatic.store(true, SeqCst);
        let last = if round == 1 { b'a' } else { round - 1 };
        ensure_eq!(maps[0].get(9), last, "contents in round {round}");
        maps[1].set(9, round);
        manager.automatic.store(false, SeqCst);
        std::thread::sleep(OVER);
        let (read, written) = (Arc::clone(&maps[0]), Arc::clone(&maps[1]));
        let read = Task::start(move || read.get(9));
        let written = Task::start(move || written.set(9, b'w'));
        read.waits("a read of a mapping")?;
        written.waits("a store to a mapping")?;
        // The mount is heard of again, and meanwhile another one has written.
        manager.mount(0)?.set_term(u64::MAX);
        manager.replace(0, ino(0), || fixture.control.write(ino(0), 9, &[round]))?;
        manager.give(0, ino(0), Mode::Shared)?;
        manager.give(0, ino(1), Mode::Exclusive)?;
        ensure_eq!(read.end("the read")?, round, "what another mount wrote");
        written.end("the store")?;
        ensure_eq!(maps[1].get(9), b'w', "what was stored");
    }
    let counters = manager.mount(0)?.counters();
    ensure!(counters.term_unmaps >= 6, "{counters:?}");
    manager.automatic.store(true, SeqCst);
    drop(maps);
    drop(files);
    fixture.end()
}

/// What the server is asked for within the term, and answers after it.
pub fn slept() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    for kind in ["read", "map", "write"] {
        let (file, answered) = (fixture.open(0, "f2")?, Arc::new(AtomicBool::new(false)));
        manager.mount(0)?.set_term(u64::MAX);
        manager.automatic.store(true, SeqCst);
        manager.replace(0, ino(2), || fixture.control.write(ino(2), 0, &[b'c'; 65536]))?;
        manager.give(0, ino(2), Mode::Exclusive)?;
        manager.automatic.store(false, SeqCst);
        let reads = block.reads.load(SeqCst);
        block.read_delay.store(OVER.as_millis() as u64, SeqCst);
        manager.mount(0)?.set_term(end_in(SHORT));
        let done = Arc::clone(&answered);
        let task = Task::start(move || -> Result<()> {
            match kind {
                "read" => ensure_eq!(read_at(&file, 0, 3)?, b"ccc".to_vec(), "what is read"),
                // A part of a page of which nothing is cached.
                "write" => file.write_all_at(b"new", 8200)?,
                _ => {
                    let map = Mapping::new(&file, 4096)?;
                    let got = map.get(0);
                    done.store(true, SeqCst);
                    ensure_eq!(got, b'c', "what is mapped");
                }
            }
            done.store(true, SeqCst);
            Ok(())
        });
        until("the server is asked", || block.reads.load(SeqCst) > reads)?;
        std::thread::sleep(OVER + OVER / 5 + WHILE);
        ensure!(
            !answered.load(SeqCst),
            "a {kind} that slept past the end of the term is not found out"
        );
        block.read_delay.store(0, SeqCst);
        manager.mount(0)?.set_term(u64::MAX);
        manager.automatic.store(true, SeqCst);
        manager.carry_out(0)?;
        manager.give(0, ino(2), Mode::Exclusive)?;
        task.end(kind)??;
    }
    fixture.end()
}

pub fn killed() -> Result<()> {
    let fixture = Fixture::plain()?;
    let manager = fixture.manager()?;
    let file = fixture.open(0, "f1")?;
    file.write_all_at(b"x", 0)?;
    manager.automatic.store(false, SeqCst);
    manager.mount(0)?.set_term(0);
    for kind in ["read", "write", "map", "store"] {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("touch")
            .arg(kind)
            .arg(fixture.path(0, "f1"))
            .spawn()?;
        std::thread::sleep(WHILE);
        ensure!(child.try_wait()?.is_none(), "{kind} does not wait");
        child.kill()?;
        until("killed", || matches!(child.try_wait(), Ok(Some(_))))?;
    }
    // Nor does a revocation wait for them.
    manager.mount(0)?.set_term(u64::MAX);
    manager.take(0, ino(1), Mode::None)?;
    drop(file);
    manager.automatic.store(true, SeqCst);
    fixture.end()
}
