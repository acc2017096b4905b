//! What is run in the lab.

pub mod devices;
pub mod faults;
pub mod file;
pub mod kmod;
pub mod perftest;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::options::Tier;

/// Scenarios that are files, and examples of such.
const MOUNT: &str = include_str!("../../scenarios/mount.toml");
const CONFORMANCE: &str = include_str!("../../scenarios/conformance.toml");
const HOLDER_KILLED: &str = include_str!("../../scenarios/holder-killed.toml");
const POWER_OFF: &str = include_str!("../../scenarios/power-off.toml");
const LAUNCH: &str = include_str!("../../scenarios/launch.toml");
const HISTORIES: &str = include_str!("../../scenarios/histories.toml");
const EXTENSION: &str = include_str!("../../scenarios/extension.toml");
const CONTENDED: &str = include_str!("../../scenarios/contended.toml");
const STORM: &str = include_str!("../../scenarios/storm.toml");
const STRAIN: &str = include_str!("../../scenarios/strain.toml");
const COUNTS: &str = include_str!("../../scenarios/counts.toml");
const CLOCKS: &str = include_str!("../../scenarios/clocks.toml");
const COHERENCE: &str = include_str!("../../scenarios/coherence.toml");

fn script(text: &str, cluster: &Cluster) -> Result<()> {
    file::Script::parse(text).map_err(Error::check)?.run(cluster)
}

/// A scenario that is part of this program.
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it shows, in a line.
    pub about: &'static str,
    /// Where it is run by `fsd-lab test`.
    pub tiers: &'static [Tier],
    /// Nodes that it needs.
    pub nodes: usize,
    /// The seconds it takes, about, where a soak runs it: checks of DistFUSE, neither of the lab nor for figures.
    pub soak: Option<u64>,
    /// What it does with a cluster.
    pub run: fn(&Cluster) -> Result<()>,
}

/// All of them.
pub const ALL: &[Scenario] = &[
    Scenario {
        name: "devices",
        about: "every node has an active RoCE v2 device, every guest FUSE, configfs, shared folders",
        tiers: &[Tier::Single, Tier::Multi],
        nodes: 1,
        soak: None,
        run: devices::run,
    },
    Scenario {
        name: "perftest",
        about: "latency and bandwidth between two nodes by the perftest tools, as a table and as CSV",
        tiers: &[Tier::Single, Tier::Multi],
        nodes: 2,
        soak: None,
        run: perftest::run,
    },
    Scenario {
        name: "faults",
        about: "guests killed, rebooted, paused; links cut, parted, slow, lossy; MTU changed",
        tiers: &[Tier::Single, Tier::Multi],
        nodes: 3,
        soak: None,
        run: faults::run,
    },
    Scenario {
        name: "mount",
        about: "a file system between three guests over TCP (scenarios/mount.toml)",
        tiers: &[Tier::Multi],
        nodes: 3,
        soak: Some(15),
        run: |cluster| script(MOUNT, cluster),
    },
    Scenario {
        name: "mount-rdma",
        about: "the same over RDMA",
        tiers: &[Tier::Multi],
        nodes: 3,
        soak: Some(15),
        run: |cluster| {
            let rdma = MOUNT.replace("fabric = \"tcp\"", "fabric = \"verbs\"");
            script(&rdma, cluster)
        },
    },
    Scenario {
        name: "launch",
        about: "a job over ssh: fsd launch runs a cluster over RDMA on three guests (scenarios/launch.toml)",
        tiers: &[Tier::Multi],
        nodes: 3,
        soak: Some(15),
        run: |cluster| script(LAUNCH, cluster),
    },
    Scenario {
        name: "holder-killed",
        about: "a mount's guest dies with leases, another's link is cut (scenarios/holder-killed.toml)",
        tiers: &[Tier::Multi],
        nodes: 3,
        soak: Some(30),
        run: |cluster| script(HOLDER_KILLED, cluster),
    },
    Scenario {
        name: "power-off",
        about: "a mount's, the metadata server's, the storage node's guest dies under load (scenarios/power-off.toml)",
        tiers: &[Tier::Multi],
        nodes: 4,
        soak: Some(65),
        run: |cluster| script(POWER_OFF, cluster),
    },
    Scenario {
        name: "power-off-extension",
        about: "the same with the kernel extension",
        tiers: &[Tier::Multi],
        nodes: 4,
        soak: Some(90),
        run: |cluster| script(&POWER_OFF.replace("kmod = false", "kmod = true"), cluster),
    },
    Scenario {
        name: "counts",
        about: "atomics and leases of three guests on one record, every count exact (scenarios/counts.toml)",
        tiers: &[Tier::Multi],
        nodes: 3,
        soak: Some(15),
        run: |cluster| script(COUNTS, cluster),
    },
    Scenario {
        name: "clocks",
        about: "a mount with a wrong clock is refused, a slow one is not (scenarios/clocks.toml)",
        tiers: &[Tier::Multi],
        nodes: 2,
        soak: Some(60),
        run: |cluster| script(CLOCKS, cluster),
    },
    Scenario {
        name: "kmod",
        about: "the kernel extension alone: kmod-check's tests on two mounts; built by DKMS; loading, unloading, refusing to",
        tiers: &[Tier::Single],
        nodes: 1,
        soak: Some(60),
        run: kmod::run,
    },
    Scenario {
        name: "extension",
        about: "a cluster over RDMA with the kernel extension (scenarios/extension.toml)",
        tiers: &[Tier::Single],
        nodes: 4,
        soak: Some(300),
        run: |cluster| script(EXTENSION, cluster),
    },
    Scenario {
        name: "contended",
        about: "several tasks of each mount at the same files, with the extension (scenarios/contended.toml)",
        tiers: &[Tier::Single],
        nodes: 4,
        soak: Some(120),
        run: |cluster| script(CONTENDED, cluster),
    },
    Scenario {
        name: "storm",
        about: "random kills and stops with the extension, each read compared with what was acknowledged (scenarios/storm.toml)",
        tiers: &[Tier::Single],
        nodes: 4,
        soak: Some(400),
        run: |cluster| script(STORM, cluster),
    },
    Scenario {
        name: "strain",
        about: "the extension short of memory, and under AIO and io_uring (scenarios/strain.toml)",
        tiers: &[Tier::Single],
        nodes: 4,
        soak: Some(110),
        run: |cluster| script(STRAIN, cluster),
    },
    Scenario {
        name: "conformance",
        about: "the contract of rdma-transport over verbs (scenarios/conformance.toml)",
        tiers: &[Tier::Single],
        nodes: 4,
        soak: Some(60),
        run: |cluster| script(CONFORMANCE, cluster),
    },
    Scenario {
        name: "histories",
        about: "histories of concurrent operations over RDMA are linearizable (scenarios/histories.toml)",
        tiers: &[Tier::Single],
        nodes: 4,
        soak: Some(85),
        run: |cluster| script(HISTORIES, cluster),
    },
    Scenario {
        name: "coherence",
        about: "the cross-mount checks on two mounts over RDMA (scenarios/coherence.toml)",
        tiers: &[Tier::Single],
        nodes: 3,
        soak: Some(45),
        run: |cluster| script(COHERENCE, cluster),
    },
];

/// A scenario by its name.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}
