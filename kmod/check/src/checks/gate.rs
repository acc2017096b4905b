//! Attaching, and waiting for leases.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use distfuse_abi::{Attachment, Command as Order, Error, Mode, Options, layout};

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, SOON, Task, WHILE, all, ino, until};

pub fn refused() -> Result<()> {
    let fixture = Fixture::new(1, None)?;
    let options = Options { entries: 64, ..all() };
    let open = |root: &OwnedFd| Attachment::open(root.as_fd(), &options);
    let other: OwnedFd = fs::File::open("/")?.into();
    ensure!(matches!(open(&other), Err(Error::NotAMount)), "attached to /");
    let root = fixture.root(0)?;
    let file = fixture.open(0, "f0")?;
    ensure!(
        matches!(open(&root), Err(Error::Busy)),
        "attached with a file open"
    );
    drop(file);
    ensure_eq!(
        distfuse_abi::kernel_version(&options.device)?,
        distfuse_abi::ABI_VERSION,
        "version"
    );
    // By hand, for the crate would not try.
    let device = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&options.device)?;
    let mut raw = layout::Attach {
        abi: distfuse_abi::ABI_VERSION + 1,
        root_fd: std::os::fd::AsRawFd::as_raw_fd(&root),
        ..layout::Attach::default()
    };
    // SAFETY: the request reads and writes such a structure.
    let done = unsafe {
        libc::ioctl(
            std::os::fd::AsRawFd::as_raw_fd(&device),
            layout::IOC_ATTACH as libc::Ioctl,
            &raw mut raw,
        )
    };
    let error = std::io::Error::last_os_error().raw_os_error();
    ensure_eq!(
        (done, error),
        (-1, Some(libc::EPROTONOSUPPORT)),
        "another version"
    );
    ensure_eq!(raw.abi, distfuse_abi::ABI_VERSION, "the version that comes back");
    drop(device);

    // The file's release may still be on its way.
    let mut attached = None;
    until("attached", || {
        attached = open(&root).ok();
        attached.is_some()
    })?;
    ensure!(matches!(open(&root), Err(Error::Busy)), "attached twice");
    drop(attached);
    drop(root);
    fixture.end()
}

pub fn waits() -> Result<()> {
    let fixture = Fixture::plain()?;
    let manager = fixture.manager()?;
    manager.automatic.store(false, SeqCst);
    let file = fixture.open(0, "f0")?;
    let reader = file.try_clone()?;
    let reader = Task::start(move || read_at(&reader, 0, 10));
    reader.waits("a read without a lease")?;
    ensure_eq!(manager.needs.load(SeqCst), 1, "NEED events");
    manager.give(0, ino(0), Mode::Shared)?;
    ensure_eq!(reader.end("the read")??, vec![b'a'; 10], "what is read");
    let writer = file.try_clone()?;
    let writer = Task::start(move || writer.write_all_at(b"hello", 0));
    writer.waits("a write under a shared lease")?;
    manager.give(0, ino(0), Mode::Exclusive)?;
    writer.end("the write")??;
    ensure_eq!(read_at(&file, 0, 6)?, b"helloa".to_vec(), "what is read");
    drop(file);
    fixture.end()
}

pub fn killed() -> Result<()> {
    let fixture = Fixture::plain()?;
    fixture.manager()?.automatic.store(false, SeqCst);
    for kind in ["read", "write", "map"] {
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
    fixture.end()
}

pub fn denied() -> Result<()> {
    let fixture = Fixture::plain()?;
    let manager = fixture.manager()?;
    manager.automatic.store(false, SeqCst);
    let file = fixture.open(0, "f0")?;
    let reader = file.try_clone()?;
    let reader = Task::start(move || read_at(&reader, 0, 10));
    reader.waits("a read without a lease")?;
    manager.mount(0)?.command(Order::Wake {
        ino: ino(0),
        error: Some(libc::ESTALE),
    })?;
    match reader.end("the read")? {
        Err(error) => {
            let code = error
                .downcast_ref::<std::io::Error>()
                .and_then(std::io::Error::raw_os_error);
            ensure_eq!(code, Some(libc::ESTALE), "the refusal");
        }
        Ok(_) => bail!("read in spite of the refusal"),
    }
    drop(file);
    fixture.end()
}

pub fn quiet() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    let file = fixture.open(0, "f0")?;
    file.write_all_at(b"x", 0)?;
    let mut data = [0; 4096];
    read_at(&file, 0, 65536)?;
    let before = (fixture.control.requests(), manager.events.load(SeqCst));
    let counters = manager.mount(0)?.counters();
    for n in 0..1000u64 {
        file.read_exact_at(&mut data, n % 15 * 4096)?;
        file.write_all_at(&data, n % 15 * 4096)?;
        ensure_eq!(file.metadata()?.len(), 65536, "size");
        // At the end of the file a stock kernel asks for its size.
        ensure_eq!(file.read_at(&mut data, 65536)?, 0, "bytes behind the end");
    }
    let after = (fixture.control.requests(), manager.events.load(SeqCst));
    ensure_eq!(after, before, "requests and events");
    let now = manager.mount(0)?.counters();
    ensure_eq!(now.wakeups_made, counters.wakeups_made, "wake-ups");
    ensure_eq!(now.kicks, counters.kicks, "doorbells");
    ensure!(now.hits >= counters.hits + 3000, "hits: {now:?}");
    ensure!(now.stat_local >= counters.stat_local + 1000, "stat: {now:?}");
    drop(file);
    fixture.end()
}

