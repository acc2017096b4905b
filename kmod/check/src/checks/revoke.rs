//! Giving leases back.

use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Context, Result, bail, ensure};
use distfuse_abi::{Mode, Time};

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, Task, ino, until};

pub fn clean() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let file = fixture.open(0, "f0")?;
    read_at(&file, 0, 65536)?;
    let requests = fixture.control.requests();
    let before = manager.mount(0)?.counters();
    let table = manager.mount(0)?.table();
    for _ in 0..100 {
        ensure!(manager.take(0, ino(0), Mode::None)?.is_none(), "was not clean");
        // As give() does, without the WAKE that nobody needs.
        let grant = distfuse_abi::Grant {
            attributes: fixture.control.attributes(ino(0)).context("attributes")?,
            ..distfuse_abi::Grant::default()
        };
        ensure!(!table.grant(ino(0), Mode::Shared, &grant)?, "somebody waits");
        ensure_eq!(read_at(&file, 0, 65536)?, vec![b'a'; 65536], "contents");
    }
    let now = manager.mount(0)?.counters();
    ensure_eq!(fixture.control.requests(), requests, "requests");
    ensure_eq!(now.kicks, before.kicks, "doorbells");
    ensure_eq!(now.wakeups_made, before.wakeups_made, "wake-ups");
    ensure_eq!(
        now.pages_kept - before.pages_kept,
        100,
        "times that pages were kept"
    );
    drop(file);
    fixture.end()
}

pub fn dirty() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    let file = fixture.open(0, "f0")?;
    for target in [Mode::Shared, Mode::None] {
        let data = vec![target as u8 + b'0'; 4 << 20];
        block.write_delay.store(100, SeqCst);
        file.write_all_at(&data, 0)?;
        let done = manager.take(0, ino(0), target)?.context("no flush")?;
        let (writes, written) = (block.writes.load(SeqCst), block.written.load(SeqCst));
        block.write_delay.store(0, SeqCst);
        ensure!(writes > 0, "no writes");
        ensure_eq!(written, writes, "writes answered when the revocation was done");
        ensure_eq!(done.error, None, "errors");
        ensure_eq!(done.inode.map(|inode| inode.0), Some(4 << 20), "size");
        ensure_eq!(
            fixture.control.read(ino(0), 0, 4 << 20)?,
            data,
            "contents at the server"
        );
        std::thread::sleep(std::time::Duration::from_millis(300));
        ensure_eq!(block.writes.load(SeqCst), writes, "writes later");
        ensure_eq!(manager.held(0, ino(0))?, target, "what is held");
    }
    drop(file);
    fixture.end()
}

pub fn version() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let file = fixture.open(0, "f0")?;
    for (fill, size) in [(b'Z', 200_000), (b'Y', 5_000), (b'X', 12_345), (b'W', 4096)] {
        read_at(&file, 0, 300_000)?;
        file.write_all_at(b"own", 0)?;
        manager.take(0, ino(0), Mode::None)?;
        fixture.control.truncate(ino(0), 0)?;
        fixture.control.write(ino(0), 0, &vec![fill; size])?;
        let mtime = Time {
            seconds: 1_500_000_000 + size as i64,
            nanos: 123_456_789,
        };
        fixture.control.set_mtime(ino(0), mtime);
        manager.changed(ino(0));
        let meta = file.metadata()?;
        ensure_eq!(meta.len(), size as u64, "size of stat");
        ensure_eq!(
            (meta.mtime(), meta.mtime_nsec()),
            (mtime.seconds, 123_456_789),
            "mtime"
        );
        ensure_eq!(read_at(&file, 0, 300_000)?, vec![fill; size], "contents");
    }
    // A hole where a longer version had data.
    manager.take(0, ino(0), Mode::None)?;
    fixture.control.truncate(ino(0), 100)?;
    fixture.control.truncate(ino(0), 9000)?;
    manager.changed(ino(0));
    let mut want = vec![b'W'; 100];
    want.resize(9000, 0);
    ensure_eq!(read_at(&file, 0, 10_000)?, want, "contents with a hole");
    drop(file);
    fixture.end()
}

