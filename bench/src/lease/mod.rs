//! Leases: held, uncontended, handed over; against a spin lock and a lock server over the same fabric.

mod contend;
mod floor;
pub mod node;
mod rivals;

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use lockmgr::{LeaseManager, Mode, RecordId};

use crate::plot::Chart;
use crate::progress::{Progress, check};
use crate::stats::{Latency, median, sig};
use crate::table::Table;
use crate::transport::peer::Hosts;
use contend::Lock;
use floor::Floor;
use node::LeaseCluster;

/// Arguments of `bench lease`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Providers.
    #[arg(long, value_delimiter = ',', default_values_t = ["shm".to_owned(), "tcp".to_owned()])]
    providers: Vec<String>,
    /// Nodes of the hand-over tests.
    #[arg(long, value_delimiter = ',', default_values_t = [2, 3, 4, 8])]
    nodes: Vec<usize>,
    /// Fewer samples.
    #[arg(long)]
    quick: bool,
    /// How long progress threads spin before they sleep, µs.
    #[arg(long, default_value_t = 20)]
    spin_us: u64,
    #[command(flatten)]
    hosts: Hosts,
}

/// Over verbs: how much longer than an atomic an uncontended lease may take to be had.
pub const ACQUIRE_LIMIT: f64 = 1.3;
/// Over verbs: a hand-over may take so many half round trips of messages, and an atomic.
pub const HAND_OVER_HALVES: f64 = 3.0;
/// After a lease is given back the progress thread looks for more work before it sleeps; this long it is let do so before
/// the next acquisition, which it would take the processor from where there is only one.
const SETTLE: Duration = Duration::from_micros(300);
/// Longest wait for a lease.
pub const PATIENCE: Duration = Duration::from_secs(10);

fn met(ok: bool) -> String {
    if ok { "met" } else { "MISSED" }.into()
}

fn held(cluster: &LeaseCluster, provider: &str, table: &mut Table) -> anyhow::Result<()> {
    let manager = cluster.manager(0);
    let id = RecordId::new(0, 1);
    drop(manager.enter(id, Mode::Shared, PATIENCE)?);
    let handle = manager.handle(id).ok_or_else(|| anyhow::anyhow!("no handle"))?;
    let n = 2_000_000u32;
    let before = (manager.stats(), cluster.fabric_stats(0));
    let mut lost = 0u32;
    let mut time = |name: &str, f: &mut dyn FnMut() -> bool| {
        let start = Instant::now();
        lost += (0..n).map(|_| u32::from(!f())).sum::<u32>();
        let ns = start.elapsed().as_secs_f64() * 1e9 / f64::from(n);
        table.row(vec![
            format!("{name}, {provider}"),
            sig(ns / 1000.0),
            "-".into(),
            "0".into(),
            "0".into(),
            "< 0.1".into(),
            met(ns < 100.0),
        ]);
    };
    time("held: enter and leave, by handle", &mut || {
        handle.try_enter(Mode::Shared).is_some()
    });
    time("held: enter and leave, by number", &mut || {
        manager.try_enter(id, Mode::Shared).is_some()
    });
    let after = (manager.stats(), cluster.fabric_stats(0));
    let silent = before.0.batches == after.0.batches
        && before.0.messages_sent == after.0.messages_sent
        && before.1.ops == after.1.ops
        && before.1.messages_sent == after.1.messages_sent;
    anyhow::ensure!(
        silent && lost == 0,
        "entering under a held lease used the fabric or failed"
    );
    Ok(())
}

/// Leases that nobody else wants, in turns with the fabric's own atomics.
fn uncontended(
    (cluster, floor): (&LeaseCluster, &Floor),
    provider: &str,
    n: u64,
    table: &mut Table,
) -> anyhow::Result<()> {
    const ROUNDS: u64 = 5;
    let manager = cluster.manager(0);
    let mut atomic = Latency::new()?;
    let mut tallies = [Tally::new(Mode::Shared)?, Tally::new(Mode::Exclusive)?];
    for round in 0..ROUNDS {
        atomic.merge(&floor.atomic(n / ROUNDS)?);
        for tally in &mut tallies {
            tally.play(manager, (round * n / ROUNDS)..((round + 1) * n / ROUNDS))?;
        }
    }
    table.row(vec![
        format!("one atomic, {provider}"),
        sig(atomic.at(0.5) / 1e3),
        sig(atomic.at(0.99) / 1e3),
        "1".into(),
        "0".into(),
        String::new(),
        String::new(),
    ]);
    for tally in &tallies {
        tally.report(provider, atomic.at(0.5), n, table);
    }
    Ok(())
}

