//! What modules for a kernel are built against: its header packages, fetched and unpacked beside it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{At, Error, Result};
use crate::image::packages::{self, Apt, Kernel, fetch};
use crate::tools;

/// What they take, in MiB.
const SPACE: u64 = 300;

/// The names in a `Depends` field that are needed to build: the common headers and the build programs.
pub fn needed(stanza: &str) -> Vec<&str> {
    let depends = stanza
        .lines()
        .find_map(|line| line.strip_prefix("Depends:"))
        .unwrap_or("");
    depends
        .split(',')
        .filter_map(|one| one.split_whitespace().next())
        .filter(|name| name.starts_with("linux-headers-") || name.starts_with("linux-kbuild-"))
        .collect()
}

/// The build folder of a kernel (what `/lib/modules/…/build` leads to on an installed one).
///
/// # Errors
/// The packages cannot be had.
pub fn of(cache: &Path, kernel: &Kernel, mirror: Option<&str>) -> Result<PathBuf> {
    let home = cache.join("headers").join(&kernel.release);
    let name = format!("linux-headers-{}", kernel.release);
    let build = home.join("usr/src").join(&name);
    if build.is_dir() {
        return Ok(build);
    }
    tools::require_space(cache, SPACE)?;
    let apt = Apt::new(&cache.join("apt"), mirror)?;
    apt.update()?;
    let missing = |_| {
        Error::missing(
            format!("the package {name}, to build modules for that kernel"),
            "fetch a newer kernel, whose headers the mirror still has: fsd-lab fetch",
        )
    };
    let stanza = apt.show(&[&name]).map_err(missing)?;
    // Of several versions the first is the newest; all of one version belong together.
    let stanza = stanza.split("\n\n").next().unwrap_or("");
    let mut names = needed(stanza);
    names.push(&name);
    let parent = cache.join("headers");
    fs::create_dir_all(&parent).at(|| format!("make the folder {}", parent.display()))?;
    fetch(&apt, &names, &home, |part| relocate(part, &home))?;
    if build.is_dir() {
        Ok(build)
    } else {
        Err(Error::missing(
            format!("the folder {}", build.display()),
            "the header packages are not as they were; remove that of this kernel from the cache and try again",
        ))
    }
}

/// The packages' own makefiles name each other by where they would be installed.
fn relocate(part: &Path, home: &Path) -> Result<()> {
    for folder in packages::entries(&part.join("usr/src"))? {
        let makefile = folder.join("Makefile");
        let Ok(text) = fs::read_to_string(&makefile) else {
            continue;
        };
        let moved = text.replace(
            "include /usr/src/",
            &format!("include {}/usr/src/", home.display()),
        );
        if moved != text {
            fs::write(&makefile, moved).at(|| format!("write {}", makefile.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::needed;

    #[test]
    fn headers_need_their_common_part_and_the_build_programs() {
        let old = "Package: linux-headers-6.1.0-56-amd64\nDepends: linux-headers-6.1.0-56-common (= 6.1.192-2), \
            linux-kbuild-6.1 (>= 6.1.192-2), linux-compiler-gcc-12-x86\n";
        assert_eq!(needed(old), ["linux-headers-6.1.0-56-common", "linux-kbuild-6.1"]);
        let new = "Depends: linux-base (>= 4.12~), linux-headers-6.12.111+deb12-common (= 6.12.111-1~bpo12+1), \
            linux-image-6.12.111+deb12-amd64 (= 6.12.111-1) | linux-image-6.12.111+deb12-amd64-unsigned (= 6.12.111-1), \
            linux-kbuild-6.12.111+deb12, gcc-12\n";
        assert_eq!(
            needed(new),
            [
                "linux-headers-6.12.111+deb12-common",
                "linux-kbuild-6.12.111+deb12"
            ]
        );
        assert!(needed("Package: x\n").is_empty());
    }
}
