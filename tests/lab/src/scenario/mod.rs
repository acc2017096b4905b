//! What is run in the lab.

pub mod devices;
pub mod faults;
pub mod file;
pub mod perftest;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::options::Tier;

/// Also an example of a scenario as a file.
const MOUNT: &str = include_str!("../../scenarios/mount.toml");

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
        run: devices::run,
    },
    Scenario {
        name: "perftest",
        about: "latency and bandwidth between two nodes by the perftest tools, as a table and as CSV",
        tiers: &[Tier::Single, Tier::Multi],
        nodes: 2,
        run: perftest::run,
    },
    Scenario {
        name: "faults",
        about: "guests killed, rebooted, paused; links cut, parted, slow, lossy; MTU changed",
        tiers: &[Tier::Single, Tier::Multi],
        nodes: 3,
        run: faults::run,
    },
    Scenario {
        name: "mount",
        about: "a file system between three guests over TCP (scenarios/mount.toml)",
        tiers: &[Tier::Multi],
        nodes: 3,
        run: |cluster| file::Script::parse(MOUNT).map_err(Error::check)?.run(cluster),
    },
];

/// A scenario by its name.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}
