//! What a guest boots: a stock kernel, and an initial file system built here.

pub mod cpio;
pub mod dkms;
pub mod headers;
pub mod modules;
pub mod packages;
pub mod userland;
pub mod version;

use std::collections::BTreeMap;
use std::fs;
use std::io::BufWriter;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use sha2::{Digest, Sha256};

use crate::error::{At, Error, Result};
use cpio::Cpio;
use modules::Modules;
use packages::Kernel;

/// Room that an image may take, in MiB.
const IMAGE_SPACE: u64 = 300;
/// Images of former builds that are kept.
const KEPT: usize = 6;

/// Nothing takes this long to write.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Folders that a guest starts with.
const FOLDERS: &[&str] = &[
    "proc",
    "sys",
    "dev",
    "tmp",
    "run",
    "root",
    "mnt",
    "job",
    "target",
    "lab",
    "lab/applets",
    "etc",
    "usr",
    "usr/bin",
    "usr/sbin",
    "usr/lib",
    "usr/lib64",
    "var",
    "var/tmp",
];
/// Debian's merged /usr.
const LINKS: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("sbin", "usr/sbin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("usr/bin/sh", "dash"),
    ("usr/sbin/modprobe", "/usr/bin/busybox"),
    ("usr/sbin/insmod", "/usr/bin/busybox"),
    ("etc/mtab", "/proc/mounts"),
];
/// Files with contents of our own: name, permissions, contents.
const FILES: &[(&str, u32, &str)] = &[
    ("init", 0o755, include_str!("../../guest/init")),
    ("etc/inittab", 0o644, include_str!("../../guest/inittab")),
    ("etc/profile", 0o644, include_str!("../../guest/profile")),
    ("lab/node", 0o755, include_str!("../../guest/node")),
    ("lab/nodes", 0o755, include_str!("../../guest/nodes")),
    ("lab/settle", 0o755, include_str!("../../guest/settle")),
    ("lab/shares", 0o755, include_str!("../../guest/shares")),
    (
        "etc/passwd",
        0o644,
        "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000:user:/tmp:/bin/bash\n",
    ),
    ("etc/group", 0o644, "root:x:0:\nuser:x:1000:\n"),
    (
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nhosts: files\n",
    ),
    ("etc/fuse.conf", 0o644, "user_allow_other\n"),
];
/// The agent's place in the guest.
const AGENT: &str = "usr/sbin/fsd-lab-agent";

/// What goes into an image besides what all have.
#[derive(Debug, Clone, Default)]
pub struct Extra {
    /// Kernel modules to have at hand.
    pub modules: Vec<String>,
    /// Programs and other files of the host, under their own names.
    pub files: Vec<PathBuf>,
}

/// A kernel with an initial file system.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel.
    pub kernel: Kernel,
    /// The initial file system's archive.
    pub initramfs: PathBuf,
    /// Differs where the contents do.
    pub key: String,
}

enum Entry {
    Directory,
    Symlink(String),
    Host(PathBuf),
    Bytes(u32, Vec<u8>),
}

/// The contents of an image. The order of names puts folders before what is in them.
#[derive(Default)]
struct Tree(BTreeMap<String, Entry>);

impl Tree {
    fn put(&mut self, name: &str, entry: Entry) {
        let mut at = 0;
        while let Some(slash) = name.get(at..).and_then(|rest| rest.find('/')) {
            at += slash;
            if let Some(folder) = name.get(..at) {
                self.0.entry(folder.to_owned()).or_insert(Entry::Directory);
            }
            at += 1;
        }
        self.0.insert(name.to_owned(), entry);
    }

    /// Puts a file of the host under its own name, where the merged /usr has it.
    fn put_host(&mut self, path: &Path) {
        let name = path.to_string_lossy();
        let name = name.trim_start_matches('/');
        let merged = ["bin/", "sbin/", "lib/", "lib64/"]
            .iter()
            .any(|folder| name.starts_with(folder));
        let name = if merged {
            format!("usr/{name}")
        } else {
            name.to_owned()
        };
        self.put(&name, Entry::Host(path.to_owned()));
    }
}

