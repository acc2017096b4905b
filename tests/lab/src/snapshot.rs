//! Booted guests saved to a file, from which further ones start in a fraction of the time.
//!
//! The state is that after the modules are loaded and before there is a network or a shared folder: all guests
//! of a cluster can start from it, and the emulator can save it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::error::{At, Error, Result};
use crate::image::{Image, packages, prune};
use crate::link::Link;
use crate::monitor::Monitor;
use crate::qemu::{self, Machine, Places, QEMU, Qemu};
use crate::tools;

/// Snapshots that are kept.
const KEPT: usize = 6;
/// Longest time for saving, or for starting from what was saved.
const LIMIT: Duration = Duration::from_secs(120);
/// How the emulator calls the end of saving.
const SAVED: &[&str] = &["completed", "failed", "cancelled"];

/// Where the snapshot is, for this image, machine and emulator.
///
/// # Errors
/// The emulator does not tell its version.
pub fn path(cache: &Path, image: &Image, machine: Machine) -> Result<PathBuf> {
    let version = tools::text(std::process::Command::new(tools::find(QEMU)?).arg("--version"))?;
    let mut hash = Sha256::new();
    hash.update(format!(
        "{}\0{}\0{machine:?}\0{:?}",
        image.key,
        version,
        qemu::devices(machine.disk.is_some())
    ));
    let key: String = hash
        .finalize()
        .iter()
        .take(10)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(cache.join("snapshots").join(format!("{key}.vm")))
}

/// Boots a guest and saves it.
///
/// # Errors
/// It does not boot, or cannot be saved.
pub fn save(
    file: &Path,
    image: &Image,
    machine: Machine,
    places: &Places,
    boot_limit: Duration,
) -> Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).at(|| format!("make the folder {}", folder.display()))?;
    tools::require_space(folder, u64::from(machine.memory) + 64)?;
    let guest = Qemu::start("the guest for the snapshot", image, machine, places, None)?;
    let link = Link::new("the guest for the snapshot", guest.agent)?;
    link.ready(boot_limit).map_err(|error| Error::Boot {
        guest: "the guest for the snapshot".into(),
        why: error.to_string(),
        console: places.console.clone(),
    })?;
    let mut monitor = Monitor::new(&guest.monitor)?;
    monitor.execute("stop", &json!({}))?;
    let part = file.with_extension(format!("part{}", std::process::id()));
    monitor.execute("migrate-set-parameters", &json!({"max-bandwidth": 4u64 << 30}))?;
    monitor.execute(
        "migrate",
        &json!({"uri": format!("exec:cat >{}", qemu::shell_word(&part))}),
    )?;
    let status = monitor.wait_status("query-migrate", SAVED, LIMIT)?;
    guest.process.kill();
    if status != "completed" {
        // It may not have been made at all.
        let _ = fs::remove_file(&part);
        return Err(Error::check(format!("saving a booted guest {status}")));
    }
    fs::rename(&part, file).at(|| format!("rename {}", part.display()))?;
    prune(folder, KEPT)
}

/// Lets a guest run that starts from a snapshot.
///
/// # Errors
/// It does not start.
pub fn resume(guest: &Qemu) -> Result<()> {
    let mut monitor = Monitor::new(&guest.monitor)?;
    let status = monitor.wait_status(
        "query-status",
        &["paused", "running", "prelaunch", "postmigrate"],
        LIMIT,
    )?;
    if status != "running" {
        monitor.execute("cont", &json!({}))?;
    }
    Ok(())
}

/// What the cache holds, for people: kernels, images, snapshots.
///
/// # Errors
/// It cannot be read.
pub fn cached(cache: &Path) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for series in packages::entries(&cache.join("kernels"))? {
        for kernel in packages::entries(&series)? {
            lines.push(format!(
                "kernel    {}",
                kernel.strip_prefix(cache).unwrap_or(&kernel).display()
            ));
        }
    }
    for (kind, folder) in [("image", "images"), ("snapshot", "snapshots")] {
        for file in packages::entries(&cache.join(folder))? {
            let size = fs::metadata(&file).map_or(0, |meta| meta.len() >> 20);
            lines.push(format!(
                "{kind:<9} {} ({size} MiB)",
                file.strip_prefix(cache).unwrap_or(&file).display()
            ));
        }
    }
    Ok(lines)
}

/// Whether a snapshot of this image is there.
pub fn there(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|meta| meta.len() > 0)
}
