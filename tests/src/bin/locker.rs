//! `locker FILE hold`: takes a file lock, waits for it if need be, says `locked`, and keeps it until it is killed.
//! `locker FILE take`: takes one and ends. `locker FILE try`: likewise, and fails where another has it.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use system_tests::sys;

fn lock(file: &str, how: &str) -> anyhow::Result<()> {
    let file = sys::open(Path::new(file), libc::O_RDWR | libc::O_CREAT)?;
    sys::lock(&file, libc::F_WRLCK, 0, 1, how != "try")?;
    println!("locked");
    std::io::stdout().flush()?;
    if how != "hold" {
        return Ok(());
    }
    loop {
        std::thread::park();
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, how @ ("hold" | "take" | "try")] = &args.iter().map(String::as_str).collect::<Vec<_>>()[..]
    else {
        eprintln!("usage: locker FILE hold|take|try");
        return ExitCode::from(2);
    };
    match lock(file, how) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("locker: {error:#}");
            ExitCode::FAILURE
        }
    }
}