/// Builds the image for a kernel, or takes it from the cache where nothing has changed.
///
/// `bin` is the folder with this repository's programs: the agent is taken from it, and what its programs need
/// is put into the image.
///
/// # Errors
/// Something that guests need is missing on the host, or the cache cannot be written.
pub fn build(cache: &Path, kernel: &Kernel, bin: &Path, extra: &Extra) -> Result<Image> {
    let agent = bin.join("fsd-lab-agent");
    if !agent.is_file() {
        return Err(Error::missing(
            format!("the lab's agent {}", agent.display()),
            "build it: cargo build --release -p lab",
        ));
    }
    let mut tree = Tree::default();
    for (name, target) in LINKS {
        tree.put(name, Entry::Symlink((*target).to_owned()));
    }
    for name in FOLDERS {
        tree.put(name, Entry::Directory);
    }
    for (name, permissions, text) in FILES {
        tree.put(name, Entry::Bytes(*permissions, text.as_bytes().to_vec()));
    }
    tree.put("etc/hosts", Entry::Bytes(0o644, hosts().into_bytes()));
    tree.put("usr/bin/busybox", Entry::Host(userland::busybox()?));
    let mut programs = programs_in(bin)?;
    programs.push(agent.clone());
    for path in userland::files(&extra.files, &programs)? {
        tree.put_host(&path);
    }
    tree.put(AGENT, Entry::Host(agent));

    let key = key(kernel, &tree, extra)?;
    let folder = cache.join("images");
    fs::create_dir_all(&folder).at(|| format!("make the folder {}", folder.display()))?;
    let initramfs = folder.join(format!("{key}.cpio"));
    if !initramfs.is_file() {
        crate::tools::require_space(cache, IMAGE_SPACE)?;
        put_modules(&mut tree, kernel, extra)?;
        let part = folder.join(format!("{key}.part{}", std::process::id()));
        write(&part, &tree)?;
        fs::rename(&part, &initramfs).at(|| format!("rename {}", part.display()))?;
        prune(&folder, KEPT)?;
    }
    Ok(Image {
        kernel: kernel.clone(),
        initramfs,
        key,
    })
}

