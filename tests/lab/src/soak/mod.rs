//! Checks run round after round, for what shows itself once in many times.

mod schedule;
mod tally;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use schedule::Schedule;
use tally::Tally;

use crate::cli::{Machine, Soak};
use crate::error::{At, Error, Result};
use crate::options::Tier;
use crate::process::{self, lock};
use crate::run::{Subject, name_of};
use crate::scenario;

/// Longest time for a scenario, in seconds, where none is named: those of the kernel extension take minutes.
const LIMIT: u64 = 900;

/// What came of the soak that is under way, for a signal's thread to print.
static SO_FAR: Mutex<Option<Tally>> = Mutex::new(None);

/// A scenario on a kernel.
struct Job<'a> {
    subject: &'a Subject,
    tier: Tier,
    kernel: &'a str,
}

impl Job<'_> {
    /// How long it is expected to take; none where that is not known before.
    fn takes(&self) -> Duration {
        match self.subject {
            Subject::Known(scenario) => Duration::from_secs(scenario.soak.unwrap_or_default()),
            Subject::File { .. } => Duration::ZERO,
        }
    }
}

/// Runs scenarios until the time is used up, whatever fails; returns whether nothing did.
///
/// # Errors
/// Something could not be run at all.
pub fn run(args: &Soak) -> Result<bool> {
    let subjects = subjects(&args.scenarios)?;
    let jobs = jobs(&subjects, &args.kernel);
    let seed = args.machine.seed.unwrap_or_else(rand::random);
    let folder = new_folder(&args.machine.logs()?.join("soak"))?;
    let names = jobs
        .iter()
        .map(|job| name_of(job.subject.name(), job.tier, job.kernel, &args.machine));
    *lock(&SO_FAR) = Some(Tally::new(seed, args.minutes, &folder, names.collect()));
    let time = Duration::from_secs(60 * args.minutes);
    eprintln!(
        "a soak of {} minutes with --seed {seed}; logs: {}",
        args.minutes,
        folder.display()
    );
    let schedule = Schedule::new(seed, time, jobs.iter().map(Job::takes).collect());
    let done = rounds(schedule, &jobs, &args.machine, &folder);
    // A signal's thread has it now, and the last word.
    if process::interrupted() {
        return Ok(false);
    }
    let tally = lock(&SO_FAR).take();
    if let Some(tally) = &tally {
        println!("{}", tally.text());
    }
    done?;
    Ok(tally.is_some_and(|tally| tally.good()))
}

fn rounds(mut schedule: Schedule, jobs: &[Job<'_>], machine: &Machine, folder: &Path) -> Result<()> {
    let start = Instant::now();
    while let Some(turn) = schedule.next(start.elapsed()) {
        let Some(job) = jobs.get(turn.job) else { break };
        // Each round has logs of its own: they are small, and what failed once may not do so again.
        let logs = folder.join(format!("round-{}", turn.round));
        let machine = Machine {
            logs: Some(logs.clone()),
            seed: Some(turn.seed),
            limit: machine.limit.or(Some(LIMIT)),
            ..machine.clone()
        };
        let minutes = start.elapsed().as_secs() / 60;
        eprintln!("round {}, --seed {}, after {minutes} min:", turn.round, turn.seed);
        let outcome = job.subject.run(job.tier, job.kernel, &machine);
        // What fails because a signal ended the guests is no failure.
        if process::interrupted() {
            break;
        }
        let outcome = outcome?;
        eprintln!("{}", outcome.line());
        if outcome.error.is_none() {
            schedule.passed(turn.job, Duration::from_secs_f64(outcome.seconds));
        }
        if let Some(tally) = lock(&SO_FAR).as_mut() {
            tally.count(turn, &outcome, &logs, start.elapsed())?;
        }
    }
    Ok(())
}

/// Prints what came of a soak that a signal ends, if one is under way.
pub fn interrupted() {
    let Some(mut tally) = lock(&SO_FAR).take() else {
        return;
    };
    if let Err(error) = tally.interrupt() {
        eprintln!("fsd-lab: {error}");
    }
    println!("{}", tally.text());
}

fn subjects(names: &[String]) -> Result<Vec<Subject>> {
    if names.is_empty() {
        let checks = scenario::ALL.iter().filter(|scenario| scenario.soak.is_some());
        return Ok(checks.map(Subject::Known).collect());
    }
    names.iter().map(|name| Subject::find(name)).collect()
}

fn jobs<'a>(subjects: &'a [Subject], kernels: &'a [String]) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for kernel in kernels {
        for subject in subjects {
            let tiers = match subject {
                Subject::Known(scenario) => scenario.tiers.to_vec(),
                Subject::File { .. } => vec![subject.tier()],
            };
            jobs.extend(tiers.into_iter().map(|tier| Job {
                subject,
                tier,
                kernel,
            }));
        }
    }
    jobs
}

/// A folder that no soak has had yet, below this one: 1, 2 …
fn new_folder(below: &Path) -> Result<PathBuf> {
    fs::create_dir_all(below).at(|| format!("make the folder {}", below.display()))?;
    for number in 1..=u32::MAX {
        let folder = below.join(number.to_string());
        match fs::create_dir(&folder) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => {
                return made
                    .at(|| format!("make the folder {}", folder.display()))
                    .map(|()| folder);
            }
        }
    }
    Err(Error::check(format!("{} is full", below.display())))
}
