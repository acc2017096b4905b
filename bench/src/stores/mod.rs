//! Embedded stores for the metadata server: commit rates, reads, and what a killed process loses.

mod engines;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::progress::{Progress, check};
use crate::stats::{median, sig};
use crate::table::Table;
use engines::{Durability, Engine, KINDS, open};

/// Arguments of `bench store`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where the stores go: a directory on a real disk.
    #[arg(long, default_value = "target")]
    dir: PathBuf,
    /// Shorter.
    #[arg(long)]
    quick: bool,
}

/// Arguments of the process that is killed.
#[derive(Debug, clap::Args)]
pub struct ChildArgs {
    engine: String,
    dir: PathBuf,
}

/// Puts a batch.
const PUTS: u64 = 5;

/// A key like those of the metadata server: a table, a number, a rest.
fn key(n: u64) -> Vec<u8> {
    let mut key = vec![b'i'];
    key.extend((n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40).to_be_bytes());
    key.extend(n.to_be_bytes());
    key
}

/// About 150 bytes that say which batch they are of.
fn value(batch: u64) -> Vec<u8> {
    let mut value = batch.to_be_bytes().to_vec();
    value.resize(150, batch as u8);
    value
}

fn batch(n: u64) -> Vec<(Vec<u8>, Vec<u8>)> {
    (0..PUTS).map(|i| (key(n * PUTS + i), value(n))).collect()
}

/// Batches a second for a while; `group` batches share one sync.
fn commits(engine: &dyn Engine, from: &mut u64, run: Duration, group: u64) -> anyhow::Result<f64> {
    let (start, first) = (Instant::now(), *from);
    while start.elapsed() < run {
        for i in 0..group.max(1) {
            let how = if group > 0 && i + 1 == group {
                Durability::Disk
            } else {
                Durability::Process
            };
            engine.commit(&batch(*from), how)?;
            *from += 1;
        }
    }
    check()?;
    Ok((*from - first) as f64 / start.elapsed().as_secs_f64())
}

/// Commits until it is killed, and tells each batch that is committed.
///
/// # Errors
/// The store fails.
pub fn child(args: &ChildArgs) -> anyhow::Result<()> {
    let engine = open(&args.engine, &args.dir)?;
    let mut out = std::io::stdout().lock();
    for n in 0.. {
        engine.commit(&batch(n), Durability::Process)?;
        writeln!(out, "{n}")?;
        out.flush()?;
    }
    Ok(())
}

/// Kills a process in the middle of commits: batches that it had told of, how many of them are gone, and how
/// many are there in part.
fn killed(kind: &str, dir: &Path, after: Duration) -> anyhow::Result<(u64, u64, u64)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["store-child", kind])
        .arg(dir)
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the process to be killed")?;
    let out = child.stdout.take().context("output")?;
    let reader = std::thread::spawn(move || {
        BufReader::new(out)
            .lines()
            .map_while(Result::ok)
            .filter_map(|l| l.parse::<u64>().ok())
            .last()
    });
    std::thread::sleep(after);
    child.kill()?;
    child.wait()?;
    let Ok(Some(last)) = reader.join() else {
        bail!("{kind}: nothing was committed before the kill")
    };
    let engine = open(kind, dir)?;
    let (mut lost, mut torn) = (0, 0);
    for n in 0..=last + 1 {
        let mut there = 0;
        for (k, v) in batch(n) {
            there += u64::from(engine.get(&k)?.as_deref() == Some(&v[..]));
        }
        // The one after the last may be there or not, but not in part.
        lost += u64::from(there == 0 && n <= last);
        torn += u64::from(there != 0 && there != PUTS);
    }
    Ok((last + 1, lost, torn))
}

fn du(dir: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => du(&e.path()),
            // What is allocated, not what is mapped.
            Ok(m) => std::os::unix::fs::MetadataExt::blocks(&m) * 512,
            Err(_) => 0,
        })
        .sum()
}

/// Runs `bench store`.
///
/// # Errors
/// A store fails.
pub fn run(args: &Args, out: &Path) -> anyhow::Result<()> {
    let header = [
        "engine",
        "commits/s",
        "fsync each/s",
        "fsync of 32/s",
        "get us",
        "scan us/1000",
        "disk/data",
        "killed: committed",
        "lost",
        "torn",
    ];
    let mut table = Table::new("Embedded stores, batches of 5 puts of 150 B", &header);
    let progress = Progress::new("stores", KINDS.len() as u64);
    let run = Duration::from_millis(if args.quick { 200 } else { 1_500 });
    for kind in KINDS {
        progress.step(*kind);
        let dir = tempfile::Builder::new()
            .prefix("bench-store-")
            .tempdir_in(&args.dir)?;
        let engine = open(kind, &dir.path().join("a"))?;
        let mut n = 0;
        let mut rates = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..3 {
            for (rate, group) in rates.iter_mut().zip([0, 1, 32]) {
                rate.push(commits(engine.as_ref(), &mut n, run / 3, group)?);
            }
        }
        engine.commit(&batch(n), Durability::Disk)?;
        n += 1;
        let gets = 50_000;
        let start = Instant::now();
        for i in 0..gets {
            let k = key(i * 7919 % (n * PUTS));
            anyhow::ensure!(engine.get(&k)?.is_some(), "{kind}: a key is missing");
        }
        let get = start.elapsed().as_secs_f64() * 1e6 / gets as f64;
        let mut scans = Vec::new();
        for i in 0..200 {
            let start = Instant::now();
            let found = engine.scan(&key(i * 7919 % (n * PUTS))[..6], 1000)?;
            anyhow::ensure!(found > 0, "{kind}: an empty scan");
            scans.push(start.elapsed().as_secs_f64() * 1e6 * 1000.0 / found as f64);
        }
        drop(engine);
        let size = du(&dir.path().join("a")) as f64 / (n * PUTS * 167) as f64;
        let (mut told, mut lost, mut torn) = (0, 0, 0);
        for round in 0..if args.quick { 1 } else { 3 } {
            let at = dir.path().join(format!("k{round}"));
            let (t, l, p) = killed(kind, &at, Duration::from_millis(700 + round * 150))?;
            (told, lost, torn) = (told + t, lost + l, torn + p);
        }
        let mut row = vec![(*kind).to_owned()];
        row.extend(rates.iter().map(|r| sig(median(r))));
        row.extend([
            sig(get),
            sig(median(&scans)),
            sig(size),
            told.to_string(),
            lost.to_string(),
            torn.to_string(),
        ]);
        table.row(row);
    }
    drop(progress);
    table.write_csv(&out.join("stores.csv"))?;
    println!("{table}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_engine_keeps_what_it_is_given() {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("s");
            let engine = open(kind, &path).unwrap();
            for n in 0..20 {
                engine
                    .commit(
                        &batch(n),
                        if n % 7 == 0 {
                            Durability::Disk
                        } else {
                            Durability::Process
                        },
                    )
                    .unwrap();
            }
            engine.commit(&batch(20), Durability::Disk).unwrap();
            drop(engine);
            let engine = open(kind, &path).unwrap();
            for (k, v) in (0..=20).flat_map(batch) {
                assert_eq!(engine.get(&k).unwrap(), Some(v), "{kind}");
            }
            assert_eq!(engine.get(b"none").unwrap(), None);
            assert_eq!(engine.scan(b"i", 50).unwrap(), 50, "{kind}");
            assert_eq!(engine.scan(b"i", 1000).unwrap(), 105, "{kind}");
        }
    }
}