/// Where answers come soon, tasks and the manager look for each other and neither sleeps.
pub fn looks() -> Result<()> {
    const TURNS: u64 = 100;
    let options = Options {
        // Emulated processors take their time.
        spin: Duration::from_micros(layout::MAX_SPIN_US.into()),
        ..all()
    };
    let fixture = Fixture::new(1, Some(&options))?;
    let manager = fixture.manager()?;
    manager.direct.store(true, SeqCst);
    let file = fixture.open(0, "f0")?;
    read_at(&file, 0, 4096)?;
    let turn = || -> Result<()> {
        ensure!(manager.take(0, ino(0), Mode::None)?.is_none(), "was not clean");
        ensure_eq!(read_at(&file, 0, 4096)?, vec![b'a'; 4096], "contents");
        Ok(())
    };
    let quiet = || -> Result<bool> {
        let before = manager.mount(0)?.counters();
        (0..TURNS).try_for_each(|_| turn())?;
        let now = manager.mount(0)?.counters();
        ensure_eq!(now.misses - before.misses, TURNS, "misses");
        Ok(now.spins - before.spins > TURNS / 2
            && now.kicks - before.kicks < TURNS / 2
            && now.wakeups_made - before.wakeups_made < TURNS / 2)
    };
    // Both have to find out that it pays.
    let end = Instant::now() + SOON;
    while !quiet()? {
        ensure!(
            Instant::now() < end,
            "looked in vain: {:?}",
            manager.mount(0)?.counters()
        );
    }
    drop(file);
    fixture.end()
}

pub fn others() -> Result<()> {
    let attached = Fixture::plain()?;
    let other = Fixture::new(1, None)?;
    attached.manager()?.automatic.store(false, SeqCst);
    let file = other.open(0, "f0")?;
    let task = Task::start(move || -> Result<Vec<u8>> {
        file.write_all_at(b"stock", 0)?;
        file.sync_all()?;
        read_at(&file, 0, 5)
    });
    ensure_eq!(task.end("I/O on a stock mount")??, b"stock".to_vec(), "contents");
    ensure_eq!(
        other.control.read(ino(0), 0, 5)?,
        b"stock".to_vec(),
        "at the server"
    );
    other.end()?;
    attached.end()
}

pub fn overflow() -> Result<()> {
    let small = Options {
        events: 16,
        commands: 16,
        ..all()
    };
    let fixture = Fixture::new(1, Some(&small))?;
    let manager = fixture.manager()?;
    let mut files = Vec::new();
    for n in 0..60 {
        files.push(fixture.open_with(0, &format!("many{n}"), libc::O_CREAT)?);
    }
    manager.automatic.store(false, SeqCst);
    let tasks: Vec<_> = files
        .iter()
        .map(|file| {
            let file = file.try_clone()?;
            Ok(Task::start(move || file.write_all_at(b"full", 0)))
        })
        .collect::<Result<_>>()?;
    until("all ask", || manager.needs.load(SeqCst) >= 60)?;
    for n in 0..60 {
        manager.give(0, ino(8 + n), Mode::Exclusive)?;
    }
    for task in tasks {
        task.end("a write")??;
    }
    let start = std::time::Instant::now();
    for n in 0..60 {
        manager.take(0, ino(8 + n), Mode::None)?;
    }
    ensure!(start.elapsed() < SOON * 2, "slow: {:?}", start.elapsed());
    drop(files);
    fixture.end()
}

pub fn eviction() -> Result<()> {
    let small = Options { entries: 64, ..all() };
    let fixture = Fixture::new(1, Some(&small))?;
    let manager = fixture.manager()?;
    let names: Vec<String> = (0..150).map(|n| format!("e{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        fixture
            .open_with(0, name, libc::O_CREAT)?
            .write_all_at(&[n as u8; 5000], 0)?;
    }
    for round in 0..2 {
        for (n, name) in names.iter().enumerate() {
            let data = read_at(&fixture.open(0, name)?, 0, 10_000)?;
            ensure_eq!(data, vec![n as u8; 5000], "{name} in round {round}");
        }
    }
    ensure!(
        manager.flushes.load(SeqCst) + manager.clean.load(SeqCst) > 80,
        "nothing was evicted"
    );
    fixture.end()
}
