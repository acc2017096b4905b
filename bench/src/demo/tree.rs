//! A real tree: collected, copied, verified.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use sha2::{Digest, Sha256};

use crate::progress::{Progress, check};

/// What is copied.
#[derive(Default)]
pub struct Tree {
    /// Where it is now, and what it will be called.
    pub files: Vec<(PathBuf, PathBuf)>,
    /// In all files.
    pub bytes: u64,
}

/// Checksums, in the order of the files.
pub type Sums = Vec<[u8; 32]>;

impl Tree {
    fn add(&mut self, root: &Path, under: &Path, max_files: usize, max_bytes: u64) {
        let mut queue = vec![root.to_owned()];
        while let Some(dir) = queue.pop() {
            let Ok(entries) = fs::read_dir(&dir) else { continue };
            let mut entries: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
            entries.sort();
            for path in entries {
                let Ok(meta) = fs::symlink_metadata(&path) else {
                    continue;
                };
                let skip = path.file_name().is_some_and(|n| n == "target" || n == ".git");
                if meta.is_dir() && !skip {
                    queue.push(path);
                } else if meta.is_file() {
                    if self.files.len() >= max_files || self.bytes + meta.len() > max_bytes {
                        continue;
                    }
                    let Ok(name) = path.strip_prefix(root) else {
                        continue;
                    };
                    self.bytes += meta.len();
                    let name = under.join(name);
                    self.files.push((path, name));
                }
            }
        }
    }
}

/// The sources of this repository, then documentation and crates of this machine, until there is enough.
///
/// # Errors
/// There is nothing.
pub fn collect(max_files: usize, max_bytes: u64) -> anyhow::Result<Tree> {
    let mut tree = Tree::default();
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let roots = [
        (std::env::current_dir()?, "sources"),
        (home.join(".cargo/registry/src"), "crates"),
        ("/usr/share/doc".into(), "doc"),
    ];
    for (root, name) in roots {
        tree.add(&root, Path::new(name), max_files, max_bytes);
    }
    if tree.files.is_empty() {
        bail!("found no files to copy");
    }
    Ok(tree)
}

/// Copies all files to `to`.
///
/// # Errors
/// A call fails.
pub fn copy(tree: &Tree, to: &Path) -> anyhow::Result<Sums> {
    let progress = Progress::new("copying through mount 0", tree.files.len() as u64);
    let mut sums = Vec::new();
    for (from, name) in &tree.files {
        check()?;
        let data = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        sums.push(Sha256::digest(&data).into());
        let path = to.join(name);
        let write = || {
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir)?;
            }
            fs::write(&path, &data)
        };
        write().with_context(|| format!("cannot write {}", path.display()))?;
        progress.tick();
    }
    Ok(sums)
}

/// Reads all files from `at` and compares checksums; how many were equal.
///
/// # Errors
/// A file is missing or differs.
pub fn verify(tree: &Tree, sums: &Sums, at: &Path, mount: usize) -> anyhow::Result<usize> {
    let progress = Progress::new(
        &format!("verifying through mount {mount}"),
        tree.files.len() as u64,
    );
    for ((_, name), sum) in tree.files.iter().zip(sums) {
        check()?;
        let path = at.join(name);
        let data = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let found: [u8; 32] = Sha256::digest(&data).into();
        if found != *sum {
            bail!("{} differs through mount {mount}", path.display());
        }
        progress.tick();
    }
    Ok(tree.files.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_hold_and_a_change_is_found() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir_all(from.path().join("a/target")).unwrap();
        for n in 0..10 {
            fs::write(from.path().join(format!("a/{n}")), vec![n; 100]).unwrap();
        }
        fs::write(from.path().join("a/target/no"), b"no").unwrap();
        let mut tree = Tree::default();
        tree.add(from.path(), Path::new("x"), 100, 550);
        assert_eq!((tree.files.len(), tree.bytes), (5, 500));
        let mut tree = Tree::default();
        tree.add(from.path(), Path::new("x"), 100, 5_000);
        assert_eq!(tree.files.len(), 10, "target is skipped");
        let sums = copy(&tree, to.path()).unwrap();
        assert_eq!(verify(&tree, &sums, to.path(), 1).unwrap(), 10);
        fs::write(to.path().join("x/a/3"), b"changed").unwrap();
        assert!(verify(&tree, &sums, to.path(), 1).is_err());
    }
}
