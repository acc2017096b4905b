//! What a cached call costs under a lease, beside a stock mount in the same run. For people: gates nothing.

use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::fixture::Fixture;

fn nanoseconds(calls: u32, mut call: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..calls {
        call()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(calls))
}

/// The best of some turns, for each of several files in turn.
fn best(files: &[&File], calls: u32, call: impl Fn(&File) -> Result<()>) -> Result<Vec<f64>> {
    let mut best = vec![f64::INFINITY; files.len()];
    for _ in 0..7 {
        for (file, best) in files.iter().zip(&mut best) {
            *best = best.min(nanoseconds(calls, || call(file))?);
        }
    }
    Ok(best)
}

/// Prints a table.
pub fn run(calls: Option<&str>) -> Result<()> {
    let calls: u32 = calls.unwrap_or("5000").parse().context("a number of calls")?;
    let leased = Fixture::one()?;
    let stock = Fixture::new(1, None)?;
    let (one, two) = (leased.open(0, "f0")?, stock.open(0, "f0")?);
    let files = [&one, &two];
    println!(
        "{:<16} {:>10} {:>10} {:>7}",
        "ns a call", "leased", "stock", "ratio"
    );
    let mut all = vec![7u8; 1 << 20];
    for file in files {
        file.write_all_at(&all, 0)?;
    }
    for size in [64usize, 4096, 64 << 10, 1 << 20] {
        // What is long needs fewer calls to be timed.
        let calls = calls / (size as u32 >> 12).max(1) + 1;
        for write in [false, true] {
            let data = RefCell::new(all.get_mut(..size).context("size")?);
            let call = |file: &File| {
                let mut data = data.borrow_mut();
                if write {
                    file.write_all_at(&data, 0)?;
                } else {
                    file.read_exact_at(&mut data, 0)?;
                }
                Ok(())
            };
            let times = best(&files, calls, call)?;
            let [leased, stock] = times.as_slice() else {
                continue;
            };
            let name = format!("{} {size}", if write { "pwrite" } else { "pread" });
            println!("{name:<16} {leased:>10.0} {stock:>10.0} {:>7.3}", leased / stock);
        }
    }
    drop((one, two));
    leased.end()?;
    stock.end()
}
