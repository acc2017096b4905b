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
    #[arg(long, default_value = "1..200")]
    seeds: Seeds,
    /// All that was noted, also of those that succeed.
    #[arg(long)]
    verbose: bool,
    /// Calls of each task in a phase.
    #[arg(long, default_value_t = 25)]
    calls: u32,
    /// Mounts.
    #[arg(long, default_value_t = 2)]
    mounts: usize,
    /// Phases.
    #[arg(long, default_value_t = 3)]
    phases: u32,
    /// A rule to leave out.
    #[arg(long)]
    flaw: Option<Flaws>,
    /// Leaves out each rule in turn, and says after how many seeds that is found.
    #[arg(long)]
    flaws: bool,
}

impl Args {
    fn size(&self) -> Size {
        Size {
            calls: self.calls,
            mounts: self.mounts,
            phases: self.phases,
            ..Size::default()
        }
    }
}

/// After how many seeds a flaw is found, and how; not by one that fails anyhow.
fn find(args: &Args, flaws: Flaws) -> Option<(usize, String)> {
    let found = |seed| {
        let failure = run(seed, args.size(), flaws).failure?;
        let anyhow = run(seed, args.size(), Flaws::default()).failure;
        anyhow.is_none().then_some(failure)
    };
    let mut all = args.seeds.clone().map(found).enumerate();
    all.find_map(|(n, failure)| Some((n + 1, failure?.to_string())))
}

fn table(args: &Args) {
    for (name, flaws) in Flaws::all() {
        match find(args, flaws) {
            Some((n, how)) => {
                let line = how.lines().take(2).collect::<Vec<_>>().join(" ");
                println!(
                    "| {name} | {} | {n} |",
                    line.chars().take(160).collect::<String>()
                );
            }
            None => println!("| {name} | not found | |"),
        }
    }
}

fn main() {
    let args = Args::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    if args.flaws {
        return table(&args);
    }
    let begun = Instant::now();
    let (mut failed, mut switches) = (0, 0);
    for seed in args.seeds.clone() {
        let report = run(seed, args.size(), args.flaw.unwrap_or_default());
        switches += report.switches;
        let notes = &report.notes;
        let shown = match (args.verbose, &report.failure) {
            (true, _) => notes.len(),
            (false, Some(_)) => 40,
            (false, None) => 0,
        };
        let skipped = notes.len().saturating_sub(shown);
        notes[skipped..].iter().for_each(|note| println!("{note}"));
        if let Some(failure) = &report.failure {
            failed += 1;
            println!("seed {seed} failed after {:?}: {failure}", report.time);
        } else if args.verbose {
            let (hash, time) = (report.hash, report.time);
            println!(
                "seed {seed}: hash {hash:016x}, {time:?}, {} switches",
                report.switches
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
