//! Calls: reads and writes that the daemon does.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, Result, ensure};
use distfuse_abi::{Act, Answer, Call, Command as Order, Mode, Options, layout};

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, Task, all, ino, until};
use crate::manager::Manager;

fn options(buffers: u32) -> Options {
    Options {
        access: false,
        buffers,
        ..all()
    }
}

/// A mount whose file 0 had a lease, and is to be called for now.
fn contended(buffers: u32) -> Result<(Fixture, File)> {
    let fixture = Fixture::new(1, Some(&options(buffers)))?;
    let file = fixture.open(0, "f0")?;
    read_at(&file, 0, 10)?;
    let manager = fixture.manager()?;
    manager.take(0, ino(0), Mode::None)?;
    manager.mount(0)?.table().hint_calls(ino(0), true);
    Ok((fixture, file))
}

fn next(manager: &Manager) -> Result<Call> {
    until("called", || !manager.asked.lock().is_empty())?;
    manager.asked.lock().pop().context("a call")
}

fn answer(manager: &Manager, asked: &Call, answer: Answer) -> Result<()> {
    let call = asked.number;
    Ok(manager.mount(0)?.command(Order::Answer { call, answer })?)
}

pub fn done() -> Result<()> {
    let (fixture, file) = contended(4)?;
    let manager = fixture.manager()?;
    let needs = manager.needs.load(SeqCst);
    let block = fixture.control.block();
    let before = (block.reads.load(SeqCst), block.writes.load(SeqCst));
    file.write_all_at(b"called", 2)?;
    ensure_eq!(
        fixture.control.read(ino(0), 0, 10)?,
        b"aacalledaa".to_vec(),
        "at the server"
    );
    ensure_eq!(read_at(&file, 0, 10)?, b"aacalledaa".to_vec(), "what is read");
    let after = (block.reads.load(SeqCst), block.writes.load(SeqCst));
    ensure_eq!(after, before, "requests for data");
    ensure_eq!(manager.needs.load(SeqCst), needs, "NEED events");
    ensure_eq!(manager.mount(0)?.counters().calls, 2, "calls");
    ensure_eq!(read_at(&file, 65_530, 100)?.len(), 6, "bytes before the end");

    // What is longer than a buffer, or has to find the end, takes the lease; its pages are those of now.
    let long = layout::BUFFER_SIZE + 1;
    ensure_eq!(read_at(&file, 0, long)?.len(), long, "a long read");
    ensure_eq!(
        manager.needs.load(SeqCst),
        needs + 1,
        "NEED events of a long read"
    );
    ensure_eq!(read_at(&file, 2, 6)?, b"called".to_vec(), "under the lease");
    drop(file);
    fixture.end()
}

pub fn again() -> Result<()> {
    let (fixture, file) = contended(4)?;
    let manager = fixture.manager()?;
    manager.automatic.store(false, SeqCst);
    let writer = file.try_clone()?;
    let writer = Task::start(move || writer.write_all_at(b"again", 0));
    let asked = next(manager)?;
    ensure_eq!(
        (asked.act, asked.offset, asked.len),
        (Act::Write { kill_priv: false }, 0, 5),
        "the call"
    );
    writer.waits("a call that is not answered")?;
    manager.give(0, ino(0), Mode::Exclusive)?;
    answer(manager, &asked, Answer::Again)?;
    writer.end("the write")??;
    ensure_eq!(read_at(&file, 0, 6)?, b"againa".to_vec(), "under the lease");
    manager.take(0, ino(0), Mode::None)?;
    ensure_eq!(
        fixture.control.read(ino(0), 0, 5)?,
        b"again".to_vec(),
        "after it was flushed"
    );

    let reader = file.try_clone()?;
    let reader = Task::start(move || reader.read_at(&mut [0; 10], 0).map_err(|e| e.raw_os_error()));
    answer(manager, &next(manager)?, Answer::Failed(libc::ESTALE))?;
    ensure_eq!(reader.end("the read")?, Err(Some(libc::ESTALE)), "a refused read");
    drop(file);
    fixture.end()
}

pub fn buffers() -> Result<()> {
    let (mut fixture, file) = contended(1)?;
    let manager = fixture.manager()?;
    manager.automatic.store(false, SeqCst);
    let mut child = Command::new(std::env::current_exe()?)
        .arg("touch")
        .arg("write")
        .arg(fixture.path(0, "f0"))
        .spawn()?;
    let asked = next(manager)?;
    child.kill()?;
    until("killed", || matches!(child.try_wait(), Ok(Some(_))))?;
    // Its buffer is the daemon's still: the next one has to ask for the lease.
    let needs = manager.needs.load(SeqCst);
    let reader = file.try_clone()?;
    let reader = Task::start(move || read_at(&reader, 0, 10));
    until("asked", || manager.needs.load(SeqCst) > needs)?;
    manager.give(0, ino(0), Mode::Shared)?;
    ensure_eq!(reader.end("the read")??, vec![b'a'; 10], "what is read");
    answer(manager, &asked, Answer::Done(1))?;
    // Answers that nobody waits for, or of buffers that there are not, do nothing.
    answer(manager, &asked, Answer::Done(1))?;
    answer(manager, &Call { number: 77, ..asked }, Answer::Done(1))?;

    manager.take(0, ino(0), Mode::None)?;
    let reader = file.try_clone()?;
    let reader = Task::start(move || reader.read_at(&mut [0; 10], 0));
    let asked = next(manager)?;
    ensure_eq!(asked.act, Act::Read, "the call");
    fixture.detach();
    let ended: io::Result<usize> = reader.end("the read")?;
    let error = ended.map_err(|e| e.raw_os_error());
    ensure!(
        error == Err(Some(libc::ENOTCONN)),
        "a call without a daemon: {error:?}"
    );
    drop(file);
    fixture.end()
}
