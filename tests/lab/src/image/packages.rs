//! Stock kernels as Debian packages: looked up in the package index, fetched, unpacked, never installed.
//!
//! apt runs with a configuration and state of its own in the cache folder, so that the host's package
//! sources are not changed and no root is needed.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{At, Error, Result};
use crate::image::version;
use crate::tools;

/// The Debian release whose kernels are used.
const RELEASE: &str = "bookworm";
/// Debian's archive key, where its keyring package puts it.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// What an unpacked kernel and its package take, in MiB.
const KERNEL_SPACE: u64 = 900;

/// One package of the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// Reads the packages out of index stanzas (`Field: value` lines, blank lines between packages).
pub fn parse_index(text: &str) -> Vec<Package> {
    text.split("\n\n")
        .filter_map(|stanza| {
            let field = |name: &str| {
                stanza
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
                    .map(str::trim)
            };
            Some(Package {
                name: field("Package")?.to_owned(),
                version: field("Version")?.to_owned(),
            })
        })
        .collect()
}

/// The newest standard amd64 kernel of a series ("6.1"); of the same version the signed one.
pub fn newest_kernel<'a>(packages: &'a [Package], series: &str) -> Option<&'a Package> {
    let prefix = format!("linux-image-{series}.");
    packages
        .iter()
        .filter(|package| {
            let plain = package.name.strip_suffix("-unsigned").unwrap_or(&package.name);
            package.name.starts_with(&prefix)
                && plain.ends_with("-amd64")
                && !plain.contains("-cloud-")
                && !plain.contains("-rt-")
        })
        .max_by(|a, b| match version::compare(&a.version, &b.version) {
            Ordering::Equal => b.name.len().cmp(&a.name.len()),
            order => order,
        })
}

/// apt with sources and state of its own.
#[derive(Debug)]
pub struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Sets it up in `dir`; the mirror is the one that the host's apt is configured for if none is given.
    ///
    /// # Errors
    /// No apt, no Debian mirror, no key, or `dir` cannot be written.
    pub fn new(dir: &Path, mirror: Option<&str>) -> Result<Apt> {
        tools::find("apt-get")?;
        let apt = Apt { dir: dir.to_owned() };
        for sub in ["lists/partial", "archives/partial", "deb", "none"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).at(|| format!("make the folder {}", path.display()))?;
        }
        let targets = tools::text(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(ORIGIN) $(LABEL)",
            "Created-By: Packages",
        ]))?;
        let host = |label: &str| {
            targets.lines().find_map(|line| {
                let mut words = line.split(' ');
                let uri = words.next()?;
                (words.next() == Some("Debian") && words.next() == Some(label)).then(|| uri.to_owned())
            })
        };
        let main = mirror
            .map(str::to_owned)
            .or_else(|| host("Debian"))
            .ok_or_else(|| {
                Error::missing(
                    "a Debian package mirror in the host's apt configuration",
                    "name one with --mirror URL",
                )
            })?;
        // The host's proxies and certificates are needed here too; its hooks are not.
        let settings = tools::text(Command::new("apt-config").arg("dump"))?;
        let mut conf: String = settings
            .lines()
            .filter(|line| line.starts_with("Acquire::"))
            .map(|line| format!("{line}\n"))
            .collect();
        let state = dir.display();
        conf += &format!(
            "Dir::State::lists \"{state}/lists\";\nDir::Cache \"{state}\";\nDir::Etc::sourcelist \"{state}/sources.list\";\n\
             Dir::Etc::sourceparts \"{state}/none\";\nDir::Etc::parts \"{state}/none\";\nDir::Etc::main \"/dev/null\";\n\
             APT::Sandbox::User \"\";\n"
        );
        let signed = if Path::new(KEYRING).is_file() {
            format!("[signed-by={KEYRING}] ")
        } else {
            String::new()
        };
        let mut sources = String::new();
        for suite in [RELEASE.to_owned(), format!("{RELEASE}-backports")] {
            sources += &format!("deb {signed}{main} {suite} main\n");
        }
        if let Some(security) = host("Debian-Security") {
            sources += &format!("deb {signed}{security} {RELEASE}-security main\n");
        }
        fs::write(dir.join("apt.conf"), conf).at(|| format!("write {state}/apt.conf"))?;
        fs::write(dir.join("sources.list"), sources).at(|| format!("write {state}/sources.list"))?;
        Ok(apt)
    }

    /// What the index has of packages with these names.
    ///
    /// # Errors
    /// One is not there.
    pub fn show(&self, names: &[&str]) -> Result<String> {
        tools::text(self.command("apt-cache").arg("show").args(names))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", self.dir.join("apt.conf"))
            .env("LC_ALL", "C");
        command
    }

    /// Fetches the package index.
    ///
    /// # Errors
    /// The mirror cannot be reached, or its index cannot be verified.
    pub fn update(&self) -> Result<()> {
        tools::output(self.command("apt-get").args(["update", "-q", "--error-on=any"])).map(drop).map_err(|error| {
            Error::missing(
                format!("the package index ({error})"),
                "the lab needs a Debian mirror once, to fetch its kernels; name another with --mirror URL, or give \
                 a kernel package with --kernel-deb FILE",
            )
        })
    }

    /// The newest kernel of a series that the index has.
    ///
    /// # Errors
    /// There is none.
    pub fn kernel(&self, series: &str) -> Result<Package> {
        let pattern = format!("^linux-image-{}\\.", series.replace('.', "\\."));
        let found = tools::text(
            self.command("apt-cache")
                .args(["--names-only", "search", &pattern]),
        )?;
        let names: Vec<&str> = found.lines().filter_map(|line| line.split(' ').next()).collect();
        let index = if names.is_empty() {
            String::new()
        } else {
            tools::text(self.command("apt-cache").arg("show").args(names))?
        };
        newest_kernel(&parse_index(&index), series)
            .cloned()
            .ok_or_else(|| {
                Error::missing(
                    format!("a kernel package of the series {series} in {RELEASE} and its backports"),
                    "choose --kernel 6.1 or 6.12, or give a package with --kernel-deb FILE",
                )
            })
    }

    /// Downloads a package and returns the file.
    ///
    /// # Errors
    /// It cannot be downloaded or verified.
    pub fn download(&self, package: &Package) -> Result<PathBuf> {
        let dir = self.dir.join("deb");
        let spec = format!("{}={}", package.name, package.version);
        tools::output(
            self.command("apt-get")
                .args(["download", "-q", &spec])
                .current_dir(&dir),
        )?;
        let prefix = format!("{}_", package.name);
        entries(&dir)?
            .into_iter()
            .find(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
                    && path.extension().is_some_and(|extension| extension == "deb")
            })
            .ok_or_else(|| Error::missing(format!("the downloaded package {spec}"), "try again"))
    }
}

