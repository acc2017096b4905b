//! Space: what is written has been promised to be storable, or is not written.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus};
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, Result, ensure};
use distfuse_abi::{Act, Answer, Call, Command as Order, Mode, Options, layout};

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, Task, all, ino, until};
use crate::manager::Manager;
use crate::memory::Mapping;

const PAGE: u64 = 4096;

/// A mount with the exclusive lease of file 0, of which `space` can be stored. The file's beginning is in the page cache.
fn lent(space: (u64, u64)) -> Result<(Fixture, File)> {
    // Files can be opened without a lease.
    let options = Options {
        access: false,
        ..all()
    };
    let fixture = Fixture::new(1, Some(&options))?;
    let file = fixture.open(0, "f0")?;
    let manager = fixture.manager()?;
    *manager.space.lock() = space;
    read_at(&file, 0, 65536)?;
    manager.give(0, ino(0), Mode::Exclusive)?;
    manager.automatic.store(false, SeqCst);
    Ok((fixture, file))
}

fn asked(manager: &Manager) -> Result<u64> {
    Ok(manager.mount(0)?.counters().space_asked)
}

fn next(manager: &Manager) -> Result<Call> {
    until("asked", || !manager.asked.lock().is_empty())?;
    let call = manager.asked.lock().pop().context("a call")?;
    ensure_eq!(call.act, Act::Space, "the call");
    Ok(call)
}

fn answer(manager: &Manager, asked: &Call, answer: Answer) -> Result<()> {
    let call = asked.number;
    Ok(manager.mount(0)?.command(Order::Answer { call, answer })?)
}

/// Says that there is space up to `to`.
fn promise(manager: &Manager, asked: &Call, to: u64) -> Result<()> {
    manager.mount(0)?.table().set_space(ino(0), (0, to));
    let covered = u32::try_from(to - asked.offset)?.min(asked.len);
    answer(manager, asked, Answer::Done(covered))
}

fn writer(file: &File, bytes: u64, at: u64) -> Result<Task<std::result::Result<usize, Option<i32>>>> {
    let file = file.try_clone()?;
    Ok(Task::start(move || {
        let data = vec![b'w'; bytes as usize];
        file.write_at(&data, at).map_err(|error| error.raw_os_error())
    }))
}

pub fn range() -> Result<()> {
    let (fixture, file) = lent((PAGE, 4 * PAGE))?;
    let manager = fixture.manager()?;
    let events = manager.events.load(SeqCst);
    for at in [PAGE, 2 * PAGE + 100, 4 * PAGE - 10] {
        file.write_all_at(&[b'w'; 10], at)?;
    }
    ensure_eq!(manager.events.load(SeqCst), events, "events where there is space");
    // Before it, across its end, behind it.
    for (at, len, lacks) in [
        (0, 10, 0),
        (4 * PAGE - 10, 20, 4 * PAGE - 10),
        (9 * PAGE, PAGE, 9 * PAGE),
    ] {
        let before = asked(manager)?;
        manager.mount(0)?.table().set_space(ino(0), (PAGE, 4 * PAGE));
        let writing = writer(&file, len, at)?;
        let call = next(manager)?;
        writing.waits("a write that has no space")?;
        ensure_eq!(call.offset, lacks, "asked for");
        promise(manager, &call, 12 * PAGE)?;
        ensure_eq!(writing.end("the write")?, Ok(len as usize), "written");
        ensure_eq!(asked(manager)?, before + 1, "questions");
    }
    // The lease goes while it is asked.
    manager.mount(0)?.table().set_space(ino(0), (0, PAGE));
    let writing = writer(&file, 10, PAGE)?;
    let call = next(manager)?;
    manager.take(0, ino(0), Mode::None)?;
    *manager.space.lock() = (0, u64::MAX);
    let needs = manager.needs.load(SeqCst);
    answer(manager, &call, Answer::Again)?;
    until("the lease is asked for", || manager.needs.load(SeqCst) > needs)?;
    manager.give(0, ino(0), Mode::Exclusive)?;
    ensure_eq!(writing.end("the write")?, Ok(10), "written");
    manager.take(0, ino(0), Mode::None)?;
    ensure_eq!(
        fixture.control.read(ino(0), PAGE, 10)?,
        vec![b'w'; 10],
        "at the server"
    );
    drop(file);
    fixture.end()
}

