//! The place in the name space where a mount appears.

use std::path::{Path, PathBuf};

use super::mount::MountError;

/// Checks a mount point before anything is started.
///
/// # Errors
/// [`MountError::MountPoint`], [`MountError::NoFuse`].
pub fn check_point(path: &Path, allow_nonempty: bool) -> Result<PathBuf, MountError> {
    let bad = |detail: &str| MountError::MountPoint {
        path: path.to_owned(),
        detail: detail.into(),
    };
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(MountError::NoFuse)?;
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => {
            return Err(bad(&format!(
                "is a stale mount left by a daemon that died: unmount it with fusermount3 -u -z {}",
                path.display()
            )));
        }
        Err(error) => return Err(bad(&format!("{error}: create it with mkdir"))),
    };
    if !meta.is_dir() {
        return Err(bad("is not a directory"));
    }
    let path = path.canonicalize().map_err(|e| bad(&e.to_string()))?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let text = path.to_string_lossy().replace(' ', "\\040");
    if mounts.lines().any(|l| {
        l.split(' ').nth(1) == Some(&text) && l.split(' ').nth(2).is_some_and(|t| t.starts_with("fuse"))
    }) {
        return Err(bad("is a mount point in use: unmount it first or choose another"));
    }
    if !allow_nonempty
        && std::fs::read_dir(&path)
            .map_err(|e| bad(&e.to_string()))?
            .next()
            .is_some()
    {
        return Err(bad(
            "is not empty: its files would be hidden; choose another, or say --allow-nonempty",
        ));
    }
    Ok(path)
}

/// Takes a mount out of the name space if it is there, also if files are open.
pub fn unmount(point: &Path) {
    use rustix::mount::{UnmountFlags, unmount};
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let text = point.to_string_lossy().replace(' ', "\\040");
    if !mounts.lines().any(|l| l.split(' ').nth(1) == Some(&text)) {
        return;
    }
    if unmount(point, UnmountFlags::empty()).is_err() && unmount(point, UnmountFlags::DETACH).is_err() {
        // Not root: fusermount3 may.
        let _ = std::process::Command::new("fusermount3")
            .arg("-uz")
            .arg(point)
            .status();
    }
}
