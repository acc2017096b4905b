//! Writes into pages that are dirty already, which go a shorter way than FUSE's: what they do is the same.

use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Barrier;

use anyhow::{Context, Result, bail, ensure};
use distfuse_abi::Mode;
use rustix::fs::{Advice, MemfdFlags, fadvise, memfd_create};
use rustix::mount::{MountFlags, mount_remount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::{ensure_eq, read_at};
use crate::fixture::{Fixture, ino, until};
use crate::memory::Mapping;

const PAGE: usize = 4096;

/// A limit to the length of files that this process writes, while it lasts.
struct Limit(Rlimit);

impl Limit {
    fn new(bytes: u64) -> Result<Limit> {
        // SAFETY: a constant action, not a function.
        unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
        let before = getrlimit(Resource::Fsize);
        let limit = Rlimit {
            current: Some(bytes),
            ..before
        };
        setrlimit(Resource::Fsize, limit)?;
        Ok(Limit(before))
    }
}

impl Drop for Limit {
    fn drop(&mut self) {
        // Back to where it was: that is always allowed.
        let _ = setrlimit(Resource::Fsize, self.0);
    }
}

/// Writes, each into the file and into what it has to become.
struct Twin<'a>(&'a File, Vec<u8>);

impl Twin<'_> {
    fn write(&mut self, byte: u8, at: usize, len: usize) -> Result<()> {
        self.0.write_all_at(&vec![byte; len], at as u64)?;
        if self.1.len() < at + len {
            self.1.resize(at + len, 0);
        }
        self.1.iter_mut().skip(at).take(len).for_each(|b| *b = byte);
        Ok(())
    }

    fn truncate(&mut self, len: usize) -> Result<()> {
        self.0.set_len(len as u64)?;
        self.1.resize(len, 0);
        Ok(())
    }

    fn compare(&self, what: &str) -> Result<()> {
        ensure_eq!(self.0.metadata()?.len(), self.1.len() as u64, "size {what}");
        ensure!(read_at(self.0, 0, 1 << 20)? == self.1, "contents {what}");
        Ok(())
    }
}

/// Writes to the beginning of a file from a buffer of which only the first `there` of `len` bytes are there; how much it came to.
fn write_from_edge(file: &File, byte: u8, there: usize, len: usize) -> Result<usize> {
    let memory = File::from(memfd_create("edge", MemfdFlags::CLOEXEC)?);
    memory.write_all_at(&vec![byte; there], 0)?;
    Mapping::new(&memory, len)?.write_some_to(file, 0, len, 0)
}

fn remount(fixture: &Fixture, flags: MountFlags) -> Result<()> {
    let root = fixture.path(0, "");
    mount_remount(&root, flags, c"").with_context(|| format!("remount {}", root.display()))
}

fn all(fixture: &Fixture) -> Result<()> {
    let file = fixture.open(0, "f0")?;
    let whole = read_at(&file, 0, 1 << 20)?;
    ensure!(whole.len() >= 2 * PAGE, "a file of {} bytes", whole.len());
    let mut twin = Twin(&file, whole);
    twin.write(b'b', 0, PAGE)?;
    let map = Mapping::new(&file, PAGE)?;
    for (byte, at, len) in [
        (b'c', 0, 64),
        (b'd', 100, 1),
        (b'e', PAGE - 10, 10),
        (b'f', PAGE - 10, 20),
        (b'g', 0, PAGE),
    ] {
        twin.write(byte, at, len)?;
        twin.compare("written again")?;
        ensure_eq!(map.get(at), byte, "what is mapped at {at}");
    }
    file.write_all_at(&[], 7)?;
    drop(map);

    let mtime = |file: &File| file.metadata().map(|m| (m.mtime(), m.mtime_nsec()));
    let before = mtime(&file)?;
    until("a write moves mtime", || {
        file.write_all_at(b"g", 0).is_ok() && mtime(&file).is_ok_and(|now| now > before)
    })?;

    // The page stays, dirty, and shorter.
    twin.truncate(50)?;
    twin.write(b'h', 40, 5)?;
    twin.compare("after a truncation")?;
    twin.write(b'i', 45, 10)?;
    twin.compare("grown")?;
    twin.truncate(100)?;
    twin.compare("grown with nothing")?;
    let appending = fixture.open_with(0, "f0", libc::O_APPEND)?;
    appending.write_all_at(b"jj", 0)?;
    twin.1.extend(b"jj");
    twin.compare("appended")?;

    {
        let _limit = Limit::new(60)?;
        ensure_eq!(file.write_at(&[b'k'; 20], 50)?, 10, "written up to the limit");
        let past = file.write_at(b"k", 60).map_err(|e| e.raw_os_error());
        ensure_eq!(past, Err(Some(libc::EFBIG)), "past the limit");
    }
    twin.write(b'k', 50, 10)?;
    twin.compare("with a limit")?;

    remount(fixture, MountFlags::SYNCHRONOUS)?;
    // Only a mapping makes pages dirty there.
    let map = Mapping::new(&file, PAGE)?;
    map.set(0, b'm');
    file.write_all_at(b"at once", 20)?;
    ensure_eq!(
        fixture.control.read(ino(0), 20, 7)?,
        b"at once".to_vec(),
        "at the server, of a synchronous mount"
    );
    drop(map);
    remount(fixture, MountFlags::empty())?;
    let durable = fixture.open_with(0, "f0", libc::O_DSYNC)?;
    durable.write_all_at(b"now", 3)?;
    ensure_eq!(
        fixture.control.read(ino(0), 3, 3)?,
        b"now".to_vec(),
        "at the server, with O_DSYNC"
    );
    Ok(())
}