/// The entries of a folder, in order; none if it is not there.
///
/// # Errors
/// It cannot be read.
pub fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        list => list.at(|| format!("read the folder {}", dir.display()))?,
    };
    let mut paths = list
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()
        .at(|| format!("read {}", dir.display()))?;
    paths.sort();
    Ok(paths)
}

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// What the user calls it: "6.1", or the file's name.
    pub label: String,
    /// Its release, as `uname -r` prints it.
    pub release: String,
    /// The folder it was unpacked in.
    pub dir: PathBuf,
}

impl Kernel {
    fn at(label: &str, dir: &Path) -> Result<Kernel> {
        let modules = ["lib/modules", "usr/lib/modules"].map(|sub| entries(&dir.join(sub)));
        for list in modules {
            if let Some(release) = list?.first().and_then(|path| path.file_name()) {
                let release = release.to_string_lossy().into_owned();
                let kernel = Kernel {
                    label: label.to_owned(),
                    release,
                    dir: dir.to_owned(),
                };
                if kernel.image().is_file() {
                    return Ok(kernel);
                }
            }
        }
        Err(Error::missing(
            format!("a kernel with modules in {}", dir.display()),
            "give a linux-image package that has both /boot/vmlinuz-* and /lib/modules",
        ))
    }

    /// The kernel's image.
    pub fn image(&self) -> PathBuf {
        self.dir.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The folder of its modules.
    pub fn modules(&self) -> PathBuf {
        let plain = self.dir.join("lib/modules").join(&self.release);
        if plain.is_dir() {
            plain
        } else {
            self.dir.join("usr/lib/modules").join(&self.release)
        }
    }
}

/// The kernel of a series: from the cache, or fetched into it. `refresh` asks the mirror for a newer one.
///
/// # Errors
/// It is neither cached nor to be had.
pub fn kernel(cache: &Path, series: &str, mirror: Option<&str>, refresh: bool) -> Result<Kernel> {
    let home = cache.join("kernels").join(series);
    if !refresh {
        let newest = entries(&home)?
            .into_iter()
            .filter(|path| !is_partial(path))
            .max_by(|a, b| version::compare(&version_of(a), &version_of(b)));
        if let Some(dir) = newest {
            return Kernel::at(series, &dir);
        }
    }
    tools::require_space(cache, KERNEL_SPACE)?;
    let apt = Apt::new(&cache.join("apt"), mirror)?;
    apt.update()?;
    let package = apt.kernel(series)?;
    let dir = home.join(format!("{}_{}", package.name, package.version));
    if !dir.is_dir() {
        eprintln!("fetching {} {}", package.name, package.version);
        let deb = apt.download(&package)?;
        unpack(std::slice::from_ref(&deb), &dir, |_| Ok(()))?;
        fs::remove_file(&deb).at(|| format!("remove {}", deb.display()))?;
    }
    Kernel::at(series, &dir)
}

/// A kernel out of a package file.
///
/// # Errors
/// It cannot be unpacked, or has no kernel.
pub fn kernel_of_file(cache: &Path, deb: &Path) -> Result<Kernel> {
    let meta = fs::metadata(deb).at(|| format!("read {}", deb.display()))?;
    let label = deb.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let time = std::os::unix::fs::MetadataExt::mtime(&meta);
    let dir = cache
        .join("kernels/files")
        .join(format!("{label}_{}_{time}", meta.len()));
    if !dir.is_dir() {
        tools::require_space(cache, KERNEL_SPACE)?;
        unpack(&[deb.to_owned()], &dir, |_| Ok(()))?;
    }
    Kernel::at(&label, &dir)
}

/// Fetches packages and unpacks them as [`unpack`] does.
pub(crate) fn fetch(
    apt: &Apt,
    names: &[&str],
    dir: &Path,
    amend: impl FnOnce(&Path) -> Result<()>,
) -> Result<()> {
    let mut debs = Vec::new();
    for name in names {
        let index = parse_index(&apt.show(&[name])?);
        let package = index
            .first()
            .ok_or_else(|| Error::missing(format!("the package {name}"), "try again"))?;
        eprintln!("fetching {} {}", package.name, package.version);
        debs.push(apt.download(package)?);
    }
    unpack(&debs, dir, amend)?;
    for deb in debs {
        fs::remove_file(&deb).at(|| format!("remove {}", deb.display()))?;
    }
    Ok(())
}

/// Unpacks packages into one folder, which appears when it is whole and `amend` has been at it.
pub(crate) fn unpack(debs: &[PathBuf], dir: &Path, amend: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let part = dir.with_extension(format!("part{}", std::process::id()));
    fs::create_dir_all(&part).at(|| format!("make the folder {}", part.display()))?;
    let unpacked = debs
        .iter()
        .try_for_each(|deb| tools::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&part)).map(drop))
        .and_then(|()| amend(&part));
    if let Err(error) = unpacked {
        fs::remove_dir_all(&part).at(|| format!("remove {}", part.display()))?;
        return Err(error);
    }
    match fs::rename(&part, dir) {
        // Another lab was faster.
        Err(_) if dir.is_dir() => fs::remove_dir_all(&part).at(|| format!("remove {}", part.display())),
        done => done.at(|| format!("rename {}", part.display())),
    }
}

