//! The kernel modules that a guest needs, each after what it depends on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::{Object, ObjectSection};

use crate::error::{At, Error, Result};
use crate::image::packages::{Kernel, entries};
use crate::tools;

/// Loaded at boot; a guest is of no use without them.
pub const REQUIRED: &[&str] = &[
    "virtio_pci",
    "virtio_net",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "ib_core",
    "ib_uverbs",
    "rdma_rxe",
    "rdma_cm",
    "rdma_ucm",
    "fuse",
];
/// Loaded at boot where the kernel has them as modules. rdma_rxe asks for crc32 by name only.
pub const WANTED: &[&str] = &["virtio_rng", "crc32_generic", "ib_umad", "configfs"];
/// In the image, for `modprobe`.
pub const AT_HAND: &[&str] = &[
    "veth",
    "bridge",
    "dummy",
    "sch_netem",
    "sch_tbf",
    "sch_prio",
    "overlay",
];

/// What a module says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Info {
    /// Modules that must be loaded before.
    pub depends: Vec<String>,
    /// Names it also answers to.
    pub aliases: Vec<String>,
}

/// Reads the contents of a module's `.modinfo` section.
pub fn parse_modinfo(section: &[u8]) -> Info {
    let mut info = Info::default();
    for entry in section.split(|byte| *byte == 0) {
        let entry = String::from_utf8_lossy(entry);
        match entry.split_once('=') {
            Some(("depends", list)) => {
                info.depends = list
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(normal)
                    .collect();
            }
            Some(("alias", alias)) => info.aliases.push(alias.to_owned()),
            _ => {}
        }
    }
    info
}

/// Module names are written with dashes in files and with underscores elsewhere.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// Puts modules and all they depend on in an order in which they can be loaded.
///
/// `depends` says what a module depends on.
///
/// # Errors
/// Those of `depends`; modules that depend on each other.
pub fn load_order<'a>(
    wanted: impl IntoIterator<Item = &'a str>,
    mut depends: impl FnMut(&str) -> Result<Vec<String>>,
) -> Result<Vec<String>> {
    enum Step {
        Enter(String),
        Leave(String),
    }
    let mut order = Vec::new();
    let (mut done, mut open) = (BTreeSet::new(), BTreeSet::new());
    let mut steps: Vec<Step> = wanted.into_iter().map(|name| Step::Enter(normal(name))).collect();
    steps.reverse();
    while let Some(step) = steps.pop() {
        match step {
            Step::Leave(name) => {
                open.remove(&name);
                done.insert(name.clone());
                order.push(name);
            }
            Step::Enter(name) if done.contains(&name) => {}
            Step::Enter(name) => {
                if !open.insert(name.clone()) {
                    return Err(Error::check(format!(
                        "the kernel module {name} depends on itself"
                    )));
                }
                let needs = depends(&name)?;
                steps.push(Step::Leave(name));
                steps.extend(needs.into_iter().rev().map(Step::Enter));
            }
        }
    }
    Ok(order)
}

/// A module ready for the image.
#[derive(Debug)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Its file's contents, not compressed.
    pub data: Vec<u8>,
    /// What it says of itself.
    pub info: Info,
}

/// The modules of a kernel package.
#[derive(Debug)]
pub struct Modules {
    files: BTreeMap<String, PathBuf>,
    loaded: BTreeMap<String, Module>,
}

