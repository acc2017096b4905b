//! A machine that is short of memory: what takes the memory away, and what the kernel did about it.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};

const PAGE: usize = 4096;

/// A setting of the kernel, which has its former value again when this is dropped.
#[derive(Debug)]
pub struct Setting {
    path: PathBuf,
    former: String,
}

impl Setting {
    /// Sets one below /proc/sys, or at another path that takes what it shows.
    ///
    /// # Errors
    /// There is none, or it is not ours to set.
    pub fn set(name: &str, value: &str) -> anyhow::Result<Self> {
        let path = PathBuf::from("/proc/sys").join(name);
        let former = fs::read_to_string(&path).with_context(|| name.to_owned())?;
        fs::write(&path, value).with_context(|| format!("{name} = {value}"))?;
        Ok(Self { path, former })
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        // Nobody could do anything about it.
        let _ = fs::write(&self.path, &self.former);
    }
}

/// A value of /proc/meminfo, in bytes.
///
/// # Errors
/// The kernel tells no such value.
pub fn memory(name: &str) -> anyhow::Result<usize> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|rest| rest.trim().strip_suffix(" kB"));
    let kilobytes: usize = number.with_context(|| format!("no {name}"))?.parse()?;
    Ok(kilobytes << 10)
}

/// What the kernel has counted since it was started.
#[derive(Debug)]
pub struct Counted {
    /// Processes killed for want of memory.
    pub killed: u64,
    /// Pages taken back by the kernel's thread for that.
    pub by_thread: u64,
    /// Pages taken back by who wanted some.
    pub by_callers: u64,
}

impl Counted {
    /// Now.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub fn now() -> anyhow::Result<Self> {
        let text = fs::read_to_string("/proc/vmstat")?;
        let of = |name: &str| {
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|n| n.parse::<u64>().ok())
                .with_context(|| format!("no {name} in /proc/vmstat"))
        };
        Ok(Self {
            killed: of("oom_kill")?,
            by_thread: of("pgsteal_kswapd")?,
            by_callers: of("pgsteal_direct")?,
        })
    }
}

/// Memory that is taken, and in use, until this is dropped.
#[derive(Debug)]
pub struct Balloon {
    _memory: Vec<Vec<u8>>,
}

impl Balloon {
    /// Takes memory until this many bytes are available.
    ///
    /// # Errors
    /// There is less from the beginning, or some comes from elsewhere all the time.
    pub fn leaving(bytes: usize) -> anyhow::Result<Self> {
        let mut memory_taken = Vec::new();
        for _ in 0..50 {
            let available = memory("MemAvailable")?;
            if available <= bytes {
                ensure!(
                    !memory_taken.is_empty(),
                    "only {} MiB to begin with",
                    available >> 20
                );
                return Ok(Self {
                    _memory: memory_taken,
                });
            }
            // The estimate is rough: half of the way, then half of the rest.
            let step = ((available - bytes) / 2).max(1 << 20);
            let mut piece = vec![0; step];
            // What was never written to is not there.
            piece.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
            memory_taken.push(piece);
        }
        anyhow::bail!("{} MiB are still available", memory("MemAvailable")? >> 20)
    }
}
