//! `mapper FILE PAGES`: stores 1, 2, 3 … at the beginning of each page of a mapped file, and says each number when msync has returned.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use system_tests::sys::Map;

const PAGE: usize = 4096;

fn map(file: &str, pages: &str) -> anyhow::Result<()> {
    let pages: usize = pages.parse()?;
    let file = OpenOptions::new().read(true).write(true).open(file)?;
    let map = Map::writable(&file, pages * PAGE)?;
    for number in 1.. {
        for page in 0..pages {
            map.word(page * PAGE).store(number, Ordering::Relaxed);
        }
        map.sync(libc::MS_SYNC)?;
        println!("{number}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, pages] = args.as_slice() else {
        eprintln!("usage: mapper FILE PAGES");
        return ExitCode::from(2);
    };
    match map(file, pages) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mapper: {error:#}");
            ExitCode::FAILURE
        }
    }
}
