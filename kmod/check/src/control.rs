//! What the FUSE servers and the tester share: counters and delays, the files' attributes and contents, in
//! one file in memory. Two servers on the same one are two mounts of one file system.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::SeqCst};

use anyhow::{Context, Result, bail};
use distfuse_abi::{Attributes, Time};

/// Files there can be.
pub const FILES: usize = 200;
/// The first one's inode number; 1 is the root.
pub const FIRST: u64 = 2;
/// Longest file.
pub const LONGEST: u64 = 8 << 20;
const CONTENTS: u64 = 1 << 16;

/// A file's attributes.
#[repr(C)]
pub struct Meta {
    /// Whether it is there.
    pub used: AtomicU32,
    /// Permissions.
    pub mode: AtomicU32,
    /// Bytes.
    pub size: AtomicU64,
    /// Seconds and nanoseconds.
    pub mtime: (AtomicI64, AtomicU32),
    /// Handles that are open, by server.
    pub opens: [AtomicU32; 4],
    name: [AtomicU64; 4],
}

/// What is shared.
#[repr(C)]
pub struct Block {
    /// Requests by kind, and answers to WRITE.
    pub lookups: AtomicU64,
    /// GETATTR.
    pub getattrs: AtomicU64,
    /// SETATTR.
    pub setattrs: AtomicU64,
    /// READ.
    pub reads: AtomicU64,
    /// WRITE, come in.
    pub writes: AtomicU64,
    /// WRITE, answered.
    pub written: AtomicU64,
    /// FSYNC.
    pub fsyncs: AtomicU64,
    /// All others.
    pub others: AtomicU64,
    /// WRITE takes so long.
    pub write_delay: AtomicU64,
    /// SETATTR takes so long.
    pub setattr_delay: AtomicU64,
    /// READ takes so long.
    pub read_delay: AtomicU64,
    /// WRITE fails with this.
    pub write_error: AtomicU32,
    /// Servers that are ready.
    pub ready: AtomicU32,
    /// The files.
    pub files: [Meta; FILES],
}

/// The file in memory, and its first part mapped.
pub struct Control {
    file: File,
    block: &'static Block,
}

impl Control {
    /// Opens it, or makes it.
    pub fn open(path: &Path) -> Result<Control> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .with_context(|| format!("open {}", path.display()))?;
        file.set_len(CONTENTS + FILES as u64 * LONGEST)?;
        // SAFETY: a new mapping of a file that is long enough; it is never unmapped.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Block>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            bail!("map {}: {}", path.display(), std::io::Error::last_os_error());
        }
        // SAFETY: mapped for ever, aligned, and made of atomics only, for which all bits are right.
        let block = unsafe { &*base.cast::<Block>() };
        Ok(Control { file, block })
    }

    /// Counters, delays, attributes.
    pub fn block(&self) -> &Block {
        self.block
    }

    /// A file's attributes.
    pub fn meta(&self, ino: u64) -> Option<&Meta> {
        let meta = self
            .block
            .files
            .get(usize::try_from(ino.checked_sub(FIRST)?).ok()?)?;
        (meta.used.load(SeqCst) == 1).then_some(meta)
    }

    fn at(ino: u64, offset: u64) -> u64 {
        CONTENTS + (ino - FIRST) * LONGEST + offset
    }

    /// Reads, to the end of the file.
    pub fn read(&self, ino: u64, offset: u64, want: usize) -> Result<Vec<u8>> {
        let size = self.meta(ino).context("no such file")?.size.load(SeqCst);
        let mut data = vec![0; want.min(size.saturating_sub(offset) as usize)];
        self.file.read_exact_at(&mut data, Self::at(ino, offset))?;
        Ok(data)
    }

    /// Writes, and makes the file longer if need be.
    pub fn write(&self, ino: u64, offset: u64, data: &[u8]) -> Result<()> {
        let meta = self.meta(ino).context("no such file")?;
        let end = offset + data.len() as u64;
        if end > LONGEST {
            bail!("too long");
        }
        self.file.write_all_at(data, Self::at(ino, offset))?;
        meta.size.fetch_max(end, SeqCst);
        Ok(())
    }

    /// Makes a file so long; what is cut off reads as zeros later.
    pub fn truncate(&self, ino: u64, size: u64) -> Result<()> {
        let meta = self.meta(ino).context("no such file")?;
        if size > LONGEST {
            bail!("too long");
        }
        let old = meta.size.swap(size, SeqCst);
        if size < old {
            self.file
                .write_all_at(&vec![0; (old - size) as usize], Self::at(ino, size))?;
        }
        Ok(())
    }

    /// Sets the time of its contents.
    pub fn set_mtime(&self, ino: u64, time: Time) {
        if let Some(meta) = self.meta(ino) {
            meta.mtime.0.store(time.seconds, SeqCst);
            meta.mtime.1.store(time.nanos, SeqCst);
        }
    }

    /// All attributes.
    pub fn attributes(&self, ino: u64) -> Option<Attributes> {
        let meta = self.meta(ino)?;
        let mtime = Time {
            seconds: meta.mtime.0.load(SeqCst),
            nanos: meta.mtime.1.load(SeqCst),
        };
        let size = meta.size.load(SeqCst);
        Some(Attributes {
            size,
            blocks: size.div_ceil(512),
            mtime,
            ctime: mtime,
            atime: mtime,
            mode: meta.mode.load(SeqCst),
            nlink: 1,
            uid: 0,
            gid: 0,
            xattrs: false,
        })
    }

    /// Makes a file; its inode number.
    pub fn create(&self, name: &str, mode: u32) -> Result<u64> {
        for (ino, meta) in (FIRST..).zip(&self.block.files) {
            if meta.used.compare_exchange(0, 2, SeqCst, SeqCst).is_ok() {
                let mut bytes = [0u8; 32];
                for (to, from) in bytes.iter_mut().zip(name.bytes()) {
                    *to = from;
                }
                for (cell, part) in meta.name.iter().zip(bytes.as_chunks::<8>().0) {
                    cell.store(u64::from_le_bytes(*part), SeqCst);
                }
                meta.mode.store(mode & 0o7777, SeqCst);
                meta.size.store(0, SeqCst);
                meta.mtime.0.store(1_000_000_000, SeqCst);
                meta.mtime.1.store(0, SeqCst);
                meta.used.store(1, SeqCst);
                return Ok(ino);
            }
        }
        bail!("no room for another file")
    }

    /// Removes one.
    pub fn remove(&self, ino: u64) {
        let _ = self.truncate(ino, 0);
        if let Some(meta) = self.meta(ino) {
            meta.used.store(0, SeqCst);
        }
    }

    /// Names and inode numbers.
    pub fn names(&self) -> Vec<(String, u64)> {
        let mut all = Vec::new();
        for (ino, meta) in (FIRST..).zip(&self.block.files) {
            if meta.used.load(SeqCst) == 1 {
                let bytes: Vec<u8> = meta
                    .name
                    .iter()
                    .flat_map(|cell| cell.load(SeqCst).to_le_bytes())
                    .take_while(|byte| *byte != 0)
                    .collect();
                all.push((String::from_utf8_lossy(&bytes).into_owned(), ino));
            }
        }
        all
    }

    /// All requests so far.
    pub fn requests(&self) -> u64 {
        let b = self.block;
        [
            &b.lookups,
            &b.getattrs,
            &b.setattrs,
            &b.reads,
            &b.writes,
            &b.fsyncs,
            &b.others,
        ]
        .iter()
        .map(|counter| counter.load(SeqCst))
        .sum()
    }
}
