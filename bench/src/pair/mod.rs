//! Two hosts that have the same file systems mounted in the same places, and a program on each of them: files and directories go to
//! and fro between the two, in one file system after the other, in turns. One of the programs leads, measures and tells; the other
//! does what it is told.

mod report;
mod wire;
mod work;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail, ensure};

use crate::fs::micro::Scale;
use crate::fs::micro_ops as micro;
use crate::names::phases::{Phase, Place};
use crate::procs;
use crate::progress::Progress;
use crate::stats::Latency;
use report::Report;
use wire::Link;
use work::{Done, Job, Worker};

/// Arguments of `bench pair`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Lead: wait for the other program here.
    #[arg(long, value_name = "ADDRESS:PORT", required_unless_present = "connect")]
    listen: Option<String>,
    /// Follow the program that listens there, which says where the file systems are.
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with = "listen")]
    connect: Option<String>,
    /// A DistFUSE cluster, mounted on both hosts. Ratios are those of the first. Stale data is a failure.
    #[arg(long, value_name = "NAME=DIR")]
    fsd: Vec<System>,
    /// Another file system.
    #[arg(long, value_name = "NAME=DIR")]
    other: Vec<System>,
    /// Tell requests and messages of the first cluster, whose configuration this is.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Rounds; medians are shown.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Files of each host in a round.
    #[arg(long, default_value_t = 200)]
    files: usize,
    /// Turns of a round, half of them with the one as the writer and half with the other.
    #[arg(long, default_value_t = 200)]
    turns: u64,
    /// Cached reads and stats of a round; writes are a fifth.
    #[arg(long, default_value_t = 5000)]
    reads: u64,
    /// Only operations with this in their names: turns, names, cached.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
}

/// A name and where it is mounted.
#[derive(Debug, Clone)]
struct System {
    name: String,
    dir: PathBuf,
}

impl FromStr for System {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, dir) = text.split_once('=').ok_or("NAME=DIR is expected")?;
        Ok(Self {
            name: name.to_owned(),
            dir: dir.into(),
        })
    }
}

/// The phases of names, in this order.
const PHASES: [Phase; 6] = [
    Phase::Create,
    Phase::Stat,
    Phase::StatNext,
    Phase::ReadNext,
    Phase::Rename,
    Phase::Remove,
];

/// The two, as the one that leads has them.
struct Two {
    own: Worker,
    other: Link,
}

type Answer = Result<Done, String>;

impl Two {
    /// The other one's part of it.
    fn there(&mut self, job: &Job) -> anyhow::Result<Done> {
        self.other.send(job)?;
        self.answer()
    }

    fn answer(&mut self) -> anyhow::Result<Done> {
        let answer: Answer = self.other.receive()?.context("the other program is gone")?;
        answer.map_err(|why| anyhow::anyhow!("the other host: {why}"))
    }

    /// On the one (0) or the other (1).
    fn on(&mut self, which: usize, job: &Job) -> anyhow::Result<Done> {
        if which == 0 {
            self.own.run(job)
        } else {
            self.there(job)
        }
    }

    /// One job on each at the same time; what the slower one took.
    fn at_once(&mut self, jobs: &[Job; 2]) -> anyhow::Result<f64> {
        self.other.send(&jobs[1])?;
        let own = self.own.run(&jobs[0]);
        let other = self.answer();
        Ok(own?.seconds.max(other?.seconds))
    }

    fn both(&mut self, job: &Job) -> anyhow::Result<()> {
        (0..2).try_for_each(|which| self.on(which, job).map(drop))
    }
}

/// What a cluster's mounts have counted, where it is asked for.
#[derive(Clone, Copy)]
struct Counting<'a>(Option<(&'a Path, &'a Path)>);

type Counts = BTreeMap<String, u64>;

impl Counting<'_> {
    fn now(&self) -> Option<Counts> {
        let (fsd, config) = self.0?;
        procs::counters(fsd, config)
    }

    /// Runs something; its result, and what was counted meanwhile, without what asking costs.
    fn during<T>(
        &self,
        two: &mut Two,
        dir: &Path,
        run: impl FnOnce(&mut Two) -> anyhow::Result<T>,
    ) -> anyhow::Result<(T, Option<Counts>)> {
        let settle = Job::Settle(dir.to_owned());
        two.both(&settle)?;
        let first = self.now();
        two.both(&settle)?;
        let before = self.now();
        let result = run(two)?;
        // What is written back later is of this.
        two.both(&settle)?;
        let after = self.now();
        let counts = first.zip(before).zip(after).map(|((first, before), after)| {
            let of = |all: &Counts, name: &str| all.get(name).copied().unwrap_or(0);
            after
                .keys()
                .map(|name| {
                    let asking = of(&before, name).saturating_sub(of(&first, name));
                    let all = of(&after, name).saturating_sub(of(&before, name));
                    (name.clone(), all.saturating_sub(asking))
                })
                .collect()
        });
        Ok((result, counts))
    }
}