/// Whether a file or folder of the cache is not whole, by its name.
pub fn is_partial(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.to_string_lossy().starts_with("part"))
}

fn version_of(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    name.split_once('_').map_or("", |(_, version)| version).to_owned()
}

#[cfg(test)]
mod tests {
    use super::{newest_kernel, parse_index};

    const INDEX: &str = "Package: linux-image-6.12.38+deb12-amd64-unsigned\nVersion: 6.12.38-1~bpo12+1\nSection: kernel\n\n\
        Package: linux-image-6.12.111+deb12-amd64-unsigned\nSource: linux\nVersion: 6.12.111-1~bpo12+1\nDescription: x\n more\n .\n Version: 9\n\n\
        Package: linux-image-6.12.111+deb12-amd64\nVersion: 6.12.111-1~bpo12+1\n\n\
        Package: linux-image-6.12.111+deb12-rt-amd64\nVersion: 6.12.111-2~bpo12+1\n\n\
        Package: linux-image-6.12.111+deb12-cloud-amd64\nVersion: 6.12.111-2~bpo12+1\n\n\
        Package: linux-image-6.12.111+deb12-amd64-dbg\nVersion: 6.12.111-2~bpo12+1\n\n\
        Package: linux-image-6.1.0-9-amd64\nVersion: 6.1.27-1\n\nPackage: linux-image-6.1.0-56-amd64\nVersion: 6.1.192-2\n";

    #[test]
    fn the_newest_standard_kernel_is_chosen() {
        let packages = parse_index(INDEX);
        assert_eq!(packages.len(), 8);
        let name = |series| newest_kernel(&packages, series).map(|package| package.name.as_str());
        assert_eq!(name("6.12"), Some("linux-image-6.12.111+deb12-amd64"));
        assert_eq!(name("6.1"), Some("linux-image-6.1.0-56-amd64"));
        assert_eq!(name("6.9"), None);
    }

    #[test]
    fn a_stanza_without_a_version_is_left_out() {
        assert!(parse_index("Package: x\n\n\nnothing\n").is_empty());
    }
}
