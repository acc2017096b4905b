//! The place in the name space where a mount appears.

use std::path::{Path, PathBuf};

use crate::mount::error::MountError;
use crate::mount::kernel_mount::{Mounted, escaped};

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
    let text = escaped(&path);
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
pub fn set_read_ahead(mounted: &Mounted, bytes: u64) {
    if bytes == 0 {
        return;
    }
    let setting = format!("/sys/class/bdi/{}/read_ahead_kb", mounted.device);
    if let Err(error) = std::fs::write(&setting, (bytes >> 10).to_string()) {
        tracing::debug!("{setting}: {error}: the kernel reads ahead as it does by itself");
    }
}
