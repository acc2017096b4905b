//! Disks and mount points.

use std::path::{Path, PathBuf};

use anyhow::ensure;

/// A file system in memory, of a size of its own; dropping it unmounts it.
#[derive(Debug)]
pub(super) struct Disk(PathBuf);

impl Disk {
    pub(super) fn of(path: PathBuf, mib: u64) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&path)?;
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "tmpfs"])
            .arg(&path)
            .status()?;
        ensure!(
            mounted.success(),
            "no file system could be mounted at {}",
            path.display()
        );
        Ok(Self(path))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        detach(&self.0);
    }
}

/// Lazily unmounts a mount point, if it is one.
pub fn detach(point: &Path) {
    // EINVAL where nothing is mounted.
    while rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH).is_ok() {}
}

/// Unmounts a mount point lazily; who waits for an answer of its daemon fails.
pub(super) fn disconnect(point: &Path) {
    use rustix::mount::{UnmountFlags, unmount};
    // EINVAL where nothing is mounted.
    let _ = unmount(point, UnmountFlags::DETACH | UnmountFlags::FORCE);
}
