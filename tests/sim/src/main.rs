//! Runs simulations: `fsd-sim --seeds 1..1000`.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Instant;

use clap::Parser;
use fsd_sim::flaws::Flaws;
use fsd_sim::scenario::{Size, run};
use fsd_sim::seeds::Seeds;
use fsd_sim::task::REQUESTS;
use rt::sim::Report;

/// The whole system below FUSE in deterministic simulation.
#[derive(Debug, Parser)]
struct Args {
    /// Which: 5, or 1..1000.
    #[arg(long, default_value = "1..200")]
    seeds: Seeds,
    /// All that was noted, also of those that succeed.
    #[arg(long)]
    verbose: bool,
    /// Simulations at a time; 0: as many as there are processors.
    #[arg(long, default_value_t = 0)]
    jobs: usize,
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
    fn threads(&self) -> usize {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        if self.jobs == 0 { processors() } else { self.jobs }
    }

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

/// What all simulations so far came to.
#[derive(Default)]
struct Sum {
    seeds: usize,
    failed: usize,
    switches: u64,
}

impl Sum {
    /// Adds one, and says what is to be said of it.
    fn add(&mut self, seed: u64, report: &Report, verbose: bool) {
        self.seeds += 1;
        self.switches += report.switches;
        let notes = &report.notes;
        let shown = match (verbose, &report.failure) {
            (true, _) => notes.len(),
            (false, Some(_)) => 40,
            (false, None) => 0,
        };
        let skipped = notes.len().saturating_sub(shown);
        notes[skipped..].iter().for_each(|note| println!("{note}"));
        let time = report.time;
        if let Some(failure) = &report.failure {
            self.failed += 1;
            println!("seed {seed} failed after {time:?}: {failure}");
        } else if verbose {
            let (hash, switches) = (report.hash, report.switches);
            println!("seed {seed}: hash {hash:016x}, {time:?}, {switches} switches");
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
    let seeds = Mutex::new(args.seeds.clone());
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..args.threads() {
            scope.spawn(|| {
                // Not in the loop's head: what is locked there stays locked in its body.
                let next = || lock(&seeds).next();
                while let Some(seed) = next() {
                    let report = run(seed, args.size(), args.flaw.unwrap_or_default());
                    lock(&sum).add(seed, &report, args.verbose);
                }
            });
        }
    });
    let (took, sum) = (begun.elapsed(), lock(&sum));
    let requests = REQUESTS.load(Ordering::Relaxed);
    println!(
        "{} seeds, {} failed, {took:.1?}, {} switches of threads, {requests} requests, {:.0} a second",
        sum.seeds,
        sum.failed,
        sum.switches,
        requests as f64 / took.as_secs_f64()
    );
    if sum.failed > 0 {
        std::process::exit(1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