/// Taking and giving back a lease of one mode.
pub struct Tally {
    /// Of the lease.
    pub mode: Mode,
    /// From asking to having.
    pub acquire: Latency,
    release: Latency,
    batches: [u64; 2],
    messages: u64,
}

impl Tally {
    /// Of nothing so far.
    ///
    /// # Errors
    /// Never with these limits.
    pub fn new(mode: Mode) -> anyhow::Result<Self> {
        Ok(Self {
            mode,
            acquire: Latency::new()?,
            release: Latency::new()?,
            batches: [0; 2],
            messages: 0,
        })
    }

    /// Takes and gives back, once a number of `turns`.
    ///
    /// # Errors
    /// The lease does not come.
    pub fn play(&mut self, manager: &LeaseManager, turns: Range<u64>) -> anyhow::Result<()> {
        for i in turns {
            let id = RecordId::new(0, 100 + i % 64);
            let s0 = manager.stats();
            let start = Instant::now();
            let guard = manager.enter(id, self.mode, PATIENCE)?;
            self.acquire.add(start.elapsed());
            drop(guard);
            let s1 = manager.stats();
            let start = Instant::now();
            manager.release(id);
            while manager.held(id).is_some() {
                std::thread::yield_now();
            }
            self.release.add(start.elapsed());
            // The last batch may still be on its way.
            while manager.snapshot().iter().any(|l| l.id == id) {
                std::thread::yield_now();
            }
            let s2 = manager.stats();
            let given_back = Instant::now();
            while given_back.elapsed() < SETTLE {
                std::thread::yield_now();
            }
            self.batches[0] += s1.batches - s0.batches;
            self.batches[1] += s2.batches - s1.batches;
            self.messages += s2.messages_sent - s0.messages_sent;
        }
        check()
    }

    fn report(&self, provider: &str, atomic: f64, n: u64, table: &mut Table) {
        let per = |x: u64| sig(x as f64 / n as f64);
        let (median, mode) = (self.acquire.at(0.5), self.mode);
        let ratio = median / atomic;
        let (target, fast) = match provider {
            // Atomics take next to nothing there: what the manager does is all there is.
            "shm" => ("< 2, one batch".to_owned(), median < 2_000.0),
            "verbs" => (
                format!("one batch, <= {ACQUIRE_LIMIT} x atomic: {}", sig(ratio)),
                ratio <= ACQUIRE_LIMIT,
            ),
            _ => ("one batch".to_owned(), true),
        };
        table.row(vec![
            format!("acquire {mode}, {provider}"),
            sig(median / 1e3),
            sig(self.acquire.at(0.99) / 1e3),
            per(self.batches[0]),
            per(self.messages),
            target,
            met(fast && self.batches[0] == n && self.messages == 0),
        ]);
        table.row(vec![
            format!("release {mode}, {provider}"),
            sig(self.release.at(0.5) / 1e3),
            sig(self.release.at(0.99) / 1e3),
            per(self.batches[1]),
            "0".into(),
            String::new(),
            String::new(),
        ]);
    }
}

/// Hand-over between two nodes beside what it consists of, in turns.
fn hand_over(
    (cluster, floor): (&LeaseCluster, &Floor),
    provider: &str,
    n: u64,
    table: &mut Table,
) -> anyhow::Result<()> {
    const ROUNDS: u64 = 5;
    let mut turns = Latency::new()?;
    let (mut half, mut atomic) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        turns.merge(&contend::to_and_fro(cluster, n / ROUNDS)?);
        half.push(floor.message(n / ROUNDS)?);
        atomic.push(floor.atomic(n / ROUNDS)?.at(0.5));
    }
    let (half, atomic, median_turn) = (median(&half), median(&atomic), turns.at(0.5));
    let limit = HAND_OVER_HALVES * half + atomic;
    table.row(vec![
        format!("message, half a round trip, {provider}"),
        sig(half / 1e3),
        "-".into(),
        "0".into(),
        "1".into(),
        String::new(),
        String::new(),
    ]);
    let judged = provider == "verbs";
    table.row(vec![
        format!("hand-over between two nodes, {provider}"),
        sig(median_turn / 1e3),
        sig(turns.at(0.99) / 1e3),
        "-".into(),
        "-".into(),
        if judged {
            format!(
                "<= {HAND_OVER_HALVES} x half + atomic: {} of it",
                sig(median_turn / limit)
            )
        } else {
            String::new()
        },
        if judged {
            met(median_turn <= limit)
        } else {
            String::new()
        },
    ]);
    Ok(())
}

