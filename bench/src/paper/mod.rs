//! The paper's figures 2, 6, 7, 8 and 9: write-through with optimistic revocation (its baseline, "WT+OCC"),
//! write-through as this file system does it, and write-back with leases in the kernel, of the same code, in turns.
//! Only ratios are claims; nodes are mounts of one cluster on this machine.
//!
//! | module | subject |
//! | --- | --- |
//! | `modes` | what is compared, and its clusters |
//! | `figures`, `published` | points, and what the paper says of them |
//! | `mix` | the loops of figure 9 |
//! | `measure` | a point, in turns |
//! | `report` | tables and plots |
//! | `floor` | figure 2 |

mod figures;
mod floor;
mod measure;
mod mix;
mod modes;
mod published;
mod report;

use std::path::Path;
use std::time::Duration;

use anyhow::{bail, ensure};
use clap::ValueEnum;

use measure::Settings;
use modes::{Baseline, Modes};

/// Arguments of `bench paper`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fewer points, one short round: shapes, not figures.
    #[arg(long)]
    quick: bool,
    /// Figures (default: all).
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Figure>,
    /// What write-back is compared with.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["occ", "bypass"])]
    baseline: Vec<Baseline>,
    /// Nodes of figures 6, 7 and 9.
    #[arg(long, default_value_t = 4)]
    nodes: usize,
    /// Nodes to go through in figure 8.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4])]
    scale_nodes: Vec<usize>,
    /// Percents of reads to go through in figure 6: some of the paper's.
    #[arg(long, value_delimiter = ',', default_values_t = published::READS, value_parser = reads)]
    reads: Vec<u32>,
    /// Threads a node (the paper: 4).
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Files a node in figures 6 to 8 (the paper: 100).
    #[arg(long, default_value_t = 8)]
    files: usize,
    /// Size of each (the paper: 16 MiB).
    #[arg(long, default_value = "256KiB", value_parser = bytes)]
    file_size: u64,
    /// Of the paper's numbers of files in figure 9, for each node.
    #[arg(long, default_value_t = 0.0005)]
    count_scale: f64,
    /// Of the paper's sizes of files and of calls in figure 9.
    #[arg(long, default_value_t = 0.125)]
    size_scale: f64,
    /// Length of a run.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Rounds; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Fabric of the clusters.
    #[arg(long, default_value = "tcp")]
    fabric: String,
    /// Pool of each of a cluster's two storage nodes, MiB.
    #[arg(long, default_value_t = 96)]
    pool_mib: u64,
    /// Say what the clusters' counters did in each point.
    #[arg(long)]
    counters: bool,
}

/// A figure of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Figure {
    /// A write on a null file system.
    Fig2,
    /// Read:write ratios.
    Fig6,
    /// Contention.
    Fig7,
    /// Nodes.
    Fig8,
    /// Fileserver, webserver, netsfs.
    Fig9,
}

impl Args {
    fn wants(&self, figure: Figure) -> bool {
        self.only.is_empty() || self.only.contains(&figure)
    }
}

/// `256KiB`, `1MiB`, `4096`.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let shift = match unit {
        "" | "B" => 0,
        "KiB" => 10,
        "MiB" => 20,
        _ => return Err("a number of B, KiB or MiB is wanted".into()),
    };
    let number: u64 = digits.parse().map_err(|e| format!("{e}"))?;
    number.checked_mul(1 << shift).ok_or_else(|| "too large".into())
}

/// A share of reads of which the paper tells.
fn reads(text: &str) -> Result<u32, String> {
    let known = published::READS;
    text.parse()
        .ok()
        .filter(|reads| known.contains(reads))
        .ok_or_else(|| format!("the paper has {known:?}"))
}

/// Why there is no write-back here, if so.
fn missing() -> Option<String> {
    match distfuse_abi::kernel_version(Path::new(distfuse_abi::DEVICE)) {
        Ok(distfuse_abi::ABI_VERSION) => None,
        Ok(kernel) => Some(distfuse_abi::Error::Version { kernel }.to_string()),
        Err(error) => Some(error.to_string()),
    }
}

/// Runs `bench paper`.
///
/// # Errors
/// Something cannot be started or written, a file system call fails, contents are not what they must be, or the
/// kernel extension is not there: then only write-through has been measured.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    ensure!(
        args.nodes > 0 && args.threads > 0 && args.files > 0 && args.scale_nodes.iter().all(|n| *n > 0),
        "nodes, threads and files are at least one"
    );
    let missing = missing();
    if let Some(why) = &missing {
        eprintln!("only write-through: {why}");
    }
    let settings = if args.quick {
        Settings {
            duration: Duration::from_secs_f64(args.seconds.min(0.5)),
            rounds: 1,
            calls: 2_000,
            calls_rounds: 9,
        }
    } else {
        Settings {
            duration: Duration::from_secs_f64(args.seconds),
            rounds: args.rounds.max(1),
            calls: 4_000,
            calls_rounds: args.rounds.max(1) * 9,
        }
    };
    let modes = Modes::start(args, missing.is_none())?;
    if args.wants(Figure::Fig2) {
        floor::run(&modes, &settings, out)?;
    }
    for plan in figures::plans(args) {
        report::figure(&modes, &settings, &plan, args.counters, out)?;
    }
    println!(
        "Contents were verified at every point. CSV and plots: {}",
        out.display()
    );
    match missing {
        Some(why) => bail!("write-back was not measured: {why}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    pub fn arguments(args: &[&str]) -> Args {
        Line::parse_from([&["bench"], args].concat()).args
    }

    #[test]
    fn sizes() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("256KiB"), Ok(256 << 10));
        assert_eq!(bytes("1MiB"), Ok(1 << 20));
        assert!(bytes("1GB").is_err() && bytes("").is_err());
    }
}