/// Removes all but the newest files of a cache folder, and what an interrupted run has left in it.
///
/// # Errors
/// The folder cannot be read, or a file not removed.
pub fn prune(folder: &Path, keep: usize) -> Result<()> {
    let mut files = Vec::new();
    for path in packages::entries(folder)? {
        // It may be gone: another lab tidies too.
        if let Ok(time) = fs::metadata(&path).and_then(|meta| meta.modified()) {
            files.push((time, path));
        }
    }
    let abandoned = |time: &SystemTime| time.elapsed().is_ok_and(|age| age > ABANDONED);
    let (parts, mut files): (Vec<_>, Vec<_>) = files
        .into_iter()
        .partition(|(_, path)| packages::is_partial(path));
    files.sort();
    let surplus = files.len().saturating_sub(keep);
    let old = parts
        .into_iter()
        .filter(|(time, _)| abandoned(time))
        .chain(files.into_iter().take(surplus));
    for (_, path) in old {
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::Io {
                    what: format!("remove {}", path.display()),
                    source: error,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

fn hosts() -> String {
    let nodes: String = (1..=16)
        .map(|node| format!("10.77.0.{node} node{node}\n"))
        .collect();
    format!("127.0.0.1 localhost\n{nodes}")
}

/// The programs of this repository that were built: what they need goes into the image, they do not.
fn programs_in(bin: &Path) -> Result<Vec<PathBuf>> {
    let mut programs = Vec::new();
    for path in packages::entries(bin)? {
        let meta = fs::metadata(&path).at(|| format!("look at {}", path.display()))?;
        if meta.is_file() && meta.permissions().mode() & 0o111 != 0 && path.extension().is_none() {
            programs.push(path);
        }
    }
    Ok(programs)
}

/// Depends on all that goes into the image, by time and size where it is large.
fn key(kernel: &Kernel, tree: &Tree, extra: &Extra) -> Result<String> {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update(part.len().to_le_bytes());
        hash.update(part);
    };
    add(kernel.dir.as_os_str().as_encoded_bytes());
    add(format!(
        "{:?}",
        (
            modules::REQUIRED,
            modules::WANTED,
            modules::AT_HAND,
            &extra.modules
        )
    )
    .as_bytes());
    for (name, entry) in &tree.0 {
        add(name.as_bytes());
        match entry {
            Entry::Directory => add(b"directory"),
            Entry::Symlink(target) => add(target.as_bytes()),
            Entry::Bytes(_, data) => add(data),
            Entry::Host(path) => {
                let meta = fs::metadata(path).at(|| format!("read {}", path.display()))?;
                add(format!(
                    "{} {} {} {}",
                    meta.len(),
                    meta.mtime(),
                    meta.mtime_nsec(),
                    path.display()
                )
                .as_bytes());
            }
        }
    }
    let digest = hash.finalize();
    Ok(digest.iter().take(10).map(|byte| format!("{byte:02x}")).collect())
}

/// Puts the modules in, with the lists by which `modprobe` finds them.
fn put_modules(tree: &mut Tree, kernel: &Kernel, extra: &Extra) -> Result<()> {
    let mut modules = Modules::scan(kernel)?;
    for name in modules::REQUIRED
        .iter()
        .copied()
        .chain(extra.modules.iter().map(String::as_str))
    {
        if !modules.has(kernel, &name.replace('-', "_"))? {
            return Err(Error::missing(
                format!("the module {name} in the kernel {}", kernel.release),
                "choose another kernel, or leave the module out",
            ));
        }
    }
    let boot = modules.resolve(&[modules::REQUIRED, modules::WANTED].concat())?;
    let mut at_hand = modules::AT_HAND.to_vec();
    at_hand.extend(extra.modules.iter().map(String::as_str));
    modules.resolve(&at_hand)?;
    let folder = format!("usr/lib/modules/{}", kernel.release);
    let (mut depends, mut aliases) = (String::new(), String::new());
    for module in modules.loaded() {
        // modprobe wants all that is needed, the last to be loaded first.
        let needs = modules::load_order([module.name.as_str()], |name| {
            Ok(modules
                .loaded()
                .find(|other| other.name == name)
                .map_or(Vec::new(), |other| other.info.depends.clone()))
        })?;
        let needs = needs
            .iter()
            .rev()
            .skip(1)
            .map(|name| format!(" {name}.ko"))
            .collect::<String>();
        depends += &format!("{}.ko:{needs}\n", module.name);
        aliases.extend(
            module
                .info
                .aliases
                .iter()
                .map(|alias| format!("alias {alias} {}\n", module.name)),
        );
        tree.put(
            &format!("{folder}/{}.ko", module.name),
            Entry::Bytes(0o644, module.data.clone()),
        );
    }
    tree.put(
        &format!("{folder}/modules.dep"),
        Entry::Bytes(0o644, depends.into_bytes()),
    );
    tree.put(
        &format!("{folder}/modules.alias"),
        Entry::Bytes(0o644, aliases.into_bytes()),
    );
    let list = boot.iter().map(|name| format!("{name}\n")).collect::<String>();
    tree.put("lab/modules", Entry::Bytes(0o644, list.into_bytes()));
    Ok(())
}

fn write(path: &Path, tree: &Tree) -> Result<()> {
    let doing = || format!("write the image {}", path.display());
    let mut archive = Cpio::new(BufWriter::new(fs::File::create(path).at(doing)?));
    for (name, entry) in &tree.0 {
        match entry {
            Entry::Directory => archive.directory(name).at(doing)?,
            Entry::Symlink(target) => archive.symlink(name, target).at(doing)?,
            Entry::Bytes(permissions, data) => archive.file(name, *permissions, data).at(doing)?,
            Entry::Host(host) => {
                let meta = fs::metadata(host).at(|| format!("read {}", host.display()))?;
                let data = fs::read(host).at(|| format!("read {}", host.display()))?;
                archive.file(name, meta.mode() & 0o755, &data).at(doing)?;
            }
        }
    }
    archive.finish().at(doing)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Entry, Tree, prune};
    use std::path::Path;

    #[test]
    fn folders_come_with_what_is_in_them() {
        let mut tree = Tree::default();
        tree.put_host(Path::new("/lib/x/y.so"));
        tree.put_host(Path::new("/usr/bin/ip"));
        let names: Vec<&str> = tree.0.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "usr",
                "usr/bin",
                "usr/bin/ip",
                "usr/lib",
                "usr/lib/x",
                "usr/lib/x/y.so"
            ]
        );
        assert!(matches!(tree.0.get("usr/lib"), Some(Entry::Directory)));
    }

    #[test]
    fn pruning_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            std::fs::write(dir.path().join(name), name).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        prune(dir.path(), 1).unwrap();
        assert!(
            !dir.path().join("a").exists() && !dir.path().join("b").exists() && dir.path().join("c").exists()
        );
    }
}