fn contended(args: &Args, provider: &str, progress: &Progress, out: &Path) -> anyhow::Result<Table> {
    let header = [
        "lock",
        "nodes",
        "turns/s",
        "p50 us",
        "p99 us",
        "free-for-all/s",
        "least/most of a node",
    ];
    let mut table = Table::new(format!("Hand-over of an exclusive lock over {provider}"), &header);
    let run = Duration::from_millis(if args.quick { 150 } else { 1_000 });
    let mut chart = Chart {
        title: format!("Exclusive lock handed over in turn, {provider}"),
        unit: "turns/s".into(),
        groups: args.nodes.iter().map(|n| format!("{n} nodes")).collect(),
        series: Vec::new(),
        log: true,
    };
    let spin = Duration::from_micros(args.spin_us);
    for kind in ["lease", "CAS spin lock", "RPC lock server"] {
        let mut speeds = Vec::new();
        for &nodes in &args.nodes {
            progress.step(format!("{provider}: {kind}, {nodes} nodes"));
            let locks: Box<dyn Lock> = match kind {
                "lease" => Box::new(LeaseCluster::start(provider, &args.hosts, nodes, spin)?),
                "CAS spin lock" => Box::new(rivals::CasLocks::start(provider, &args.hosts, nodes, spin)?),
                _ => Box::new(rivals::RpcLocks::start(provider, &args.hosts, nodes, spin)?),
            };
            let turns = contend::in_turn(locks.as_ref(), nodes, run)?;
            let free = contend::free_for_all(locks.as_ref(), nodes, run)?;
            speeds.push(turns.per_second);
            table.row(vec![
                kind.into(),
                nodes.to_string(),
                sig(turns.per_second),
                sig(turns.latency.at(0.5) / 1e3),
                sig(turns.latency.at(0.99) / 1e3),
                sig(free.per_second),
                format!("{:.2}", free.fairness),
            ]);
            check()?;
        }
        chart.series.push((kind.into(), speeds));
    }
    chart.write(&out.join(format!("lease-handover-{provider}")))?;
    table.write_csv(&out.join(format!("lease-handover-{provider}.csv")))?;
    Ok(table)
}

/// Runs `bench lease`.
///
/// # Errors
/// A provider does not work here, or a lease does not come.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let steps = args.providers.len() * (1 + 3 * args.nodes.len());
    let progress = Progress::new("leases", steps as u64);
    let header = [
        "operation",
        "p50 us",
        "p99 us",
        "batches",
        "messages",
        "target",
        "verdict",
    ];
    let mut alone = Table::new("Leases without contention", &header);
    let mut tables = Vec::new();
    for provider in &args.providers {
        progress.step(format!("{provider}: uncontended"));
        let spin = Duration::from_micros(args.spin_us);
        let cluster = LeaseCluster::start(provider, &args.hosts, 2, spin)?;
        let floor = Floor::open(provider, &args.hosts, spin)?;
        held(&cluster, provider, &mut alone)?;
        let n = if provider == "shm" { 20_000 } else { 2_000 };
        let n = if args.quick { n / 10 } else { n };
        uncontended((&cluster, &floor), provider, n, &mut alone)?;
        let turns = if args.quick { 500 } else { 2_000 };
        hand_over((&cluster, &floor), provider, turns, &mut alone)?;
        drop(floor);
        drop(cluster);
        tables.push(contended(args, provider, &progress, out)?);
    }
    drop(progress);
    alone.write_csv(&out.join("lease-uncontended.csv"))?;
    println!("{alone}");
    for table in tables {
        println!("{table}");
    }
    println!("CSV and plots: {}", out.display());
    Ok(())
}
