//! Programs of the host that the lab calls: found, run, their failures told.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::error::{At, Error, Result};

/// What to do about a missing program.
pub const SETUP: &str = "run `tests/setup.sh lab`, which installs the packages that the lab needs";
/// Characters of a failed program's output that are shown.
const SHOWN: usize = 600;

/// The path of a program, searched where a plain user's PATH often does not lead.
///
/// # Errors
/// It is not there.
pub fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| Error::missing(format!("the program {name}"), SETUP))
}

/// Runs a program to its end and returns what it printed to its standard output.
///
/// # Errors
/// It is not there, or fails.
pub fn output(command: &mut Command) -> Result<Vec<u8>> {
    let tool = command.get_program().to_string_lossy().into_owned();
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::missing(format!("the program {tool}"), SETUP),
            _ => Error::Io {
                what: format!("run {tool}"),
                source,
            },
        })?;
    if done.status.success() {
        return Ok(done.stdout);
    }
    let text = String::from_utf8_lossy(&done.stderr);
    Err(Error::Tool {
        tool,
        status: done.status.to_string(),
        output: tail(text.trim(), SHOWN).to_owned(),
    })
}

/// As [`output`], as text.
///
/// # Errors
/// As [`output`].
pub fn text(command: &mut Command) -> Result<String> {
    Ok(String::from_utf8_lossy(&output(command)?).into_owned())
}

/// The last `most` bytes of a text or a few less, cut at a character.
pub fn tail(text: &str, most: usize) -> &str {
    let from = text.len().saturating_sub(most);
    (from..=text.len()).find_map(|at| text.get(at..)).unwrap_or("")
}

/// Fails unless a folder's file system has room.
///
/// # Errors
/// It has not, or cannot be asked.
pub fn require_space(dir: &std::path::Path, mib: u64) -> Result<()> {
    let stat = rustix::fs::statvfs(dir).at(|| format!("look at the file system of {}", dir.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize) >> 20;
    if free < mib {
        return Err(Error::missing(
            format!("space in {} ({free} MiB free, {mib} MiB needed)", dir.display()),
            "free some, or name another place with --cache",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::tail;

    #[test]
    fn a_tail_is_cut_at_a_character() {
        assert_eq!(tail("abc", 2), "bc");
        assert_eq!(tail("abc", 9), "abc");
        assert_eq!(tail("aäb", 2), "b");
    }
}
