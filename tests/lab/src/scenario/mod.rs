//! What is run in the lab.

pub mod devices;
pub mod faults;
pub mod file;
pub mod perftest;

use crate::cluster::Cluster;
use crate::error::Result;
use crate::options::Tier;

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
];

/// A scenario by its name.
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}