pub fn full() -> Result<()> {
    let (fixture, file) = lent((0, 4 * PAGE))?;
    let manager = fixture.manager()?;
    // There is space for the first part of it: a short write.
    let writing = writer(&file, 4 * PAGE, 2 * PAGE + 50)?;
    let call = next(manager)?;
    ensure_eq!(
        (call.offset, call.len),
        (2 * PAGE + 50, 4 * 4096),
        "asked for ahead"
    );
    promise(manager, &call, 5 * PAGE)?;
    let call = next(manager)?;
    ensure_eq!(call.offset, 5 * PAGE, "asked for");
    answer(manager, &call, Answer::Failed(libc::ENOSPC))?;
    ensure_eq!(
        writing.end("the write")?,
        Ok((3 * PAGE - 50) as usize),
        "bytes written"
    );
    let writing = writer(&file, 100, 5 * PAGE)?;
    answer(manager, &next(manager)?, Answer::Failed(libc::ENOSPC))?;
    ensure_eq!(writing.end("the write")?, Err(Some(libc::ENOSPC)), "a full pool");
    // An answer of nothing is no space, either.
    let writing = writer(&file, 100, 5 * PAGE)?;
    answer(manager, &next(manager)?, Answer::Done(0))?;
    ensure_eq!(writing.end("the write")?, Err(Some(libc::ENOSPC)), "no bytes");
    // At the end of the file, which is known under the lease.
    let appending = fixture.open_with(0, "f0", libc::O_APPEND)?;
    let writing = writer(&appending, 100, 0)?;
    let call = next(manager)?;
    ensure_eq!((call.offset, call.len), (65536, 100), "appended");
    answer(manager, &call, Answer::Failed(libc::ENOSPC))?;
    ensure_eq!(writing.end("the append")?, Err(Some(libc::ENOSPC)), "a full pool");
    ensure_eq!(file.metadata()?.len(), 65536, "size");
    let error = file.sync_all().err().and_then(|error| error.raw_os_error());
    ensure_eq!(error, None, "fsync");
    drop((file, appending));
    fixture.end()
}

/// Another task of the mount appends whenever one that appends has asked for space ahead, so where that goes is guessed wrong
/// each time, until it is tried: then it is asked for all of it, and not for what lies behind the page that there is space for.
pub fn whole() -> Result<()> {
    let (fixture, file) = lent((0, 65536))?;
    let manager = fixture.manager()?;
    let appending = fixture.open_with(0, "f0", libc::O_APPEND)?;
    let other = fixture.open_with(0, "f0", libc::O_APPEND)?;
    let mut end = 65536;
    let writing = writer(&appending, 2 * PAGE, 0)?;
    let mut last = next(manager)?;
    for guess in 1..=3 {
        ensure_eq!((last.offset, last.len), (end, 2 * PAGE as u32), "guess {guess}");
        // As much as was asked for, of which the other one takes some.
        manager.mount(0)?.table().set_space(ino(0), (0, end + 2 * PAGE));
        other.write_all_at(&[b'o'; 100], 0)?;
        end += 100;
        answer(manager, &last, Answer::Done(2 * PAGE as u32))?;
        last = next(manager)?;
    }
    ensure_eq!(
        (last.offset, last.len),
        (end, 2 * PAGE as u32),
        "asked for at last"
    );
    // Nothing of it is there: who appends meanwhile does so behind what is whole.
    other.write_all_at(&[b'o'; 100], 0)?;
    end += 100;
    promise(manager, &last, end + 8 * PAGE)?;
    ensure_eq!(writing.end("the append")?, Ok(2 * PAGE as usize), "written");
    let tail = read_at(&file, 65536, (end + 2 * PAGE - 65536) as usize)?;
    let (others, whole) = tail.split_at((end - 65536) as usize);
    ensure!(others.iter().all(|&b| b == b'o'), "the others' appends");
    ensure!(
        whole.len() == 2 * PAGE as usize && whole.iter().all(|&b| b == b'w'),
        "the append is torn"
    );
    drop((file, appending, other));
    manager.automatic.store(true, SeqCst);
    fixture.end()
}

