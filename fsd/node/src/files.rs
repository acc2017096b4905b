//! Small files that say what something is: written so that a power cut leaves the old one or the new one, in directories
//! that a power cut leaves where they are.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{Result, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Names this boot of the host; empty where the system does not tell.
#[must_use]
pub fn boot() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Makes what has been created, renamed or removed in a directory durable.
///
/// # Errors
/// The disk's.
pub fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)?.sync_all()
}

/// Where the next contents of a file are written to.
fn next_of(path: &Path) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(".new");
    name.into()
}

/// Replaces a file's contents as a whole, whenever the process dies; it is its owner's alone.
///
/// # Errors
/// The system's.
pub fn replace(path: &Path, text: &str) -> Result<()> {
    write(path, text, false)
}

/// Replaces a file's contents as a whole, whenever the power goes; durable when this returns.
///
/// # Errors
/// The disk's.
pub fn replace_durably(path: &Path, text: &str) -> Result<()> {
    write(path, text, true)?;
    path.parent().map_or(Ok(()), sync_dir)
}

fn write(path: &Path, text: &str, durable: bool) -> Result<()> {
    let new = next_of(path);
    // One that was left half-written, or that somebody else has put there.
    if let Err(error) = std::fs::remove_file(&new)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    if durable {
        // Else the name may be durable before what it names is.
        file.sync_all()?;
    }
    std::fs::rename(&new, path)
}

/// Removes all files `PREFIX.N`, whatever an earlier removal that was interrupted has left of them.
///
/// # Errors
/// The system's.
pub fn remove_numbered(prefix: &Path) -> Result<()> {
    let (Some(dir), Some(name)) = (prefix.parent(), prefix.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let file = entry.file_name();
        let rest = file
            .to_str()
            .and_then(|f| f.strip_prefix(name)?.strip_prefix('.'));
        if rest.is_some_and(|number| number.parse::<u64>().is_ok()) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// Makes everything below a directory durable, names and contents.
///
/// # Errors
/// The disk's.
pub fn sync_tree(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    sync_dir(dir)
}

/// Makes a directory, and those above it, durably; it is its owner's alone, whatever the umask.
///
/// # Errors
/// The system's.
pub fn make_dir(dir: &Path) -> Result<()> {
    let missing: Vec<&Path> = dir.ancestors().take_while(|d| !d.exists()).collect();
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    std::fs::set_permissions(dir, Permissions::from_mode(0o700))?;
    for made in missing {
        // A directory is durable when the one above it is.
        match made.parent() {
            Some(above) if above.as_os_str().is_empty() => sync_dir(Path::new("."))?,
            Some(above) => sync_dir(above)?,
            None => {}
        }
    }
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_half_written_is_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/label");
        make_dir(path.parent().unwrap()).unwrap();
        make_dir(path.parent().unwrap()).unwrap();
        let is = |text: &str| std::fs::read_to_string(&path).is_ok_and(|t| t == text);
        replace_durably(&path, "one").unwrap();
        assert!(is("one"));
        std::fs::write(next_of(&path), "tw").unwrap();
        assert!(is("one"));
        replace(&path, "two").unwrap();
        assert!(is("two") && !next_of(&path).exists());
    }
}
