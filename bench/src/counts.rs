//! One record in the memory of one process, changed by several: by atomics, and under leases by what is not atomic.
//! Whatever gets lost or done twice shows in a sum.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lockmgr::{LeaseManager, Mode, RecordId};
use rdma_transport::mem::SharedMem;
use rdma_transport::{Access, Connection, Fabric, Op, RemoteAddr};

use crate::lease::node::{Node, STORE, name};
use crate::progress::check;
use crate::rdma::connect;
use crate::stats::sig;
use crate::table::Table;
use crate::transport::peer::{Echo, kind, open};

/// Longest wait for the others, or for a lease.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a record.
const RECORD: u64 = 64;
/// Bytes of the memory; as many records as a node of `bench lease` expects.
const MEMORY: usize = 64 << 10;
/// The word by which the processes wait for each other.
const ARRIVED: u64 = 0;
/// The words of the record that atomics change.
const ADDED: u64 = RECORD;
const SWAPPED: u64 = RECORD + 8;
const MIXED: u64 = RECORD + 16;
const OLDS: u64 = RECORD + 24;
/// The record of the lease, and the word that it protects.
const LEASE: u64 = 2;
const GUARDED: u64 = 3 * RECORD;

/// Arguments of `bench counts`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which of the processes this is, from 0; that one also has the memory, and reaches it as the others do.
    #[arg(long)]
    number: u16,
    /// Where all of them listen, in their order.
    #[arg(long, value_delimiter = ',', required = true)]
    members: Vec<String>,
    /// Where the memory is reached.
    #[arg(long)]
    memory: String,
    /// Provider.
    #[arg(long, default_value = "verbs")]
    provider: String,
    /// Fetch-and-adds, compare-and-swaps, and mixed ones, of each process.
    #[arg(long, default_value_t = 500)]
    operations: u64,
    /// Read, add, write under an exclusive lease, of each process.
    #[arg(long, default_value_t = 150)]
    turns: u64,
    /// Longest time that callers look for completions before they sleep, µs.
    #[arg(long, default_value_t = 20)]
    spin_us: u64,
}

/// The memory, from one of the processes.
struct Words {
    conn: Arc<dyn Connection>,
    base: RemoteAddr,
    /// How many processes there are, and how often they have met.
    all: u64,
    met: Cell<u64>,
}

impl Words {
    fn read(&self, word: u64) -> anyhow::Result<u64> {
        let mut bytes = [0; 8];
        self.conn.execute(&mut [Op::Read {
            at: self.base.plus(word),
            into: &mut bytes,
        }])?;
        Ok(u64::from_ne_bytes(bytes))
    }

    fn write(&self, word: u64, value: u64) -> anyhow::Result<()> {
        let at = self.base.plus(word);
        let from = &value.to_ne_bytes();
        Ok(self.conn.execute(&mut [Op::Write { at, from }])?)
    }

    fn add(&self, word: u64, add: u64) -> anyhow::Result<u64> {
        let at = self.base.plus(word);
        let mut ops = [Op::Faa { at, add, old: 0 }];
        self.conn.execute(&mut ops)?;
        match ops {
            [Op::Faa { old, .. }] => Ok(old),
            _ => bail!("an operation of another kind came back"),
        }
    }

    /// Adds one by compare-and-swap; `guess` is what the word may be, and becomes what it is. How often
    /// somebody else was faster.
    fn swap_up(&self, word: u64, guess: &mut u64) -> anyhow::Result<u64> {
        let at = self.base.plus(word);
        for beaten in 0.. {
            let mut ops = [Op::Cas {
                at,
                expect: *guess,
                new: *guess + 1,
                old: 0,
            }];
            self.conn.execute(&mut ops)?;
            let [Op::Cas { old, .. }] = ops else { break };
            if old == *guess {
                *guess += 1;
                return Ok(beaten);
            }
            *guess = old;
        }
        bail!("an operation of another kind came back")
    }