pub fn downgrade() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    let file = fixture.open(0, "f0")?;
    for round in 0..20u8 {
        let data = vec![round; 65536];
        file.write_all_at(&data, 0)?;
        let done = manager.take(0, ino(0), Mode::Shared)?;
        ensure!(done.is_some_and(|done| done.kept), "pages were dropped");
        let reads = block.reads.load(SeqCst);
        ensure_eq!(read_at(&file, 0, 65536)?, data, "contents");
        manager.take(0, ino(0), Mode::None)?;
        // The version has moved, but by this mount's own writes.
        ensure_eq!(
            read_at(&file, 0, 65536)?,
            data,
            "contents after all was given back"
        );
        ensure_eq!(block.reads.load(SeqCst), reads, "reads");
    }
    drop(file);
    fixture.end()
}

pub fn drains() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = Arc::clone(fixture.manager()?);
    let block = fixture.control.block();
    let file = fixture.open(0, "f0")?;
    manager.give(0, ino(0), Mode::Shared)?;
    block.read_delay.store(400, SeqCst);
    let reader = file.try_clone()?;
    let reader = Task::start(move || read_at(&reader, 0, 4096));
    until("a read is under way", || block.reads.load(SeqCst) > 0)?;
    let revoker = Arc::clone(&manager);
    let revoker = Task::start(move || revoker.take(0, ino(0), Mode::None));
    revoker.waits("a revocation while a read is inside")?;
    ensure_eq!(revoker.end("the revocation")??.is_none(), true, "was clean");
    block.read_delay.store(0, SeqCst);
    ensure_eq!(reader.end("the read")??.len(), 4096, "read");
    ensure!(manager.drained.load(SeqCst) >= 1, "no DRAINED");
    drop(file);
    fixture.end()
}

pub fn setattr() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    let file = fixture.open(0, "f0")?;
    file.write_all_at(b"abc", 0)?;
    block.setattr_delay.store(700, SeqCst);
    let setattrs = block.setattrs.load(SeqCst);
    let cut = file.try_clone()?;
    let cut = Task::start(move || cut.set_len(77_777));
    until("a truncation is under way", || {
        block.setattrs.load(SeqCst) > setattrs
    })?;
    manager.take(0, ino(0), Mode::None)?;
    block.setattr_delay.store(0, SeqCst);
    cut.end("the truncation")??;
    ensure_eq!(file.metadata()?.len(), 77_777, "size");
    ensure_eq!(read_at(&file, 0, 3)?, b"abc".to_vec(), "contents");
    drop(file);
    fixture.end()
}

pub fn error() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    let file = fixture.open(0, "f0")?;
    file.write_all_at(&[1; 8192], 0)?;
    block.write_error.store(libc::ENOSPC.cast_unsigned(), SeqCst);
    let done = manager.take(0, ino(0), Mode::None)?.context("no flush")?;
    block.write_error.store(0, SeqCst);
    ensure!(done.error.is_some(), "the flush does not tell of the error");
    match file.sync_all() {
        Ok(()) => bail!("fsync does not tell of the error"),
        Err(error) => {
            let code = error.raw_os_error();
            ensure!(matches!(code, Some(libc::ENOSPC | libc::EIO)), "{error}");
        }
    }
    file.sync_all().context("fsync tells of the error twice")?;
    drop(file);
    fixture.end()
}

pub fn closed() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    for name in ["f0", "f1", "f2"] {
        let file = fixture.open(0, name)?;
        file.write_all_at(&[7; 100_000], 0)?;
        drop(file);
    }
    manager.take(0, ino(0), Mode::None)?;
    // Now without the inode, too.
    std::fs::write("/proc/sys/vm/drop_caches", "2")?;
    manager.take(0, ino(1), Mode::None)?;
    // And while it is being written and closed.
    block.write_delay.store(50, SeqCst);
    let file = fixture.open(0, "f3")?;
    file.write_all_at(&[7; 100_000], 0)?;
    let closing = Task::start(move || drop(file));
    manager.take(0, ino(3), Mode::None)?;
    closing.end("closing")?;
    block.write_delay.store(0, SeqCst);
    for n in [0, 1, 3] {
        ensure_eq!(
            fixture.control.read(ino(n), 0, 200_000)?,
            vec![7; 100_000],
            "file {n}"
        );
    }
    fixture.end()
}
