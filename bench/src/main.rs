//! Benchmarks of DistFUSE, its parts, and the floors they are compared with.
//!
//! Everything that is measured is measured here and now, floors included; nothing is quoted.

mod beside;
mod counts;
mod deaths;
mod demo;
mod fs;
mod lease;
mod members;
mod mounts;
mod names;
mod nullfs;
mod others;
mod pair;
mod paper;
mod plot;
mod procs;
mod progress;
mod rdma;
mod stats;
#[cfg(feature = "stores")]
mod stores;
mod table;
mod transport;
mod trees;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures DistFUSE and its parts beside their floors.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    /// Pin everything, servers included, to this CPU.
    #[arg(long, global = true)]
    pin: Option<usize>,
    /// Write CSV files and plots here.
    #[arg(long, global = true, default_value = "target/bench")]
    out: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Latency and bandwidth of the fabric between two processes.
    Transport(transport::Args),
    /// The verbs provider beside perftest's tools, between two hosts.
    Rdma(rdma::Args),
    /// Leases: held, uncontended, handed over; against a spin lock and a lock server.
    Lease(lease::Args),
    /// One record, several processes: atomics and leases whose sums must come out exactly.
    Counts(counts::Args),
    /// The file system beside a null FUSE server and tmpfs.
    Fs(fs::Args),
    /// The figures of the paper: write-through and write-back of the same code, beside its ratios.
    Paper(paper::Args),
    /// A null FUSE server's calls without the kernel extension, with it, and with another mount attached to it.
    Others(others::Args),
    /// Names as mdtest has them, by several mounts, beside a null FUSE server, tmpfs and this machine's disk.
    Names(names::Args),
    /// A tree of small files: copied, read on another mount, cloned, unpacked, listed, removed.
    Trees(trees::Args),
    /// File systems that are mounted already, beside each other and beside their network.
    Mounts(mounts::Args),
    /// The same file systems on two hosts: what goes to and fro between them.
    Pair(pair::Args),
    /// How long others wait for what a mount had that is killed, stopped or evicted.
    Deaths(deaths::Args),
    /// What a thousand mounts that only say that they live cost the metadata server.
    Members(members::Args),
    /// A real tree, a real build, coherence and a table, on a cluster of three mounts.
    Demo(demo::Args),
    /// Embedded stores for the metadata server.
    #[cfg(feature = "stores")]
    Store(stores::Args),
    #[command(hide = true)]
    NullServer { mode: nullfs::NullMode, dir: PathBuf },
    #[command(hide = true)]
    TransportPeer(transport::PeerArgs),
    #[cfg(feature = "stores")]
    #[command(hide = true)]
    StoreChild(stores::ChildArgs),
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    match &cli.command {
        Command::NullServer { mode, dir } => return procs::serve_null(*mode, dir),
        Command::TransportPeer(args) => return transport::peer::run(args),
        #[cfg(feature = "stores")]
        Command::StoreChild(args) => return stores::child(args),
        _ => {}
    }
    progress::catch_signals()?;
    if let Some(cpu) = cli.pin {
        procs::pin(Some(cpu))?;
    }
    std::fs::create_dir_all(&cli.out)?;
    match &cli.command {
        Command::Transport(args) => transport::run(args, &cli.out),
        Command::Rdma(args) => rdma::run(args, &cli.out),
        Command::Lease(args) => lease::run(args, &cli.out),
        Command::Counts(args) => counts::run(args),
        Command::Fs(args) => fs::run(args, cli.pin, &cli.out),
        Command::Paper(args) => paper::run(args, &cli.out),
        Command::Others(args) => others::run(args, &cli.out),
        Command::Names(args) => names::run(args, &cli.out),
        Command::Trees(args) => trees::run(args, &cli.out),
        Command::Mounts(args) => mounts::run(args, &cli.out),
        Command::Pair(args) => pair::run(args, &cli.out),
        Command::Deaths(args) => deaths::run(args, &cli.out),
        Command::Members(args) => members::run(args, &cli.out),
        Command::Demo(args) => demo::run(args),
        #[cfg(feature = "stores")]
        Command::Store(args) => stores::run(args, &cli.out),
        _ => Ok(()),
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
