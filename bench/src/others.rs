//! What the kernel extension costs mounts that it has nothing to do with: a null FUSE server's calls with the module not
//! loaded, loaded, and loaded with another mount attached, in turns on the same mounts.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};

use crate::fs::micro_ops as ops;
use crate::nullfs::NullMode;
use crate::procs::NullServer;
use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;

/// Arguments of `bench others`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The module, which must not be loaded yet (distfuse.ko).
    #[arg(long)]
    module: PathBuf,
    /// Rounds.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Calls a round that the page cache answers; of those that the server answers a twentieth.
    #[arg(long, default_value_t = 4000)]
    calls: u64,
}

/// As in figure 2: nothing but the calls is in the figure.
const HOT: u64 = 256 << 10;

type Measure = fn(&Path, u64) -> anyhow::Result<f64>;

/// Call, mode of the server, whether the server answers it, measure.
const MEASURES: [(&str, NullMode, bool, Measure); 6] = [
    ("4 KiB read, cached", NullMode::Writeback, false, |d, n| {
        ops::cached_read_within(d, HOT, n)
    }),
    ("4 KiB write, write-back", NullMode::Writeback, false, |d, n| {
        ops::write_4k_within(d, HOT, n)
    }),
    ("stat, cached", NullMode::Writeback, false, stat),
    (
        "4 KiB write, write-through",
        NullMode::Writethrough,
        true,
        |d, n| ops::write_4k_within(d, HOT, n),
    ),
    ("4 KiB read, direct", NullMode::Direct, true, |d, n| {
        ops::cached_read_within(d, HOT, n)
    }),
    ("4 KiB write, direct", NullMode::Direct, true, |d, n| {
        ops::write_4k_within(d, HOT, n)
    }),
];

const STATES: [&str; 3] = ["not loaded", "loaded", "another attached"];

fn stat(dir: &Path, calls: u64) -> anyhow::Result<f64> {
    let path = dir.join("stat");
    ops::open(&path)?;
    std::fs::metadata(&path)?;
    let start = Instant::now();
    for _ in 0..calls {
        std::fs::metadata(&path)?;
    }
    Ok(ops::ns_each(start, calls))
}

/// The module while it is loaded.
struct Module;

impl Module {
    fn load(file: &Path) -> anyhow::Result<Self> {
        let loaded = Command::new("insmod").arg(file).status().context("insmod")?;
        ensure!(loaded.success(), "insmod {}: {loaded}", file.display());
        Ok(Self)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if !Command::new("rmmod")
            .arg("distfuse")
            .status()
            .is_ok_and(|s| s.success())
        {
            eprintln!("bench: the module distfuse could not be unloaded");
        }
    }
}

/// Another mount, which is attached until this is dropped.
struct Attached(Child);

impl Attached {
    fn new() -> anyhow::Result<Self> {
        let program = std::env::current_exe()?.with_file_name("kmod-check");
        let child = Command::new(&program)
            .arg("hold")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| program.display().to_string())?;
        let mut attached = Self(child);
        let mut said = String::new();
        let out = attached.0.stdout.take().context("its output")?;
        BufReader::new(out).read_line(&mut said)?;
        ensure!(said.trim() == "attached", "kmod-check hold said {said:?}");
        Ok(attached)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// Measures and prints it.
///
/// # Errors
/// The module cannot be loaded, a server does not start, a call fails.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    ensure!(
        !Path::new("/sys/module/distfuse").exists(),
        "the module distfuse is loaded already: rmmod distfuse"
    );
    let modes = [NullMode::Writeback, NullMode::Writethrough, NullMode::Direct];
    // Mounted before the module comes, and there until after it has gone.
    let servers = modes
        .iter()
        .map(|mode| Ok((*mode, NullServer::start(*mode)?)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let title = "Other FUSE mounts: ns a call";
    let progress = Progress::new(title, (args.rounds * STATES.len()) as u64);
    let mut samples = vec![vec![Vec::new(); STATES.len()]; MEASURES.len()];
    for round in 0..args.rounds {
        for turn in 0..STATES.len() {
            // Another one first in each round.
            let state = (turn + round) % STATES.len();
            progress.step(format!("round {}, {}", round + 1, STATES[state]));
            let _module = (state > 0).then(|| Module::load(&args.module)).transpose()?;
            let _attached = (state > 1).then(Attached::new).transpose()?;
            for ((_, mode, asked, measure), samples) in MEASURES.iter().zip(&mut samples) {
                check()?;
                let server = servers.iter().find(|s| s.0 == *mode).context("no such server")?;
                let calls = if *asked { args.calls / 20 } else { args.calls };
                samples[state].push(measure(server.1.path(), calls.max(1))?);
            }
        }
    }
    drop(progress);
    // What else the machine does only ever adds to a call: the best of many is what repeats.
    let best = |s: &Vec<f64>| s.iter().copied().fold(f64::INFINITY, f64::min);
    let mut header = vec!["call".to_owned()];
    header.extend(STATES.iter().map(|state| format!("{state}, best")));
    for what in ["bests", "medians"] {
        header.extend(STATES[1..].iter().map(|state| format!("{state}/not, {what}")));
    }
    let mut table = Table::new(title, &header);
    for ((name, ..), samples) in MEASURES.iter().zip(&samples) {
        let bests: Vec<f64> = samples.iter().map(best).collect();
        let medians: Vec<f64> = samples.iter().map(|s| median(s)).collect();
        let mut row = vec![(*name).to_owned()];
        row.extend(bests.iter().map(|ns| sig(*ns)));
        for of in [&bests, &medians] {
            row.extend(of[1..].iter().map(|ns| format!("{:.3}", ns / of[0])));
        }
        table.row(row);
    }
    table.write_csv(&out.join("others.csv"))?;
    println!("{table}");
    Ok(())
}
