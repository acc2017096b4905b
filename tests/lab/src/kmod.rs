//! The kernel extension in guests: built here for the guests' kernel, loaded there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::cluster::Cluster;
use crate::error::{At, Error, Result};
use crate::image::packages::{Kernel, entries};
use crate::image::{dkms, headers};
use crate::options::Tier;
use crate::tools;

/// Where its sources are: this program is run on the machine that it was built on.
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../kmod");
/// Builds that are kept.
const KEPT: usize = 6;
const LIMIT: Duration = Duration::from_secs(30);

/// The files that it is built from, by their names below the folder.
fn sources(folder: &Path) -> Result<Vec<(PathBuf, Vec<u8>)>> {
    let mut found = Vec::new();
    for sub in ["", "include/uapi"] {
        for path in entries(&folder.join(sub))? {
            let wanted = path
                .extension()
                .is_some_and(|extension| extension == "c" || extension == "h")
                || path.ends_with("Makefile");
            // Kbuild leaves one of these behind.
            if wanted && path.is_file() && !path.to_string_lossy().ends_with(".mod.c") {
                let data = fs::read(&path).at(|| format!("read {}", path.display()))?;
                let name = path.file_name().unwrap_or_default();
                found.push((Path::new(sub).join(name), data));
            }
        }
    }
    if found.is_empty() {
        return Err(Error::missing(
            format!("the kernel extension's sources in {}", folder.display()),
            "run the lab where it was built",
        ));
    }
    Ok(found)
}

fn key(release: &str, files: &[(PathBuf, Vec<u8>)]) -> String {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    };
    add(release.as_bytes());
    for (name, data) in files {
        add(name.as_os_str().as_encoded_bytes());
        add(data);
    }
    let digest = hash.finalize();
    digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect()
}

/// The module for a kernel: from the cache, or built.
///
/// # Errors
/// The kernel's headers cannot be had, or it does not build.
pub fn build(cache: &Path, kernel: &Kernel, mirror: Option<&str>) -> Result<PathBuf> {
    let files = sources(Path::new(SOURCES))?;
    let folder = cache.join("kmod");
    let module = folder.join(format!("{}.ko", key(&kernel.release, &files)));
    if module.is_file() {
        return Ok(module);
    }
    let headers = headers::of(cache, kernel, mirror)?;
    let work = folder.join(format!("build-{}", std::process::id()));
    let made = make(&work, &headers, &files);
    let kept = made.and_then(|()| {
        let built = work.join("distfuse.ko");
        // What the debugger would want is most of it.
        tools::output(Command::new("strip").arg("--strip-debug").arg(&built))?;
        fs::rename(&built, &module).at(|| format!("write {}", module.display()))
    });
    let _ = fs::remove_dir_all(&work);
    kept?;
    crate::image::prune(&folder, KEPT)?;
    Ok(module)
}

fn write(folder: &Path, files: &[(PathBuf, Vec<u8>)]) -> Result<()> {
    for (name, data) in files {
        let path = folder.join(name);
        let parent = path.parent().unwrap_or(folder);
        fs::create_dir_all(parent).at(|| format!("make the folder {}", parent.display()))?;
        fs::write(&path, data).at(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

fn make(work: &Path, headers: &Path, files: &[(PathBuf, Vec<u8>)]) -> Result<()> {
    write(work, files)?;
    eprintln!("building the kernel extension for {}", headers.display());
    // Without what an outer make says of itself: its job server is not ours.
    tools::output(
        Command::new("make")
            .arg("-C")
            .arg(work)
            .arg(format!("KDIR={}", headers.display()))
            .arg("-j2")
            .env_remove("MAKEFLAGS")
            .env_remove("MAKELEVEL"),
    )
    .map(drop)
}

/// Builds the module as DKMS does on a user's machine, for a cluster's kernel, and puts it where all guests have it:
/// `/job/dkms.ko`.
///
/// # Errors
/// DKMS or the kernel's headers cannot be had, it does not build, or cannot be copied.
pub fn place_by_dkms(cluster: &Cluster) -> Result<()> {
    let options = cluster.options();
    let (kernel, mirror) = (options.kernel()?, options.mirror.as_deref());
    let program = dkms::program(&options.cache, mirror)?;
    let headers = headers::of(&options.cache, &kernel, mirror)?;
    let work = options
        .cache
        .join("kmod")
        .join(format!("dkms-{}", std::process::id()));
    let built = by_dkms(&program, &headers, &kernel.release, &work).and_then(|module| {
        let there = cluster.job().join("dkms.ko");
        fs::copy(&module, &there)
            .map(drop)
            .at(|| format!("copy {}", module.display()))
    });
    let _ = fs::remove_dir_all(&work);
    built
}

fn by_dkms(program: &Path, headers: &Path, release: &str, work: &Path) -> Result<PathBuf> {
    // The version that dkms.conf names has to be this one.
    let version = env!("CARGO_PKG_VERSION");
    let (from, tree) = (work.join("src"), work.join("tree"));
    let mut files = sources(Path::new(SOURCES))?;
    let conf = Path::new(SOURCES).join("dkms.conf");
    files.push((
        "dkms.conf".into(),
        fs::read(&conf).at(|| format!("read {}", conf.display()))?,
    ));
    write(&from.join(format!("distfuse-{version}")), &files)?;
    fs::create_dir_all(&tree).at(|| format!("make the folder {}", tree.display()))?;
    for action in ["add", "build"] {
        tools::output(
            Command::new(program)
                .args([action, "-m", "distfuse", "-v", version, "-k", release])
                .arg("--kernelsourcedir")
                .arg(headers)
                .arg("--sourcetree")
                .arg(&from)
                .arg("--dkmstree")
                .arg(&tree)
                .env_remove("MAKEFLAGS")
                .env_remove("MAKELEVEL"),
        )?;
    }
    let machine = std::env::consts::ARCH;
    Ok(tree
        .join("distfuse")
        .join(version)
        .join(release)
        .join(machine)
        .join("module/distfuse.ko"))
}

/// Builds the module for a cluster's kernel and puts it where all guests have it: `/job/distfuse.ko`.
///
/// # Errors
/// It cannot be built, or copied.
pub fn place(cluster: &Cluster) -> Result<()> {
    let options = cluster.options();
    let module = build(&options.cache, &options.kernel()?, options.mirror.as_deref())?;
    let there = cluster.job().join("distfuse.ko");
    fs::copy(&module, &there).at(|| format!("write {}", there.display()))?;
    Ok(())
}

/// Has it loaded on all guests.
///
/// # Errors
/// It cannot be built or loaded.
pub fn load(cluster: &Cluster) -> Result<()> {
    cluster.step("the kernel extension");
    place(cluster)?;
    let guests = match cluster.options().tier {
        Tier::Single => 1,
        Tier::Multi => cluster.guests().len(),
    };
    for node in 1..=guests {
        cluster.run(node, "insmod /job/distfuse.ko && test -c /dev/distfuse", LIMIT)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::key;
    use std::path::PathBuf;

    #[test]
    fn builds_differ_where_sources_or_kernels_do() {
        let files = |data: &str| vec![(PathBuf::from("x.c"), data.as_bytes().to_vec())];
        assert_eq!(key("6.1", &files("a")), key("6.1", &files("a")));
        assert_ne!(key("6.1", &files("a")), key("6.1", &files("b")));
        assert_ne!(key("6.1", &files("a")), key("6.12", &files("a")));
    }
}
