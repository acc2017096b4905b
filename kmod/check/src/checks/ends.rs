//! Daemon, mount and module go away.

use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, Result, bail, ensure};
use distfuse_abi::{Error, Mode};

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, Task, all, ino};
use crate::memory::Mapping;

fn code<T>(done: Result<T>) -> Result<Option<i32>> {
    match done {
        Ok(_) => bail!("succeeds"),
        Err(error) => Ok(error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::raw_os_error)),
    }
}

/// What comes of touching a mapping in a process of its own.
fn signal(fixture: &Fixture, name: &str) -> Result<Option<i32>> {
    let status = Command::new(std::env::current_exe()?)
        .arg("touch")
        .arg("map")
        .arg(fixture.path(0, name))
        .status()?;
    Ok(status.signal())
}

pub fn device() -> Result<()> {
    let mut fixture = Fixture::plain()?;
    let file = fixture.open(0, "f0")?;
    read_at(&file, 0, 65536)?;
    let map = Mapping::new(&file, 4096)?;
    ensure_eq!(map.get(0), b'a', "contents");
    fixture.manager()?.automatic.store(false, SeqCst);
    let waiting = fixture.open(0, "f1")?;
    let reader = waiting.try_clone()?;
    let reader = Task::start(move || read_at(&reader, 0, 10));
    let writer = Task::start(move || Ok(waiting.write_all_at(b"x", 0)?));
    reader.waits("a read without a lease")?;
    writer.waits("a write without a lease")?;
    fixture.detach();
    ensure_eq!(
        code(reader.end("the read")?)?,
        Some(libc::ENOTCONN),
        "the read that waited"
    );
    ensure_eq!(
        code(writer.end("the write")?)?,
        Some(libc::ENOTCONN),
        "the write that waited"
    );
    ensure_eq!(code(read_at(&file, 0, 10))?, Some(libc::ENOTCONN), "a read later");
    ensure_eq!(signal(&fixture, "f0")?, Some(libc::SIGBUS), "a mapping later");
    drop(map);
    drop(file);
    fixture.end()
}

pub fn killed() -> Result<()> {
    let mut fixture = Fixture::one()?;
    let file = fixture.open(0, "f0")?;
    file.write_all_at(&[1; 65536], 0)?;
    let map = Mapping::new(&file, 65536)?;
    map.set(10_000, 2);
    fixture.kill_server(0)?;
    fixture.detach();
    ensure!(code(read_at(&file, 0, 10))?.is_some(), "a read");
    ensure!(
        code(file.write_all_at(b"x", 0).map_err(Into::into))?.is_some(),
        "a write"
    );
    ensure!(file.sync_all().is_err(), "fsync does not tell of the loss");
    ensure_eq!(
        fixture.control.read(ino(0), 0, 100)?,
        vec![b'a'; 100],
        "at the server"
    );
    drop(map);
    drop(file);
    fixture.end()
}

pub fn unmounted() -> Result<()> {
    let mut fixture = Fixture::one()?;
    let file = fixture.open(0, "f0")?;
    file.write_all_at(&[3; 65536], 0)?;
    let map = Mapping::new(&file, 65536)?;
    map.set(100, 4);
    drop(map);
    drop(file);
    fixture.unmount(0)?;
    let mut want = vec![3; 65536];
    if let Some(byte) = want.get_mut(100) {
        *byte = 4;
    }
    ensure_eq!(fixture.control.read(ino(0), 0, 65536)?, want, "at the server");
    let attachment = fixture.manager()?.mount(0)?;
    let wake = distfuse_abi::Command::Wake {
        ino: ino(0),
        error: None,
    };
    ensure!(
        matches!(attachment.command(wake), Err(Error::Gone)),
        "the mount is not gone"
    );
    fixture.end()
}

pub fn again() -> Result<()> {
    let mut fixture = Fixture::one()?;
    for round in 0..4u8 {
        let file = fixture.open(0, "f0")?;
        file.write_all_at(&[round; 100], 0)?;
        file.sync_all()?;
        // Not synced, and so lost with the daemon that was to take it.
        file.write_all_at(&[99; 100], 0)?;
        let map = Mapping::new(&file, 4096)?;
        ensure_eq!(map.get(0), 99, "contents");
        fixture.detach();
        fixture.control.write(ino(0), 0, &[round + 50; 100])?;
        fixture.attach(&all()).context("attach again")?;
        ensure_eq!(
            read_at(&file, 0, 100)?,
            vec![round + 50; 100],
            "what the server has, round {round}"
        );
        ensure_eq!(map.get(0), round + 50, "mapped, round {round}");
        fixture.manager()?.take(0, ino(0), Mode::None)?;
    }
    fixture.end()
}