impl Modules {
    /// Finds a kernel's modules.
    ///
    /// # Errors
    /// Its folder cannot be read.
    pub fn scan(kernel: &Kernel) -> Result<Modules> {
        let mut files = BTreeMap::new();
        let mut folders = vec![kernel.modules().join("kernel")];
        while let Some(folder) = folders.pop() {
            for path in entries(&folder)? {
                if path.is_dir() {
                    folders.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        Ok(Modules {
            files,
            loaded: BTreeMap::new(),
        })
    }

    /// The modules that make up `names` with all they depend on, in load order. Names that are no module of
    /// this kernel are taken to be built in.
    ///
    /// # Errors
    /// A module cannot be read.
    pub fn resolve(&mut self, names: &[&str]) -> Result<Vec<String>> {
        let order = load_order(names.iter().copied(), |name| match self.load(name)? {
            Some(module) => Ok(module.info.depends.clone()),
            None => Ok(Vec::new()),
        })?;
        Ok(order
            .into_iter()
            .filter(|name| self.loaded.contains_key(name))
            .collect())
    }

    /// Whether this kernel has a feature, as a module or built in.
    ///
    /// # Errors
    /// The list of built-in modules cannot be read.
    pub fn has(&self, kernel: &Kernel, name: &str) -> Result<bool> {
        if self.files.contains_key(name) {
            return Ok(true);
        }
        let path = kernel.modules().join("modules.builtin");
        let list = fs::read_to_string(&path).at(|| format!("read {}", path.display()))?;
        Ok(list
            .lines()
            .any(|line| module_name(Path::new(line)).is_some_and(|found| found == name)))
    }

    /// All modules that [`Modules::resolve`] has met.
    pub fn loaded(&self) -> impl Iterator<Item = &Module> {
        self.loaded.values()
    }

    fn load(&mut self, name: &str) -> Result<Option<&Module>> {
        if !self.loaded.contains_key(name) {
            let Some(path) = self.files.get(name) else {
                return Ok(None);
            };
            let data = contents(path)?;
            let info = parse_modinfo(&modinfo_section(path, &data)?);
            self.loaded.insert(
                name.to_owned(),
                Module {
                    name: name.to_owned(),
                    data,
                    info,
                },
            );
        }
        Ok(self.loaded.get(name))
    }
}

fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, rest) = name.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".zst" | ".gz").then(|| normal(stem))
}

fn contents(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).at(|| format!("read {}", path.display())),
    };
    tools::output(Command::new(tool).arg("-dc").arg(path))
}

fn modinfo_section(path: &Path, data: &[u8]) -> Result<Vec<u8>> {
    let broken =
        |why: String| Error::check(format!("the kernel module {} is damaged: {why}", path.display()));
    let file = object::File::parse(data).map_err(|error| broken(error.to_string()))?;
    let section = file
        .section_by_name(".modinfo")
        .ok_or_else(|| broken("it has no .modinfo".into()))?;
    Ok(section
        .data()
        .map_err(|error| broken(error.to_string()))?
        .to_vec())
}

#[cfg(test)]
mod tests {
    use super::{Info, load_order, module_name, parse_modinfo};
    use std::path::Path;

    fn order(wanted: &[&str], graph: &[(&str, &[&str])]) -> Option<Vec<String>> {
        load_order(wanted.iter().copied(), |name| {
            let found = graph.iter().find(|(module, _)| *module == name);
            Ok(found.map_or(Vec::new(), |(_, needs)| {
                needs.iter().map(|need| (*need).to_owned()).collect()
            }))
        })
        .ok()
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let graph: &[(&str, &[&str])] = &[
            ("rdma_rxe", &["ib_core", "ib_uverbs", "udp_tunnel"]),
            ("ib_uverbs", &["ib_core"]),
            ("udp_tunnel", &[]),
        ];
        let expected = ["ib_core", "ib_uverbs", "udp_tunnel", "rdma_rxe"]
            .map(str::to_owned)
            .to_vec();
        assert_eq!(order(&["rdma-rxe", "ib_core"], graph), Some(expected));
    }

    #[test]
    fn a_circle_is_an_error() {
        assert_eq!(order(&["a"], &[("a", &["b"]), ("b", &["a"])]), None);
    }

    #[test]
    fn modinfo_is_read() {
        let info =
            parse_modinfo(b"license=GPL\0alias=rdma-link-rxe\0depends=ib_core,ib-uverbs\0name=rdma_rxe\0");
        assert_eq!(
            info,
            Info {
                depends: vec!["ib_core".into(), "ib_uverbs".into()],
                aliases: vec!["rdma-link-rxe".into()]
            }
        );
        assert_eq!(parse_modinfo(b"depends=\0").depends, Vec::<String>::new());
    }

    #[test]
    fn file_names_give_module_names() {
        assert_eq!(
            module_name(Path::new("a/virtio-rng.ko.xz")).as_deref(),
            Some("virtio_rng")
        );
        assert_eq!(module_name(Path::new("a/fuse.ko")).as_deref(), Some("fuse"));
        assert_eq!(module_name(Path::new("a/modules.dep")), None);
    }
}
