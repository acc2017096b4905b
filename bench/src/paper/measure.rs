//! One point of a figure, in all modes, in turns.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Context;

use super::figures::Work;
use super::mix;
use super::modes::{Mode, Modes};
use crate::fs::runner;
use crate::procs::Cluster;
use crate::progress::check;

/// How long, how often.
pub struct Settings {
    /// Length of a run.
    pub duration: Duration,
    /// Runs of each mode.
    pub rounds: usize,
    /// Calls of a round of figure 2.
    pub calls: u64,
    /// Rounds of figure 2.
    pub calls_rounds: usize,
}

/// Samples of one mode at one point, one a round.
#[derive(Default)]
pub struct Samples {
    /// Throughput.
    pub speed: Vec<f64>,
    /// The same with the time of an fsync after it; empty where nothing is said of that.
    pub durable: Vec<f64>,
    /// Mean latency; empty as above.
    pub mean_ms: Vec<f64>,
    /// What the counters of the cluster did in all rounds.
    pub counters: BTreeMap<String, u64>,
}

/// Runs a point.
///
/// # Errors
/// A file system call fails, or contents are not what they must be.
pub fn measure(modes: &Modes, settings: &Settings, work: &Work) -> anyhow::Result<Vec<(Mode, Samples)>> {
    let mut all: Vec<(Mode, Samples)> = modes
        .there()
        .into_iter()
        .map(|m| (m, Samples::default()))
        .collect();
    for mode in modes.there() {
        let dirs = modes.dirs(mode);
        match work {
            Work::Blocks(workload) => runner::prepare(workload, &dirs[..workload.nodes]).map(drop),
            Work::Loop(mix) => mix::fill(mix, &dirs),
        }
        .context(mode.name())?;
    }
    for round in 0..settings.rounds {
        for mode in modes.turns(round) {
            check()?;
            let dirs = modes.dirs(mode);
            let counters = || {
                modes
                    .cluster(mode)
                    .and_then(Cluster::counters)
                    .unwrap_or_default()
            };
            let before = counters();
            let (speed, blocks) = match work {
                Work::Blocks(workload) => {
                    let last = round + 1 == settings.rounds;
                    let out = runner::run(*workload, &dirs[..workload.nodes], settings.duration, last);
                    let out = out.context(mode.name())?;
                    (
                        out.mib_per_s,
                        Some((out.durable_mib_per_s, out.latency.mean() / 1e6)),
                    )
                }
                Work::Loop(mix) => {
                    let dirs = &dirs[..mix.nodes];
                    (mix::run(mix, dirs, settings.duration).context(mode.name())?, None)
                }
            };
            for (_, samples) in all.iter_mut().filter(|(m, _)| *m == mode) {
                samples.speed.push(speed);
                samples.durable.extend(blocks.map(|b| b.0));
                samples.mean_ms.extend(blocks.map(|b| b.1));
                for (name, now) in counters() {
                    let grown = now.saturating_sub(before.get(&name).copied().unwrap_or(0));
                    *samples.counters.entry(name).or_default() += grown;
                }
            }
        }
    }
    for mode in modes.there() {
        let dirs = modes.dirs(mode);
        match work {
            Work::Blocks(workload) => runner::clear(workload, &dirs[..workload.nodes]),
            Work::Loop(mix) => mix::verify(mix, &dirs[..mix.nodes]).and_then(|()| mix::clear(mix, &dirs)),
        }
        .context(mode.name())?;
    }
    Ok(all)
}