struct Handed {
    writes: Latency,
    reads: Latency,
    all: Latency,
    stale: u64,
}

/// One writes, the other reads, by turns; each call is timed where it is made, so what the two programs say to each other is in none.
fn hand_over(two: &mut Two, dir: &Path, turns: u64) -> anyhow::Result<Handed> {
    let mut handed = Handed {
        writes: Latency::new()?,
        reads: Latency::new()?,
        all: Latency::new()?,
        stale: 0,
    };
    two.both(&Job::Open(dir.to_owned()))?;
    let first: u64 = rand::random();
    for writer in 0..2 {
        // The first ones make the file, and bring it here from who had it last.
        let from = first.wrapping_add(writer as u64 * turns);
        for n in 0..turns / 2 + 4 {
            let number = from.wrapping_add(n);
            let wrote = two.on(writer, &Job::Overwrite(number))?;
            let read = two.on(1 - writer, &Job::Read(number))?;
            handed.stale += u64::from(read.stale);
            if n >= 4 {
                for (done, to) in [(wrote, &mut handed.writes), (read, &mut handed.reads)] {
                    let took = std::time::Duration::from_secs_f64(done.seconds);
                    to.add(took);
                    handed.all.add(took);
                }
            }
        }
    }
    two.both(&Job::Close)?;
    Ok(handed)
}

/// A round of one system.
struct Round<'a> {
    args: &'a Args,
    number: usize,
    system: usize,
    dir: &'a Path,
    counting: Counting<'a>,
}

impl Round<'_> {
    fn turns(&self, two: &mut Two, report: &mut Report) -> anyhow::Result<()> {
        let turns = self.args.turns;
        let run = |two: &mut Two| hand_over(two, self.dir, turns);
        let (handed, counts) = self.counting.during(two, self.dir, run)?;
        let mut note = |name: &str, unit, value| report.note(name, unit, self.system, value);
        note(report::HAND_OVERS, "1/s", 1e9 / handed.all.mean());
        note(
            "    of them, the half of all took at most",
            "us",
            handed.all.at(0.5) / 1e3,
        );
        note("    and 99 of 100", "us", handed.all.at(0.99) / 1e3);
        note(
            "    overwrites, the half took at most",
            "us",
            handed.writes.at(0.5) / 1e3,
        );
        note(
            "    reads, the half took at most",
            "us",
            handed.reads.at(0.5) / 1e3,
        );
        // Those that were not timed were done, too.
        let done = turns / 2 * 2 + 8;
        report.stale(self.system, done, handed.stale);
        report.cost(report::HAND_OVERS, (done * 2) as f64, counts);
        Ok(())
    }

    fn names(&self, two: &mut Two, report: &mut Report, place: Place) -> anyhow::Result<()> {
        let base = self.dir.join(format!("pair-{}-{}", self.number, place as u8));
        let dirs = [0, 1].map(|whose| match place {
            Place::Own => base.join(format!("task{whose}")),
            Place::Shared => base.clone(),
        });
        two.on(0, &Job::Mkdir(base.clone()))?;
        if place == Place::Own {
            (0..2).try_for_each(|who| two.on(who, &Job::Mkdir(dirs[who].clone())).map(drop))?;
        }
        for phase in PHASES {
            let files = self.args.files;
            let jobs = [0, 1].map(|who| {
                let whose = if phase.is_of_others() { 1 - who } else { who };
                let dir = dirs[whose].clone();
                Job::Names {
                    dir,
                    phase,
                    whose,
                    files,
                }
            });
            let (seconds, counts) = self
                .counting
                .during(two, self.dir, |two| two.at_once(&jobs))
                .with_context(|| place.name())?;
            let name = format!("{}, {}", phase.name(), place.name());
            report.note(&name, "1/s", self.system, 2.0 * files as f64 / seconds);
            report.cost(&name, 2.0 * files as f64, counts);
        }
        if place == Place::Own {
            (0..2).try_for_each(|who| two.on(who, &Job::Rmdir(dirs[who].clone())).map(drop))?;
        }
        two.on(0, &Job::Rmdir(base)).map(drop)
    }

    /// What only the host that leads does.
    fn cached(&self, two: &mut Two, report: &mut Report) -> anyhow::Result<()> {
        type Operation = fn(&Path, &Scale) -> anyhow::Result<f64>;
        let scale = Scale {
            reads: self.args.reads,
            writes: self.args.reads / 5,
            ..Scale::quick()
        };
        let operations: [(&str, Operation, u64); 3] = [
            ("4 KiB cached read", micro::cached_read, scale.reads),
            ("4 KiB write", micro::write_4k, scale.writes),
            ("stat by path, cached", micro::stat, scale.reads),
        ];
        for (name, operation, count) in operations {
            let (ns, counts) = self
                .counting
                .during(two, self.dir, |_| operation(self.dir, &scale))?;
            report.note(name, "us", self.system, ns / 1e3);
            report.cost(name, count as f64, counts);
        }
        Ok(())
    }

    fn measure(&self, two: &mut Two, report: &mut Report, what: &str) -> anyhow::Result<()> {
        match what {
            "turns" => self.turns(two, report),
            "names" => Place::ALL
                .into_iter()
                .try_for_each(|place| self.names(two, report, place)),
            _ => self.cached(two, report),
        }
    }
}

