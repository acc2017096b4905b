//! Temporary folders of `fsd dev` and `fsd launch`, which are taken away also when their makers were killed.
//!
//! In the folder is a file that its maker holds a lock on, and with it every role that it starts: they get the file as their
//! standard input, and a lock ends with the last process that has it. So a folder whose lock is free has no process left that
//! uses it; the next `fsd dev` or `fsd launch` unmounts what is mounted below, removes the memory files of its stores, and
//! removes it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use rustix::mount::UnmountFlags;

use super::leftovers;
use fsd_client::mount::kernel_mount::escaped;
use fsd_node::memory;

/// How the names begin.
const PREFIXES: [&str; 2] = ["fsd-dev-", "fsd-launch-"];
/// Name of the file that is locked.
const LOCK: &str = "in-use";

/// A temporary folder of this process and of the roles it starts.
pub struct Temporary {
    dir: tempfile::TempDir,
    lock: File,
}

impl Temporary {
    /// Makes one for a command of this name, after those were taken away that others have left.
    ///
    /// # Errors
    /// The system refuses.
    pub fn new(command: &str) -> anyhow::Result<Self> {
        sweep();
        Self::new_in(&std::env::temp_dir(), command)
    }

    fn new_in(parent: &Path, command: &str) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(&format!("fsd-{command}-"))
            .tempdir_in(parent)
            .context("temporary directory")?;
        let lock = || -> std::io::Result<File> {
            // Only under its own name can others see it, and then it is locked.
            let new = dir.path().join("new");
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&new)?;
            file.lock()?;
            // The position stays behind it: roles, whose standard input this is, read nothing.
            file.write_all(host().as_bytes())?;
            std::fs::rename(&new, dir.path().join(LOCK))?;
            Ok(file)
        };
        let lock = lock().context("temporary directory")?;
        Ok(Self { dir, lock })
    }

    /// The folder, which is removed with this.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// For a role that is started: it holds the folder, too. Nothing can be read from it.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn held(&self) -> anyhow::Result<File> {
        self.lock.try_clone().context("temporary directory")
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // The servers have removed their memory if they ended in order.
        remove_memory(self.path());
        sweep();
    }
}

/// Name of this host.
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

fn remove_memory(stores: &Path) {
    let dir = Path::new(memory::DEFAULT_DIR);
    match leftovers::remove_below(dir, stores) {
        Ok(0) => {}
        Ok(bytes) => tracing::debug!("removed {bytes} bytes of memory files that a killed server has left"),
        Err(error) => tracing::warn!("memory files of {}: {error}", stores.display()),
    }
}

/// Takes away what commands that were killed have left.
fn sweep() {
    for dir in candidates() {
        match take_away(&dir) {
            Ok(false) => {}
            Ok(true) => tracing::debug!("removed {}, which a killed command has left", dir.display()),
            Err(error) => tracing::warn!(
                "{} was left by a killed command and cannot be removed: {error:#}",
                dir.display()
            ),
        }
    }
}

/// Folders that may have been left: here, and wherever the stores were that have memory.
fn candidates() -> Vec<PathBuf> {
    let here = std::fs::read_dir(std::env::temp_dir())
        .into_iter()
        .flatten()
        .flatten();
    let mut all: Vec<PathBuf> = here.map(|entry| entry.path()).collect();
    let memory = leftovers::list(Path::new(memory::DEFAULT_DIR)).unwrap_or_default();
    let stores = memory
        .into_iter()
        .filter_map(|m| Some(m.note?.store.parent()?.to_owned()));
    all.extend(stores);
    all.retain(|path| {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        PREFIXES.iter().any(|prefix| name.starts_with(prefix))
    });
    all.sort();
    all.dedup();
    all
}

/// Removes a folder if nobody uses it; false where somebody does, or where it is another's.
fn take_away(dir: &Path) -> anyhow::Result<bool> {
    let me = rustix::process::geteuid().as_raw();
    let Ok(found) = std::fs::symlink_metadata(dir) else {
        return Ok(false);
    };
    let lock = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(dir.join(LOCK));
    let Ok(mut lock) = lock else {
        return Ok(false);
    };
    // The folder may be on a file system of many hosts, not all of which keep locks for others.
    let mut of = String::new();
    lock.read_to_string(&mut of)?;
    if of != host() {
        return Ok(false);
    }
    if !found.is_dir() || found.uid() != me || lock.metadata()?.uid() != me || lock.try_lock().is_err() {
        return Ok(false);
    }
    // The daemons of these mounts have ended.
    for point in mounts_below(dir, "fuse.distfuse") {
        rustix::mount::unmount(&point, UnmountFlags::DETACH)
            .with_context(|| format!("cannot unmount {}", point.display()))?;
    }
    let others = mounts_below(dir, "");
    anyhow::ensure!(others.is_empty(), "something is mounted below: {others:?}");
    remove_memory(dir);
    std::fs::remove_dir_all(dir)?;
    Ok(true)
}

/// Mount points below a folder, the last ones first; of a type, or of any.
fn mounts_below(dir: &Path, kind: &str) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    points_below(&mounts, dir, kind)
}

fn points_below(mounts: &str, dir: &Path, kind: &str) -> Vec<PathBuf> {
    let below = format!("{}/", escaped(dir));
    let points = mounts.lines().rev().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?.strip_prefix(&below)?;
        // These folders are made by this program: no name in them has to be escaped.
        (kind.is_empty() || right.split(' ').next() == Some(kind)).then(|| dir.join(point))
    });
    points.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_there_as_long_as_somebody_holds_it() {
        let parent = tempfile::tempdir().unwrap();
        let temporary = Temporary::new_in(parent.path(), "dev").unwrap();
        let (dir, held) = (temporary.path().to_owned(), temporary.held().unwrap());
        std::fs::write(dir.join("file"), b"x").unwrap();
        assert!(!take_away(&dir).unwrap());
        // As if it were killed: it cannot remove its folder, and a role goes on.
        let left = dir.with_file_name("fsd-dev-left");
        std::fs::rename(&dir, &left).unwrap();
        drop(temporary);
        assert!(!take_away(&left).unwrap());
        drop(held);
        // Another host's may be in use, whatever the lock says here.
        let own = std::fs::read_to_string(left.join(LOCK)).unwrap();
        std::fs::write(left.join(LOCK), format!("{own}-other")).unwrap();
        assert!(!take_away(&left).unwrap());
        std::fs::write(left.join(LOCK), own).unwrap();
        assert!(take_away(&left).unwrap() && !left.exists());
        // A folder without a lock is somebody else's, even if it is called so.
        std::fs::create_dir(&left).unwrap();
        assert!(!take_away(&left).unwrap() && left.exists());
    }

    #[test]
    fn what_is_mounted_below() {
        let mounts = "1 0 0:1 / /t/fsd-dev-a/mnt/0 rw - fuse.distfuse d rw\n2 0 0:2 / /t/fsd-dev-ab/x rw - ext4 d rw\n\
                      3 0 0:3 / /t/fsd-dev-a/mnt/0/b rw shared:1 - tmpfs d rw\n4 0 0:4 / /t/fsd-dev-a rw - ext4 d rw\n";
        let below = |kind| points_below(mounts, Path::new("/t/fsd-dev-a"), kind);
        assert_eq!(below("fuse.distfuse"), [Path::new("/t/fsd-dev-a/mnt/0")]);
        assert_eq!(
            below(""),
            [Path::new("/t/fsd-dev-a/mnt/0/b"), Path::new("/t/fsd-dev-a/mnt/0")]
        );
    }
}