    /// Waits until all processes have come here.
    fn meet(&self) -> anyhow::Result<()> {
        self.met.set(self.met.get() + 1);
        self.add(ARRIVED, 1)?;
        let start = Instant::now();
        while self.read(ARRIVED)? < self.all * self.met.get() {
            ensure!(start.elapsed() < PATIENCE, "not all processes came");
            check()?;
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}

/// What this process did.
#[derive(Default)]
struct Done {
    beaten: u64,
    atomics: Duration,
    leases: Duration,
}

fn atomics(words: &Words, args: &Args, done: &mut Done) -> anyhow::Result<()> {
    // They begin each kind together, so that the process next to the memory, which is faster, does not have it alone.
    words.meet()?;
    let start = Instant::now();
    let (mut last, mut olds) = (None, 0u64);
    for _ in 0..args.operations {
        let old = words.add(ADDED, 1)?;
        ensure!(last.is_none_or(|l| old > l), "a count went back to {old}");
        last = Some(old);
        olds += old;
    }
    done.atomics += start.elapsed();
    words.meet()?;
    let start = Instant::now();
    let mut guess = 0;
    for _ in 0..args.operations {
        done.beaten += words.swap_up(SWAPPED, &mut guess)?;
    }
    done.atomics += start.elapsed();
    words.meet()?;
    let start = Instant::now();
    guess = 0;
    for n in 0..args.operations {
        if (n + u64::from(args.number)).is_multiple_of(2) {
            words.add(MIXED, 1)?;
        } else {
            done.beaten += words.swap_up(MIXED, &mut guess)?;
        }
    }
    done.atomics += start.elapsed();
    words.add(OLDS, olds)?;
    Ok(())
}

fn guarded(words: &Words, args: &Args, manager: &LeaseManager, done: &mut Done) -> anyhow::Result<()> {
    let start = Instant::now();
    for _ in 0..args.turns {
        let guard = manager.enter(RecordId::new(0, LEASE), Mode::Exclusive, PATIENCE)?;
        let value = words.read(GUARDED)?;
        words.write(GUARDED, value + 1)?;
        drop(guard);
        check()?;
    }
    done.leases = start.elapsed();
    Ok(())
}

/// What each word must be after everything, with what it counts.
fn expected(members: u64, operations: u64, turns: u64) -> [(&'static str, u64, u64); 5] {
    let all = members * operations;
    [
        ("fetch-and-add", ADDED, all),
        (
            "values before fetch-and-add, all different",
            OLDS,
            all * all.saturating_sub(1) / 2,
        ),
        ("compare-and-swap", SWAPPED, all),
        ("both on one word", MIXED, all),
        ("read and write under a lease", GUARDED, members * turns),
    ]
}

/// The table of what came out; whether all of it is right.
fn judge(found: impl Fn(u64) -> anyhow::Result<u64>, args: &Args) -> anyhow::Result<(Table, bool)> {
    let members = args.members.len() as u64;
    let mut table = Table::new(
        format!("Counts of {members} processes over {}", args.provider),
        &["by", "must be", "is", "verdict"],
    );
    let mut right = true;
    for (what, word, must) in expected(members, args.operations, args.turns) {
        let is = found(word)?;
        right &= is == must;
        let verdict = if is == must { "exact" } else { "WRONG" };
        table.row(vec![
            what.into(),
            must.to_string(),
            is.to_string(),
            verdict.into(),
        ]);
    }
    Ok((table, right))
}

/// The memory in this process.
fn serve(args: &Args) -> anyhow::Result<Arc<dyn Fabric>> {
    let echo = Arc::new(Echo(OnceLock::new()));
    let memory = Arc::new(SharedMem::anonymous(MEMORY)?);
    memory.zero(0, MEMORY)?;
    let spin = Duration::from_micros(args.spin_us);
    let fabric = open(
        kind(&args.provider)?,
        args.memory.clone(),
        STORE,
        spin,
        Arc::clone(&echo) as _,
    )?;
    let _ = echo.0.set(fabric.register(&memory, Access::ALL)?);
    Ok(fabric)
}

/// Connects this process to the memory and to the others.
fn join(args: &Args, fabric: &dyn Fabric, node: &Node) -> anyhow::Result<Words> {
    let start = Instant::now();
    // Who comes before the memory is registered is not told its key.
    let conn = loop {
        let conn = connect(fabric, &args.memory).context("the memory")?;
        let asked = Instant::now();
        while node.key().is_none() && asked.elapsed() < Duration::from_secs(2) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if node.key().is_some() {
            break conn;
        }
        conn.close();
        ensure!(start.elapsed() < PATIENCE, "the memory's key does not come");
        check()?;
    };
    node.set_storage(Arc::clone(&conn));
    for (number, addr) in (0u16..).zip(&args.members) {
        if number != args.number {
            let peer = connect(fabric, addr).with_context(|| format!("process {number}"))?;
            node.add_peer(number, peer);
        }
    }
    let key = node.key().context("the memory's key")?;
    Ok(Words {
        conn,
        base: RemoteAddr { key, offset: 0 },
        all: args.members.len() as u64,
        met: Cell::new(0),
    })
}

/// Runs `bench counts`.
///
/// # Errors
/// The others do not come, a lease does not come, or a count is off.
pub fn run(args: &Args) -> anyhow::Result<()> {
    let own = args
        .members
        .get(usize::from(args.number))
        .context("--number is not one of --members")?;
    let memory = (args.number == 0).then(|| serve(args)).transpose()?;
    let node = Node::new(args.number);
    let spin = Duration::from_micros(args.spin_us);
    let fabric = open(
        kind(&args.provider)?,
        own.clone(),
        &name(args.number),
        spin,
        Arc::clone(&node) as _,
    )?;
    let manager = node.manage()?;
    let result = play(args, fabric.as_ref(), &node, &manager);
    fabric.shutdown();
    if let Some(memory) = memory {
        memory.shutdown();
    }
    result
}

fn play(args: &Args, fabric: &dyn Fabric, node: &Node, manager: &LeaseManager) -> anyhow::Result<()> {
    let words = join(args, fabric, node)?;
    let mut done = Done::default();
    atomics(&words, args, &mut done)?;
    words.meet()?;
    guarded(&words, args, manager, &mut done)?;
    words.meet()?;
    let (table, right) = judge(|word| words.read(word), args)?;
    // The memory must not go before all have looked.
    if args.number == 0 {
        words.meet()?;
    } else {
        words.add(ARRIVED, 1)?;
    }
    println!("{table}");
    let stats = manager.stats();
    println!(
        "process {}: {} atomics a second, {} of its compare-and-swaps were too late; {} turns a second under the lease, {} lease messages sent",
        args.number,
        sig(3.0 * args.operations as f64 / done.atomics.as_secs_f64()),
        done.beaten,
        sig(args.turns as f64 / done.leases.as_secs_f64()),
        stats.messages_sent
    );
    ensure!(right, "a count is off");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(dir: &std::path::Path, number: u16) -> Args {
        let path = |name: String| dir.join(name).to_string_lossy().into_owned();
        Args {
            number,
            members: (0..3).map(|n| path(format!("member{n}"))).collect(),
            memory: path("memory".into()),
            provider: "shm".into(),
            operations: 200,
            turns: 50,
            spin_us: 20,
        }
    }

    #[test]
    fn three_processes_count_exactly() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let members: Vec<_> = (0..3)
                .map(|n| {
                    let args = arguments(dir.path(), n);
                    scope.spawn(move || run(&args))
                })
                .collect();
            members.into_iter().for_each(|m| m.join().unwrap().unwrap());
        });
    }

    #[test]
    fn a_lost_update_is_noticed() {
        let args = arguments(std::path::Path::new("/"), 0);
        let all = expected(3, 200, 50);
        let at = |word: u64| all.iter().find(|e| e.1 == word).unwrap().2;
        assert!(judge(|word| Ok(at(word)), &args).unwrap().1);
        for (_, lost, _) in all {
            let (table, right) = judge(|word| Ok(at(word) - u64::from(word == lost)), &args).unwrap();
            assert!(!right && table.to_string().contains("WRONG"), "{table}");
        }
    }
}