fn lead(address: &str, args: &Args, out: &Path) -> anyhow::Result<()> {
    ensure!(!args.fsd.is_empty(), "--fsd says where DistFUSE is mounted");
    ensure!(
        args.rounds > 0 && args.files > 0 && args.turns > 1,
        "at least one round, one file and two turns are wanted"
    );
    let systems: Vec<&System> = args.fsd.iter().chain(&args.other).collect();
    let whats: Vec<&str> = ["turns", "names", "cached"]
        .into_iter()
        .filter(|what| what.contains(&args.only))
        .collect();
    ensure!(!whats.is_empty(), "--only: turns, names or cached");
    let mut two = Two {
        own: Worker::default(),
        other: Link::accept(address)?,
    };
    let fsd = args.config.is_some().then(procs::fsd_binary).transpose()?;
    let counting = Counting(fsd.as_deref().zip(args.config.as_deref()));
    let names = systems.iter().map(|system| system.name.clone()).collect();
    let mut report = Report::new(names, args.fsd.len());
    let progress = Progress::new("pair", (args.rounds * whats.len() * systems.len()) as u64);
    for number in 0..args.rounds {
        for what in &whats {
            for (system, mounted) in systems.iter().enumerate() {
                progress.step(format!("round {}: {what}, {}", number + 1, mounted.name));
                let round = Round {
                    args,
                    number,
                    system,
                    dir: &mounted.dir,
                    counting: if system == 0 { counting } else { Counting(None) },
                };
                round
                    .measure(&mut two, &mut report, what)
                    .with_context(|| format!("{what}, {}", mounted.name))?;
            }
        }
    }
    drop(progress);
    let table = report.table(args.rounds);
    table.write_csv(&out.join("pair.csv"))?;
    report.counters().write_csv(&out.join("pair-counters.csv"))?;
    println!("{table}\nCSV: {}", out.display());
    report.judge()
}

fn follow(address: &str) -> anyhow::Result<()> {
    let mut link = Link::connect(address)?;
    let mut worker = Worker::default();
    while let Some(job) = link.receive::<Job>()? {
        let answer: Answer = worker.run(&job).map_err(|error| format!("{error:#}"));
        link.send(&answer)?;
    }
    Ok(())
}

/// Runs `bench pair`.
///
/// # Errors
/// A call fails, or a DistFUSE cluster is not what it promises to be.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    match (&args.listen, &args.connect) {
        (Some(address), None) => lead(address, args, out),
        (None, Some(address)) => follow(address),
        _ => bail!("--listen or --connect"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_programs_on_plain_directories() {
        let (ours, other, out) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
            tempfile::tempdir().unwrap(),
        );
        let system = |name: &str, dir: &Path| System {
            name: name.into(),
            dir: dir.to_owned(),
        };
        // The address is free again at once, and nobody else takes it as soon.
        let address = std::net::TcpListener::bind("127.0.0.1:0")
            .and_then(|l| l.local_addr())
            .unwrap()
            .to_string();
        let args = Args {
            listen: Some(address.clone()),
            connect: None,
            fsd: vec![system("one", ours.path())],
            other: vec![system("two", other.path())],
            config: None,
            rounds: 2,
            files: 3,
            turns: 6,
            reads: 20,
            only: String::new(),
        };
        let follower = std::thread::spawn(move || follow(&address));
        lead(args.listen.as_deref().unwrap(), &args, out.path()).unwrap();
        follower.join().unwrap().unwrap();
        let text = std::fs::read_to_string(out.path().join("pair.csv")).unwrap();
        assert!(
            text.contains("remove, shared directory") && text.contains("0 of 28"),
            "{text}"
        );
    }
}
