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

/// Has the kernel read this far ahead on a mount. The kernel's own 128 KiB are one small request at a time to a server on
/// the network; no FUSE server can ask for more than the device's setting, which only root may raise.
pub fn set_read_ahead(point: &Path, bytes: u64) {
    if bytes == 0 {
        return;
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Some(device) = device_of(&mounts, point) else {
        return;
    };
    let setting = format!("/sys/class/bdi/{device}/read_ahead_kb");
    if let Err(error) = std::fs::write(&setting, (bytes >> 10).to_string()) {
        tracing::debug!("{setting}: {error}: the kernel reads ahead as it does by itself");
    }
}

/// The number of the device that is mounted at a point. Not by `stat`, which would ask the mount itself.
fn device_of(mounts: &str, point: &Path) -> Option<String> {
    let text = point.to_string_lossy().replace(' ', "\\040");
    let found = |line: &&str| line.split(' ').nth(4) == Some(&text);
    let line = mounts.lines().rfind(found)?;
    line.split(' ').nth(2).map(str::to_owned)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_device_of_the_last_mount_at_a_point() {
        let mounts = "22 1 0:20 / /a rw - tmpfs t rw\n23 22 0:31 / /a rw - fuse f rw\n24 1 0:40 / /a\\040b rw - fuse f rw\n";
        assert_eq!(device_of(mounts, Path::new("/a")).as_deref(), Some("0:31"));
        assert_eq!(device_of(mounts, Path::new("/a b")).as_deref(), Some("0:40"));
        assert_eq!(device_of(mounts, Path::new("/b")), None);
    }
}