/// Longer writes, over pages of which some are dirty, some clean, and some not there.
fn long(fixture: &Fixture) -> Result<()> {
    const PAGES: usize = 40;
    let file = fixture.open(0, "f0")?;
    let mut twin = Twin(&file, read_at(&file, 0, 1 << 20)?);
    twin.write(b'A', 0, PAGES * PAGE)?;
    twin.write(b'B', 0, PAGES * PAGE)?;
    twin.compare("dirty pages")?;
    twin.write(b'C', 3 * PAGE + 7, 9 * PAGE + 100)?;
    twin.compare("parts of pages")?;
    twin.write(b'D', (PAGES - 2) * PAGE, 4 * PAGE)?;
    twin.compare("beyond the end")?;
    file.sync_all()?;
    twin.write(b'E', 5 * PAGE, 10)?;
    twin.write(b'F', 4 * PAGE, 4 * PAGE)?;
    twin.compare("clean pages and one that is dirty")?;
    twin.write(b'G', 5 * PAGE, 3 * PAGE)?;
    twin.write(b'H', 5 * PAGE + 1, 30 * PAGE)?;
    twin.compare("dirty pages and then clean ones")?;
    file.sync_all()?;
    fadvise(&file, 0, NonZero::new(10 * PAGE as u64), Advice::DontNeed)?;
    twin.write(b'I', 2 * PAGE, 10)?;
    twin.write(b'J', PAGE / 2, 20 * PAGE)?;
    twin.compare("pages that are not there")?;

    // A buffer that ends where nothing is.
    twin.write(b'K', 0, 8 * PAGE)?;
    let written = write_from_edge(&file, b'L', 3 * PAGE, 4 * PAGE)?;
    ensure!(written <= 3 * PAGE, "{written} bytes of 3 pages");
    twin.1.iter_mut().take(written).for_each(|byte| *byte = b'L');
    ensure!(
        read_at(&file, 3 * PAGE as u64, 5 * PAGE)? == twin.1[3 * PAGE..8 * PAGE],
        "what a buffer that ends early did not bring"
    );
    ensure!(read_at(&file, 0, written)? == twin.1[..written], "what it did");
    twin.write(b'M', 0, 3 * PAGE)?;
    twin.compare("after that")
}

/// Long writes of two tasks to the same place: each is whole, whichever was first.
fn unmixed(fixture: &Fixture) -> Result<()> {
    const LEN: usize = 64 * PAGE;
    let file = fixture.open(0, "f0")?;
    file.write_all_at(&vec![b'.'; LEN], 0)?;
    for round in 0..50 {
        let start = Barrier::new(2);
        std::thread::scope(|scope| {
            let tasks = [b'a', b'b'].map(|byte| {
                let (file, start) = (&file, &start);
                scope.spawn(move || {
                    start.wait();
                    file.write_all_at(&vec![byte; LEN], 0)
                })
            });
            tasks.into_iter().try_for_each(|task| match task.join() {
                Ok(written) => written.context("write"),
                Err(_) => bail!("a task panicked"),
            })
        })?;
        let found = read_at(&file, 0, LEN)?;
        ensure!(
            found.iter().all(|byte| Some(byte) == found.first()),
            "mixed in round {round}"
        );
    }
    Ok(())
}

pub fn same() -> Result<()> {
    let stock = Fixture::new(1, None)?;
    all(&stock)?;
    long(&stock)?;
    unmixed(&stock)?;
    stock.end()?;
    let fixture = Fixture::one()?;
    all(&fixture)?;
    long(&fixture)?;
    unmixed(&fixture)?;
    let file = fixture.open(0, "f0")?;
    let mut twin = Twin(&file, read_at(&file, 0, 1 << 20)?);
    twin.write(b'y', 0, 10)?;
    twin.write(b'z', 5, 10)?;
    fixture.manager()?.take(0, ino(0), Mode::None)?;
    ensure!(
        fixture.control.read(ino(0), 0, twin.1.len())? == twin.1,
        "what is given back"
    );
    drop(file);
    fixture.end()
}
