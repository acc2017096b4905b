//! Everything at once.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use distfuse_abi::Mode;

use super::ensure_eq;
use crate::fixture::{Fixture, Task, ino};
use crate::memory::Mapping;

fn seconds() -> Duration {
    let text = std::env::var("KMOD_CHECK_SECONDS").unwrap_or_default();
    Duration::from_secs(text.parse().unwrap_or(8))
}

/// Writers put growing stamps into words of their own, by write and through mappings, on both mounts; before
/// they do they publish the last one that is there. Readers on the other mount must find at least that.
pub fn stamps() -> Result<()> {
    const WORDS: u64 = 16;
    let fixture = Fixture::two()?;
    let stop = Arc::new(AtomicBool::new(false));
    let published: Arc<Vec<AtomicU64>> = Arc::new((0..WORDS).map(|_| AtomicU64::new(0)).collect());
    for n in 0..WORDS {
        fixture.control.write(ino(0), n * 4096, &0u64.to_le_bytes())?;
    }
    let mut tasks: Vec<Task<Result<u64>>> = Vec::new();
    let mut maps = Vec::new();
    for mount in 0..2usize {
        let writer = fixture.open(mount, "f0")?;
        let reader = fixture.open(mount, "f0")?;
        let map = Arc::new(Mapping::new(&fixture.open(mount, "f0")?, 65536)?);
        maps.push(Arc::clone(&map));
        let (own, stopped, own_map) = (Arc::clone(&published), Arc::clone(&stop), Arc::clone(&map));
        tasks.push(Task::start(move || {
            let mut stamp = 0u64;
            while !stopped.load(SeqCst) {
                stamp += 1;
                let word = (stamp * 2 + mount as u64) % WORDS;
                let at = word * 4096;
                if stamp.is_multiple_of(3) {
                    own_map.word(at as usize).store(stamp, SeqCst);
                } else {
                    writer.write_all_at(&stamp.to_le_bytes(), at)?;
                }
                if let Some(cell) = own.get(word as usize) {
                    cell.store(stamp, SeqCst);
                }
            }
            Ok(stamp)
        }));
        let (own, stopped) = (Arc::clone(&published), Arc::clone(&stop));
        tasks.push(Task::start(move || {
            let mut n = 0u64;
            while !stopped.load(SeqCst) {
                n += 1;
                let word = n * 7 % WORDS;
                let least = own.get(word as usize).map_or(0, |cell| cell.load(SeqCst));
                let found = if n.is_multiple_of(2) {
                    let mut data = [0; 8];
                    reader.read_exact_at(&mut data, word * 4096)?;
                    u64::from_le_bytes(data)
                } else {
                    map.word(word as usize * 4096).load(SeqCst)
                };
                if found < least {
                    bail!("mount {mount} reads {found} in word {word}, {least} was there (round {n})");
                }
            }
            Ok(n)
        }));
    }
    let end = Instant::now() + seconds();
    while Instant::now() < end {
        std::thread::sleep(Duration::from_millis(300));
        // As memory pressure does.
        std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    }
    stop.store(true, SeqCst);
    let mut rounds = Vec::new();
    for task in tasks {
        rounds.push(task.end("a reader or writer")??);
    }
    let manager = fixture.manager()?;
    println!(
        "        rounds {rounds:?}, {} revocations clean, {} flushed",
        manager.clean.load(SeqCst),
        manager.flushes.load(SeqCst)
    );
    ensure!(rounds.iter().all(|n| *n > 0), "somebody starved: {rounds:?}");
    drop(maps);
    fixture.end()
}

/// Many tasks of one mount against a thread that takes the lease away as fast as it can, with the server's
/// contents changed while it is away.
pub fn word() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let block = fixture.control.block();
    let stop = Arc::new(AtomicBool::new(false));
    let least = Arc::new(AtomicU64::new(0));
    let mut tasks: Vec<Task<Result<u64>>> = Vec::new();
    for n in 0..4u64 {
        let file = fixture.open(0, "f0")?;
        let (stop, least) = (Arc::clone(&stop), Arc::clone(&least));
        tasks.push(Task::start(move || {
            let mut rounds = 0;
            while !stop.load(SeqCst) {
                rounds += 1;
                if n == 0 {
                    file.write_all_at(&[1; 100], 8192 + rounds % 7 * 1000)?;
                    continue;
                }
                let least = least.load(SeqCst);
                let mut data = [0; 8];
                file.read_exact_at(&mut data, 0)?;
                let found = u64::from_le_bytes(data);
                if found < least {
                    bail!("reads {found}, {least} was there");
                }
            }
            Ok(rounds)
        }));
    }
    let end = Instant::now() + seconds();
    let mut stamp = 0x6161_6161_6161_6161u64;
    least.store(stamp, SeqCst);
    let mut cycles = 0;
    while Instant::now() < end {
        stamp += 1;
        manager.replace(0, ino(0), || {
            let writes = block.writes.load(SeqCst);
            ensure_eq!(block.written.load(SeqCst), writes, "writes answered");
            fixture.control.write(ino(0), 0, &stamp.to_le_bytes())?;
            ensure_eq!(block.writes.load(SeqCst), writes, "writes without a lease");
            Ok(())
        })?;
        least.store(stamp, SeqCst);
        let mode = if cycles % 3 == 0 {
            Mode::Shared
        } else {
            Mode::Exclusive
        };
        manager.give(0, ino(0), mode)?;
        cycles += 1;
        if cycles % 8 == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    stop.store(true, SeqCst);
    manager.give(0, ino(0), Mode::Exclusive)?;
    let mut rounds = Vec::new();
    for task in tasks {
        rounds.push(task.end("a task")??);
    }
    println!("        {cycles} cycles, rounds {rounds:?}");
    ensure!(cycles > 10, "only {cycles} cycles");
    fixture.end()
}
