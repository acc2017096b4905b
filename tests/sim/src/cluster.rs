//! How the cluster is configured, and how its clocks go.

use std::path::Path;

use fsd_node::config::Config;

use crate::chance;
use crate::flaws::{ClusterFlaw, Flaws};

/// By how many parts of a million clocks may be too fast or too slow: two of them differ by 1 % at most.
const RATES: [i64; 3] = [-5_000, 0, 5_000];
/// As [`RATES`], in a cluster without margins: what a mount has besides, because it freezes early, covers less than that.
const POOR_RATES: [i64; 3] = [-100_000, 0, 100_000];
/// As [`RATES`], in a cluster whose clocks are worse than its margins allow for.
const BAD_RATES: [i64; 3] = [-500_000, 0, 500_000];

/// By how much the clock of a node is too fast, as the seed says.
#[must_use]
pub fn rate(flaws: Flaws) -> i64 {
    chance::one_of(match flaws.cluster {
        Some(ClusterFlaw::ClocksApart) => &BAD_RATES,
        Some(ClusterFlaw::NoMargin) => &POOR_RATES,
        _ => &RATES,
    })
}

/// A configuration below a folder, with so many storage nodes; their memory outlives their processes there.
///
/// # Panics
/// The folder cannot be written to.
#[must_use]
pub fn config(dir: &Path, nodes: usize, flaws: Flaws) -> Config {
    let shm = dir.join("memory").display().to_string();
    let mut text = format!(
        "cluster = \"sim\"\nkey_file = \"key\"\nfabric = \"tcp\"\ntimeout_ms = 10000\n\
         [lease]\nwait_ms = 30000\n[mount]\nloops = 3\n\
         [meta]\nlisten = \"meta:1\"\ndir = \"meta\"\nmemory_dir = \"{shm}/meta\"\n"
    );
    for node in 0..nodes {
        text += &format!(
            "[[storage]]\nid = {node}\nlisten = \"storage{node}:1\"\ndir = \"{node}\"\npool = \"16MiB\"\nmemory_dir = \"{shm}/{node}\"\n"
        );
        std::fs::create_dir_all(format!("{shm}/{node}")).expect("memory");
    }
    std::fs::create_dir_all(format!("{shm}/meta")).expect("memory");
    let path = dir.join("cluster.toml");
    std::fs::write(&path, text).expect("configuration");
    let mut config = Config::load(&path).expect("configuration");
    if flaws.cluster == Some(ClusterFlaw::NoMargin) {
        // The least that is taken.
        config.membership.margin_ms = 100;
    }
    config
}