fn touch(fixture: &Fixture, kind: &str) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    Ok(command
        .arg("touch")
        .arg(kind)
        .arg(fixture.path(0, "f0"))
        .spawn()?)
}

fn end_of(mut child: Child) -> Result<ExitStatus> {
    let mut status = None;
    until("ended", || {
        status = child.try_wait().ok().flatten();
        status.is_some()
    })?;
    status.context("no status")
}

pub fn mapped() -> Result<()> {
    let (fixture, file) = lent((0, 0))?;
    let manager = fixture.manager()?;
    // With nothing in the page table, and with a page there that was read before.
    for kind in ["store", "load-store"] {
        let mut child = touch(&fixture, kind)?;
        let (mut status, mut told) = (None, Ok(()));
        // Perhaps more than once: the first time the fault may come under another lock.
        until("ended", || {
            while let Some(call) = manager.asked.lock().pop() {
                told = answer(manager, &call, Answer::Failed(libc::ENOSPC));
            }
            status = child.try_wait().ok().flatten();
            status.is_some()
        })?;
        told?;
        let status = status.context("no status")?;
        ensure_eq!(status.signal(), Some(libc::SIGBUS), "{kind} without space");
    }
    let map = Mapping::new(&file, 65536)?;
    ensure_eq!(map.get(5000), b'a', "contents");
    let map = std::sync::Arc::new(map);
    let storing = std::sync::Arc::clone(&map);
    let storing = Task::start(move || storing.set(5000, b'm'));
    let call = next(manager)?;
    ensure_eq!((call.offset, call.len), (PAGE, PAGE as u32), "asked for");
    storing.waits("a store without space")?;
    // Others of this process go on meanwhile.
    let other = fixture.open(0, "f1")?;
    drop(Task::start(move || Mapping::new(&other, 4096)).end("another mmap")??);
    promise(manager, &call, 2 * PAGE)?;
    storing.end("the store")?;
    let before = asked(manager)?;
    map.set(6000, b'm');
    map.set(10, b'm');
    ensure_eq!(asked(manager)?, before, "questions where there is space");
    manager.take(0, ino(0), Mode::None)?;
    ensure_eq!(
        fixture.control.read(ino(0), 5000, 1)?,
        vec![b'm'],
        "at the server"
    );
    manager.automatic.store(true, SeqCst);
    drop(map);
    drop(file);
    fixture.end()
}

pub fn ends() -> Result<()> {
    let (mut fixture, file) = lent((0, 0))?;
    let manager = fixture.manager()?;
    let mut child = touch(&fixture, "write")?;
    let lost = next(manager)?;
    child.kill()?;
    end_of(child)?;
    // Its number is the daemon's still. All the others are taken, and one more waits for any.
    let most = layout::SPACE_CALLS as usize;
    let writing: Vec<_> = (0..most).map(|_| writer(&file, 10, 0)).collect::<Result<_>>()?;
    until("all asked", || manager.asked.lock().len() == most - 1)?;
    std::thread::sleep(crate::fixture::WHILE);
    ensure_eq!(manager.asked.lock().len(), most - 1, "questions at a time");
    // And one that waits can be killed.
    let mut child = touch(&fixture, "write")?;
    std::thread::sleep(crate::fixture::WHILE);
    child.kill()?;
    end_of(child)?;
    answer(manager, &lost, Answer::Done(1))?;
    until("the last one has asked", || manager.asked.lock().len() == most)?;
    // Answers that nobody waits for do nothing.
    answer(manager, &Call { number: 7777, ..lost }, Answer::Done(1))?;
    let calls = std::mem::take(&mut *manager.asked.lock());
    let (told, left) = calls.split_at(most / 2);
    for call in told {
        answer(manager, call, Answer::Failed(libc::EDQUOT))?;
    }
    let ended = || writing.iter().filter(|task| task.is_over()).count();
    until("answered", || ended() == told.len())?;
    fixture.detach();
    let mut gone = 0;
    for task in writing {
        match task.end("a write")? {
            Err(Some(libc::EDQUOT)) => {}
            Err(Some(libc::ENOTCONN)) => gone += 1,
            other => ensure!(false, "{other:?}"),
        }
    }
    ensure_eq!(gone, left.len(), "writes without a daemon");
    drop(file);
    fixture.end()
}
