//! The programs in a guest, taken from the host with the libraries they need.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::image::packages::entries;
use crate::tools;

/// Programs that every guest has.
const PROGRAMS: &[&str] = &[
    "bash",
    "dash",
    "ip",
    "tc",
    "bridge",
    "rdma",
    "ibv_devinfo",
    "ibv_devices",
    "ibv_rc_pingpong",
    "ibv_srq_pingpong",
    "ib_read_lat",
    "ib_write_lat",
    "ib_send_lat",
    "ib_atomic_lat",
    "ib_read_bw",
    "ib_write_bw",
    "ib_send_bw",
    "ib_atomic_bw",
    "rping",
    // For members of jobs that are started over ssh.
    "dropbear",
    "dbclient",
    "dropbearkey",
];
/// Programs that guests have where the host has them.
const IF_PRESENT: &[&str] = &["fusermount3", "setpriv", "strace"];
/// Where distributions put the verbs providers.
const PROVIDERS: &[&str] = &[
    "/usr/lib/x86_64-linux-gnu/libibverbs",
    "/usr/lib64/libibverbs",
    "/usr/lib/libibverbs",
];
/// Names the provider to libibverbs.
const DRIVER: &str = "/etc/libibverbs.d/rxe.driver";

/// Files of the host that go into the image under their own names.
///
/// # Errors
/// A program that guests need is not on the host.
pub fn files(extra: &[PathBuf], run_only: &[PathBuf]) -> Result<BTreeSet<PathBuf>> {
    let mut roots = Vec::new();
    for name in PROGRAMS {
        roots.push(tools::find(name)?);
    }
    roots.extend(IF_PRESENT.iter().filter_map(|name| tools::find(name).ok()));
    roots.push(provider()?);
    if !Path::new(DRIVER).is_file() {
        return Err(Error::missing(DRIVER, tools::SETUP));
    }
    for path in extra {
        if !path.is_absolute() || !path.is_file() {
            return Err(Error::missing(
                format!("the file {} for the image", path.display()),
                "give the absolute path of a file of this host",
            ));
        }
    }
    roots.extend(extra.iter().cloned());
    let mut files: BTreeSet<PathBuf> = roots.iter().cloned().collect();
    files.insert(PathBuf::from(DRIVER));
    for path in roots.iter().chain(run_only) {
        files.extend(libraries(path)?);
    }
    // Programs that unwind load it when they do, and cancelled threads too.
    files.extend(libraries_of_unwinding(&files));
    Ok(files)
}

/// The static busybox, which is the guest's first program.
///
/// # Errors
/// The host has none, or one that needs libraries.
pub fn busybox() -> Result<PathBuf> {
    let path = tools::find("busybox")?;
    if libraries(&path)?.is_empty() {
        return Ok(path);
    }
    Err(Error::missing(
        "a busybox without libraries (package busybox-static)",
        tools::SETUP,
    ))
}

fn provider() -> Result<PathBuf> {
    for folder in PROVIDERS {
        let found = entries(Path::new(folder))?.into_iter().find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("librxe-rdmav"))
        });
        if let Some(path) = found {
            return Ok(path);
        }
    }
    Err(Error::missing(
        "the SoftRoCE provider of libibverbs",
        tools::SETUP,
    ))
}

/// The libraries that a program needs, with those that they need.
fn libraries(path: &Path) -> Result<BTreeSet<PathBuf>> {
    match tools::text(Command::new("ldd").arg(path)) {
        Ok(text) => match missing_library(&text) {
            Some(name) => Err(Error::missing(
                format!("the library {name} that {} needs", path.display()),
                tools::SETUP,
            )),
            None => Ok(parse_ldd(&text)),
        },
        // ldd's way to say that a file needs none, or is a script.
        Err(Error::Tool { .. }) => Ok(BTreeSet::new()),
        Err(error) => Err(error),
    }
}

fn parse_ldd(text: &str) -> BTreeSet<PathBuf> {
    text.lines()
        .filter_map(|line| {
            let found = line.split_once("=>").map_or(line, |(_, path)| path);
            let path = found.trim().split_once(" (0x")?.0;
            path.starts_with('/').then(|| PathBuf::from(path))
        })
        .collect()
}

fn missing_library(text: &str) -> Option<&str> {
    text.lines()
        .find_map(|line| line.trim().strip_suffix("=> not found"))
        .map(str::trim)
}

fn libraries_of_unwinding(files: &BTreeSet<PathBuf>) -> Option<PathBuf> {
    let libc = files.iter().find(|path| path.ends_with("libc.so.6"))?;
    let path = libc.with_file_name("libgcc_s.so.1");
    path.is_file().then_some(path)
}

#[cfg(test)]
mod tests {
    use super::{missing_library, parse_ldd};
    use std::path::PathBuf;

    const TEXT: &str = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibibverbs.so.1 => /lib/x86_64-linux-gnu/libibverbs.so.1 (0x00007f)\n\
        \t/lib64/ld-linux-x86-64.so.2 (0x00007f11)\n";

    #[test]
    fn libraries_are_found() {
        let paths: Vec<PathBuf> = parse_ldd(TEXT).into_iter().collect();
        assert_eq!(
            paths,
            [
                "/lib/x86_64-linux-gnu/libibverbs.so.1",
                "/lib64/ld-linux-x86-64.so.2"
            ]
            .map(PathBuf::from)
        );
        assert_eq!(missing_library(TEXT), None);
        assert_eq!(missing_library("\tlibx.so.1 => not found\n"), Some("libx.so.1"));
        assert!(parse_ldd("\tstatically linked\n").is_empty());
    }
}
