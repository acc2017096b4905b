//! What is compared: two baselines that write through, and write-back; a cluster for each.

use std::path::PathBuf;

use anyhow::Context;
use clap::ValueEnum;

use super::Args;
use crate::procs::{self, Cluster, ClusterSpec};
use crate::progress::check;

/// How the baseline treats files that several mounts have open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Baseline {
    /// In the page cache, revoked optimistically: the paper's.
    Occ,
    /// Past the page cache: what write-through of this file system does.
    Bypass,
}

/// A mode of the comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Every write goes to the daemon.
    Through(Baseline),
    /// What the paper proposes.
    Back,
}

impl Mode {
    /// The paper's baseline.
    pub const OCC: Self = Self::Through(Baseline::Occ);
    /// This file system's own.
    pub const BYPASS: Self = Self::Through(Baseline::Bypass);
    /// In the order of the tables.
    pub const ALL: [Self; 3] = [Self::OCC, Self::BYPASS, Self::Back];

    /// In tables and plots.
    pub fn name(self) -> &'static str {
        match self {
            Self::Through(Baseline::Occ) => "WT+OCC",
            Self::Through(Baseline::Bypass) => "WT bypass",
            Self::Back => "write-back",
        }
    }

    /// Those that are to be run.
    pub fn wanted(baselines: &[Baseline], back: bool) -> Vec<Self> {
        let wanted = |mode: &Self| match mode {
            Self::Through(baseline) => baselines.contains(baseline),
            Self::Back => back,
        };
        Self::ALL.into_iter().filter(wanted).collect()
    }
}

/// The clusters.
pub struct Modes {
    clusters: Vec<(Mode, Cluster)>,
    mounts: usize,
}

impl Modes {
    /// Starts them.
    ///
    /// # Errors
    /// One of them does not start.
    pub fn start(args: &Args, back: bool) -> anyhow::Result<Self> {
        let fsd = procs::fsd_binary()?;
        let mounts = args
            .scale_nodes
            .iter()
            .copied()
            .max()
            .unwrap_or(0)
            .max(args.nodes);
        let cluster = |mode: Mode| {
            check()?;
            let cache = match mode {
                Mode::Through(_) => "writethrough",
                Mode::Back => "writeback",
            };
            let spec = ClusterSpec {
                mounts,
                cache: cache.to_owned(),
                cache_shared: mode == Mode::OCC,
                fabric: args.fabric.clone(),
                pool_mib: args.pool_mib,
            };
            let cluster =
                Cluster::start(&fsd, &spec).with_context(|| format!("a cluster for {}", mode.name()))?;
            Ok((mode, cluster))
        };
        let wanted = Mode::wanted(&args.baseline, back).into_iter();
        let clusters = wanted.map(cluster).collect::<anyhow::Result<_>>()?;
        Ok(Self { clusters, mounts })
    }

    /// That of a mode that is there.
    pub fn cluster(&self, mode: Mode) -> Option<&Cluster> {
        self.clusters.iter().find(|(m, _)| *m == mode).map(|(_, c)| c)
    }

    /// What is compared here.
    pub fn there(&self) -> Vec<Mode> {
        self.clusters.iter().map(|(m, _)| *m).collect()
    }

    /// Mount points of a mode.
    pub fn dirs(&self, mode: Mode) -> Vec<PathBuf> {
        let cluster = self.cluster(mode).into_iter();
        cluster
            .flat_map(|c| (0..self.mounts).map(|n| c.mount(n)))
            .collect()
    }

    /// Modes in the order of a round.
    pub fn turns(&self, round: usize) -> Vec<Mode> {
        turns(self.there(), round)
    }
}

/// The order changes from round to round, so that what drifts meets all alike.
fn turns(mut modes: Vec<Mode>, round: usize) -> Vec<Mode> {
    let first = round % modes.len().max(1);
    modes.rotate_left(first);
    modes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_baseline_can_be_left_out() {
        use Baseline::{Bypass, Occ};
        assert_eq!(Mode::wanted(&[Bypass, Occ], true), Mode::ALL);
        assert_eq!(Mode::wanted(&[Occ], true), [Mode::OCC, Mode::Back]);
        assert_eq!(Mode::wanted(&[Bypass], false), [Mode::BYPASS]);
    }

    #[test]
    fn each_mode_takes_each_place() {
        let rounds: Vec<_> = (0..3).map(|n| turns(Mode::ALL.to_vec(), n)).collect();
        for place in 0..3 {
            for mode in Mode::ALL {
                assert!(rounds.iter().any(|modes| modes[place] == mode));
            }
        }
        let two = vec![Mode::OCC, Mode::Back];
        assert_eq!(turns(two.clone(), 1), [Mode::Back, Mode::OCC]);
        assert_eq!(turns(two.clone(), 2), two);
        assert!(turns(Vec::new(), 1).is_empty());
    }
}
