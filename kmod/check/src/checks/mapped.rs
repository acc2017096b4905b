//! Mappings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use distfuse_abi::Mode;

use super::ensure_eq;
use crate::fixture::{Fixture, Task, ino};
use crate::memory::Mapping;

pub fn gate() -> Result<()> {
    let fixture = Fixture::plain()?;
    let manager = fixture.manager()?;
    let server =
        |at: u64| -> Result<u8> { Ok(fixture.control.read(ino(0), at, 1)?.first().copied().unwrap_or(0)) };
    let file = fixture.open(0, "f0")?;
    let map = Arc::new(Mapping::new(&file, 65536)?);
    map.set(0, b'm');
    map.set(5000, b'm');
    ensure_eq!(map.get(20_000), b'a', "contents");
    manager.take(0, ino(0), Mode::Shared)?;
    ensure_eq!(
        (server(0)?, server(5000)?),
        (b'm', b'm'),
        "at the server after the revocation"
    );
    ensure_eq!(map.get(5000), b'm', "read under the shared lease");
    manager.automatic.store(false, SeqCst);
    let writer = Arc::clone(&map);
    let writer = Task::start(move || writer.set(5000, b'n'));
    writer.waits("a write to a mapping under a shared lease")?;
    // Others of this process go on meanwhile.
    let other = fixture.open(0, "f1")?;
    drop(Task::start(move || Mapping::new(&other, 4096)).end("another mmap")??);
    manager.give(0, ino(0), Mode::Exclusive)?;
    writer.end("the write")?;
    manager.take(0, ino(0), Mode::None)?;
    ensure_eq!(server(5000)?, b'n', "at the server");
    fixture.control.write(ino(0), 5000, b"R")?;
    manager.changed(ino(0));
    let reader = Arc::clone(&map);
    let reader = Task::start(move || reader.get(5000));
    reader.waits("a read of a mapping without a lease")?;
    manager.give(0, ino(0), Mode::Shared)?;
    ensure_eq!(reader.end("the read")?, b'R', "what the server wrote");
    let counters = manager.mount(0)?.counters();
    ensure!(counters.fault_retries > 0 && counters.unmaps > 0, "{counters:?}");
    drop(map);
    drop(file);
    fixture.end()
}

pub fn coherent() -> Result<()> {
    let fixture = Fixture::two()?;
    let maps = [
        Mapping::new(&fixture.open(0, "f0")?, 65536)?,
        Mapping::new(&fixture.open(1, "f0")?, 65536)?,
    ];
    let [one, two] = &maps;
    for round in 1..150u64 {
        let at = (round as usize * 4096 + 8) % 65536;
        let (from, to) = if round % 2 == 0 { (one, two) } else { (two, one) };
        from.word(at).store(round, SeqCst);
        ensure_eq!(to.word(at).load(SeqCst), round, "round {round}");
    }
    drop(maps);
    fixture.end()
}

pub fn buffers() -> Result<()> {
    let fixture = Fixture::two()?;
    let manager = Arc::clone(fixture.manager()?);
    let stop = Arc::new(AtomicBool::new(false));
    let (mut tasks, mut maps) = (Vec::new(), Vec::new());
    for mount in 0..2 {
        for (from, to) in [("f0", "f1"), ("f1", "f0"), ("f2", "f2")] {
            let map = Arc::new(Mapping::new(&fixture.open(mount, from)?, 65536)?);
            maps.push(Arc::clone(&map));
            let file = fixture.open(mount, to)?;
            let stop = Arc::clone(&stop);
            tasks.push(Task::start(move || -> Result<u64> {
                let mut n = 0u64;
                while !stop.load(SeqCst) {
                    let at = (n as usize * 4096) % 32768;
                    map.write_to(&file, at, 20_000, (n * 8192 % 40_000) as i64)?;
                    map.read_from(&file, at, 20_000, (n * 4096 % 40_000) as i64)?;
                    n += 1;
                }
                Ok(n)
            }));
        }
    }
    let end = Instant::now() + Duration::from_secs(5);
    let mut revoked = 0;
    while Instant::now() < end {
        for n in 0..3 {
            for mount in 0..2 {
                manager.take(mount, ino(n), Mode::None)?;
                revoked += 1;
            }
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    stop.store(true, SeqCst);
    let mut rounds = 0;
    for task in tasks {
        rounds += task.end("writing out of mappings")??;
    }
    println!("        {rounds} rounds, {revoked} revocations");
    ensure!(rounds > 5, "only {rounds} rounds");
    drop(maps);
    fixture.end()
}
