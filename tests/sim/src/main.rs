//! Runs simulations: `fsd-sim --seeds 1..1000`.

use std::time::Instant;

use clap::Parser;
use fsd_sim::flaws::Flaws;
use fsd_sim::scenario::{Size, run};
use fsd_sim::seeds::Seeds;

/// The whole system below FUSE in deterministic simulation.
#[derive(Debug, Parser)]
struct Args {
    /// Which: 5, or 1..1000.
    #[arg(long, default_value = "1..50")]
    seeds: Seeds,
    /// All that was noted, also of those that succeed.
    #[arg(long)]
    verbose: bool,
    /// Calls of each task in a phase.
    #[arg(long, default_value_t = 25)]
    calls: u32,
}

fn main() {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .init();
    let begun = Instant::now();
    let (mut failed, mut switches) = (0, 0);
    for seed in args.seeds.clone() {
        let size = Size {
            calls: args.calls,
            ..Size::default()
        };
        let report = run(seed, size, Flaws::default());
        switches += report.switches;
        if args.verbose {
            report.notes.iter().for_each(|note| println!("{note}"));
        }
        if let Some(failure) = &report.failure {
            failed += 1;
            if !args.verbose {
                let skip = report.notes.len().saturating_sub(40);
                report.notes[skip..].iter().for_each(|note| println!("{note}"));
            }
            println!("seed {seed} failed after {:?}: {failure}", report.time);
        } else if args.verbose {
            println!(
                "seed {seed}: hash {:016x}, {:?}, {} switches",
                report.hash, report.time, report.switches
            );
        }
    }
    let took = begun.elapsed();
    println!(
        "{} seeds, {failed} failed, {took:?}, {switches} switches",
        args.seeds.count()
    );
    if failed > 0 {
        std::process::exit(1);
    }
}
