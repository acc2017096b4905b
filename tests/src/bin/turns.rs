//! `turns FILE WHO OTHER DIR`: writes 1, 2, 3 … to a page of its own of a file that another mount writes as well, and reads both, with calls
//! so short that the kernel extension has them done where the lease is. FILE must have both pages.
//!
//! In DIR, which is not on the mount, `written.WHO` is what the last write that succeeded wrote, `synced.WHO` what the last fsync covered,
//! `unsure.WHO` what a write that failed may have written, and what is wrong is added to `wrong.WHO`. Before a fault is done to the other
//! mount somebody makes DIR/fault: until then all that it has written must be seen, from then on what it has fsynced. DIR/anew says so of this
//! mount.

use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

const PAGE: u64 = 4096;
/// Writes between two fsyncs.
const SYNC_EVERY: u64 = 8;
/// Pause after a call that failed.
const PAUSE: Duration = Duration::from_millis(50);

struct Turns {
    file: PathBuf,
    who: u64,
    other: u64,
    dir: PathBuf,
}

impl Turns {
    fn note(&self, what: &str) -> PathBuf {
        self.dir.join(format!("{what}.{}", self.who))
    }

    fn say(&self, what: &str, number: u64) -> anyhow::Result<()> {
        // Whoever reads it sees the old number or the new one.
        let new = self.note(&format!("{what}-new"));
        fs::write(&new, number.to_string())?;
        Ok(fs::rename(new, self.note(what))?)
    }

    /// What the program of a page has said; 0 before.
    fn said(&self, what: &str, of: u64) -> u64 {
        let text = fs::read_to_string(self.dir.join(format!("{what}.{of}")));
        text.ok().and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    fn wrong(&self, what: &str) -> anyhow::Result<()> {
        let mut to = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.note("wrong"))?;
        Ok(writeln!(to, "{what}")?)
    }

    fn is_told(&self, what: &str) -> bool {
        self.dir.join(what).exists()
    }

    fn open(&self) -> std::io::Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.file)
    }

    fn read(&self, file: &File, of: u64) -> std::io::Result<u64> {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, of * PAGE)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, file: &File, number: u64) -> anyhow::Result<bool> {
        if file.write_all_at(&number.to_le_bytes(), self.who * PAGE).is_err() {
            self.say("unsure", number)?;
            return Ok(false);
        }
        self.say("written", number)?;
        if number.is_multiple_of(SYNC_EVERY) && file.sync_all().is_ok() {
            self.say("synced", number)?;
        }
        Ok(true)
    }

    fn run(&self) -> anyhow::Result<()> {
        let (mut file, mut last, mut unsure) = (self.open().context("the file")?, 0, 0);
        for number in 1.. {
            let calm = !self.is_told("fault");
            let due = self.said(if calm { "written" } else { "synced" }, self.other);
            let (Ok(own), Ok(other)) = (self.read(&file, self.who), self.read(&file, self.other)) else {
                // Of a life that is over, perhaps.
                std::thread::sleep(PAUSE);
                file = self.open().unwrap_or(file);
                continue;
            };
            let kept = own == last || own == unsure;
            let lost = own < last && own >= self.said("synced", self.who);
            let explained = kept || (lost && self.is_told("anew"));
            if !explained {
                self.wrong(&format!("own: {own}, and {last} was written, {unsure} perhaps"))?;
            }
            // Else the other may have died after it had said so.
            if other < due && (!calm || !self.is_told("fault")) {
                self.wrong(&format!("the other's: {other}, and {due} was written"))?;
            }
            last = own;
            if self.write(&file, number)? {
                // What came before must not land any more.
                (last, unsure) = (number, number);
            } else {
                unsure = number;
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let parsed = match args.as_slice() {
        [file, who, other, dir] => who
            .parse()
            .ok()
            .zip(other.parse().ok())
            .map(|(who, other)| Turns {
                file: Path::new(file).to_owned(),
                who,
                other,
                dir: Path::new(dir).to_owned(),
            }),
        _ => None,
    };
    let Some(turns) = parsed else {
        eprintln!("usage: turns FILE WHO OTHER DIR");
        return ExitCode::from(2);
    };
    match turns.run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("turns: {error:#}");
            ExitCode::FAILURE
        }
    }
}
