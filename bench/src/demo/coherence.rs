//! What one mount does, another must see, at once.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::progress::{Progress, check};

/// One kind of change.
pub struct Check {
    /// Which.
    pub what: &'static str,
    /// How often.
    pub checks: u64,
    /// How often the other mount saw something else.
    pub wrong: u64,
    /// Checks a second.
    pub per_second: f64,
}

/// A change in a directory of the first mount, and whether the second one shows it.
type Step = fn(&Path, &Path, u64) -> std::io::Result<bool>;

fn overwrite(a: &Path, b: &Path, n: u64) -> std::io::Result<bool> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(a.join("over"))?;
    let data = n.to_le_bytes().repeat(64);
    file.write_all_at(&data, n % 16 * 512)?;
    let mut seen = vec![0; data.len()];
    File::open(b.join("over"))?.read_exact_at(&mut seen, n % 16 * 512)?;
    Ok(seen == data)
}

fn append(a: &Path, b: &Path, n: u64) -> std::io::Result<bool> {
    let mut file = OpenOptions::new().append(true).create(true).open(a.join("log"))?;
    let before = fs::metadata(b.join("log"))?.len();
    file.write_all(&n.to_le_bytes())?;
    let mut tail = [0; 8];
    File::open(b.join("log"))?.read_exact_at(&mut tail, before)?;
    Ok(tail == n.to_le_bytes() && fs::metadata(b.join("log"))?.len() == before + 8)
}

fn truncate(a: &Path, b: &Path, n: u64) -> std::io::Result<bool> {
    let path = a.join("cut");
    if n.is_multiple_of(2) {
        fs::write(&path, vec![1; 10_000])?;
        return Ok(fs::read(b.join("cut"))? == vec![1; 10_000]);
    }
    let size = n * 37 % 10_000;
    OpenOptions::new().write(true).open(&path)?.set_len(size)?;
    Ok(fs::metadata(b.join("cut"))?.len() == size && fs::read(b.join("cut"))?.len() as u64 == size)
}

fn rename(a: &Path, b: &Path, n: u64) -> std::io::Result<bool> {
    let name = |n: u64| format!("name{}", n % 2);
    if !a.join(name(n)).exists() {
        fs::write(a.join(name(n)), b"x")?;
    }
    let _ = fs::remove_file(a.join(name(n + 1)));
    let seen = b.join(name(n)).exists();
    fs::rename(a.join(name(n)), a.join(name(n + 1)))?;
    Ok(seen && b.join(name(n + 1)).exists() && !b.join(name(n)).exists())
}

fn unlink(a: &Path, b: &Path, n: u64) -> std::io::Result<bool> {
    let name = format!("short{}", n % 4);
    fs::write(a.join(&name), n.to_le_bytes())?;
    let seen = fs::read(b.join(&name))? == n.to_le_bytes();
    // The other mount unlinks.
    fs::remove_file(b.join(&name))?;
    Ok(seen && !a.join(&name).exists())
}

/// Runs `each` checks of every kind, the mounts taking turns.
///
/// # Errors
/// A call fails.
pub fn run(mounts: &[PathBuf], each: u64) -> anyhow::Result<Vec<Check>> {
    let kinds: [(&'static str, Step); 5] = [
        ("overwrite", overwrite),
        ("append and size", append),
        ("truncate", truncate),
        ("rename", rename),
        ("create and unlink", unlink),
    ];
    let dirs: Vec<PathBuf> = mounts.iter().map(|m| m.join("coherence")).collect();
    fs::create_dir_all(&dirs[0])?;
    let progress = Progress::new("coherence", kinds.len() as u64);
    let mut all = Vec::new();
    for (what, step) in kinds {
        progress.step(what);
        let start = Instant::now();
        let (mut wrong, mut n) = (0, 0);
        // The same number of pairs each, so that a step that needs its predecessor finds it.
        while n < each && start.elapsed().as_secs() < 8 {
            check()?;
            let turn = (n / 2) as usize;
            let (a, b) = (&dirs[turn % dirs.len()], &dirs[(turn + 1) % dirs.len()]);
            wrong += u64::from(!step(a, b, n)?);
            n += 1;
        }
        all.push(Check {
            what,
            checks: n,
            wrong,
            per_second: n as f64 / start.elapsed().as_secs_f64(),
        });
    }
    Ok(all)
}

/// The coherence program of the test suite, if it has been built.
pub fn suite(fsd: &Path) -> Option<PathBuf> {
    let named = std::env::var_os("FSD_COHERENCE").map(PathBuf::from);
    named
        .or_else(|| Some(fsd.with_file_name("coherence")))
        .filter(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_directory_is_coherent_with_itself() {
        let dir = tempfile::tempdir().unwrap();
        let all = run(&[dir.path().to_owned(), dir.path().to_owned()], 40).unwrap();
        assert!(all.iter().all(|c| c.checks == 40 && c.wrong == 0));
    }

    #[test]
    fn a_stale_mount_is_noticed() {
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(b.path().join("over"), vec![9; 16 * 512]).unwrap();
        assert!(!overwrite(a.path(), b.path(), 1).unwrap());
    }
}
