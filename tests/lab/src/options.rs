//! What a cluster is to be, and what the host must have for it.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use crate::error::{At, Error, Result};
use crate::image::{self, Extra, Image, packages};
use crate::qemu::{Machine, QEMU};
use crate::tools;

/// Most nodes: the last byte of their hardware addresses is one digit.
pub const MOST_NODES: usize = 8;
/// The largest payload of an RDMA packet in Ethernet packets of this size, as rxe has it: a power of two.
pub fn rdma_mtu(mtu: u32) -> u32 {
    // What rxe keeps for its headers.
    let room = mtu.saturating_sub(80);
    [4096, 2048, 1024, 512]
        .into_iter()
        .find(|size| *size <= room)
        .unwrap_or(256)
}

/// How nodes are spread over guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// All in one guest with two processors.
    Single,
    /// Each in a guest of its own.
    Multi,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Tier::Single => "single",
            Tier::Multi => "multi",
        })
    }
}

/// How guests come up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Boot {
    /// From their kernel.
    Cold,
    /// From a snapshot, which is made where there is none yet.
    Snapshot,
}

/// Which kernel guests run.
#[derive(Debug, Clone)]
pub enum KernelChoice {
    /// Debian's newest of a series.
    Series(String),
    /// That of a package file.
    File(PathBuf),
}

/// What a cluster is to be.
#[derive(Debug, Clone)]
pub struct Options {
    /// How nodes are spread.
    pub tier: Tier,
    /// The kernel.
    pub kernel: KernelChoice,
    /// How many nodes.
    pub nodes: usize,
    /// The largest packet; 1500 gives an RDMA path of 1024 bytes, 9000 one of 4096.
    pub mtu: u32,
    /// Processors of a guest.
    pub cpus: Option<u32>,
    /// Memory of a guest in MiB.
    pub memory: Option<u32>,
    /// A disk that all guests share, in MiB.
    pub disk: Option<u32>,
    /// How guests come up.
    pub boot: Boot,
    /// Longest time for one boot.
    pub boot_limit: Duration,
    /// Longest time from the end of the boots.
    pub limit: Duration,
    /// What tests in the guests draw their random numbers from, where these are not to be left to chance.
    pub seed: Option<u64>,
    /// What the image has besides.
    pub extra: Extra,
    /// The folder of this repository's programs.
    pub target: PathBuf,
    /// The folder of what is downloaded and built.
    pub cache: PathBuf,
    /// The package mirror, where not that of the host.
    pub mirror: Option<String>,
}

impl Options {
    /// The kernel, from the cache or fetched.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn kernel(&self) -> Result<packages::Kernel> {
        match &self.kernel {
            KernelChoice::Series(series) => {
                packages::kernel(&self.cache, series, self.mirror.as_deref(), false)
            }
            KernelChoice::File(path) => packages::kernel_of_file(&self.cache, path),
        }
    }

    /// The image, from the cache or built.
    ///
    /// # Errors
    /// It cannot be built.
    pub fn image(&self) -> Result<Image> {
        fs::create_dir_all(&self.cache).at(|| format!("make the folder {}", self.cache.display()))?;
        tools::find(QEMU)?;
        image::build(&self.cache, &self.kernel()?, &self.target, &self.extra)
    }

    /// The hardware of a guest.
    pub fn machine(&self) -> Machine {
        // Several emulators with more processors than the host has would wait for each other's.
        let (cpus, memory) = match self.tier {
            Tier::Single => (2, 3072),
            Tier::Multi => (1, 1536),
        };
        Machine {
            cpus: self.cpus.unwrap_or(cpus),
            memory: self.memory.unwrap_or(memory),
            disk: self.disk,
        }
    }

    /// Whether guests start from a snapshot.
    pub fn from_snapshot(&self) -> bool {
        self.boot == Boot::Snapshot
    }

    /// Fails where such a cluster cannot be on this host.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self) -> Result<()> {
        if !(1..=MOST_NODES).contains(&self.nodes) {
            return Err(Error::check(format!(
                "a cluster has 1 to {MOST_NODES} nodes, not {}",
                self.nodes
            )));
        }
        let guests = if self.tier == Tier::Single { 1 } else { self.nodes };
        let need = u64::from(self.machine().memory) * guests as u64 + u64::from(self.disk.unwrap_or(0));
        let text = fs::read_to_string("/proc/meminfo").at(|| "read /proc/meminfo".into())?;
        let free = text.lines().find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix("kB")?
                .trim()
                .parse::<u64>()
                .ok()
        });
        match free {
            // Guests seldom touch all of it.
            Some(free) if free / 1024 < need / 2 => Err(Error::missing(
                format!(
                    "memory for {guests} guests ({} MiB free, {need} MiB asked for)",
                    free / 1024
                ),
                "end other programs, or take fewer guests or a smaller --memory",
            )),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::rdma_mtu;

    #[test]
    fn rdma_packets_fit_ethernet_packets() {
        assert_eq!([9000, 4200, 1500, 1280].map(rdma_mtu), [4096, 4096, 1024, 1024]);
    }
}
