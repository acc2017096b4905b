//! A tree of small files whose contents follow from their numbers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};

/// Files of a directory.
const TOGETHER: usize = 20;
/// Directories of the directory above them.
const DIRS_TOGETHER: usize = 10;
/// After so many files there is a link.
const LINK_EVERY: usize = 40;
/// Shortest and longest file.
const LENGTHS: (u64, u64) = (1 << 10, 16 << 10);

/// What is in a tree, each by its path in it; what is above comes first.
#[derive(Debug, Default)]
pub struct Source {
    /// Directories.
    pub dirs: Vec<PathBuf>,
    /// Files, by number.
    pub files: Vec<PathBuf>,
    /// Symbolic links, and where they lead.
    pub links: Vec<(PathBuf, PathBuf)>,
}

/// The next of a sequence of numbers (splitmix64).
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is in the file of a number.
pub fn contents(file: usize) -> Vec<u8> {
    let mut state = file as u64;
    let len = (LENGTHS.0 + next(&mut state) % (LENGTHS.1 - LENGTHS.0 + 1)) as usize;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend(next(&mut state).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

impl Source {
    /// A tree of so many files.
    pub fn new(files: usize) -> Self {
        let mut tree = Self::default();
        for n in 0..files {
            let (dir, above) = (n / TOGETHER, n / TOGETHER / DIRS_TOGETHER);
            let above = PathBuf::from(format!("part{above}"));
            let below = above.join(format!("dir{dir}"));
            if n % TOGETHER == 0 {
                if dir % DIRS_TOGETHER == 0 {
                    tree.dirs.push(above);
                }
                tree.dirs.push(below.clone());
            }
            let name = format!("file{n}.txt");
            if n % LINK_EVERY == 0 {
                tree.links
                    .push((below.join(format!("link{n}")), PathBuf::from(&name)));
            }
            tree.files.push(below.join(name));
        }
        tree
    }

    /// Makes it.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn make(&self, at: &Path) -> anyhow::Result<()> {
        fs::create_dir(at).with_context(|| at.display().to_string())?;
        self.dirs
            .iter()
            .try_for_each(|dir| fs::create_dir(at.join(dir)))?;
        for (n, path) in self.files.iter().enumerate() {
            fs::write(at.join(path), contents(n))?;
        }
        self.links
            .iter()
            .try_for_each(|(link, to)| symlink(to, at.join(link)))?;
        Ok(())
    }

    /// Names in all of its directories.
    pub fn names(&self) -> usize {
        self.dirs.len() + self.files.len() + self.links.len()
    }

    /// Reads a copy of it, and makes sure that it is one.
    ///
    /// # Errors
    /// It is not.
    pub fn verify(&self, at: &Path) -> anyhow::Result<()> {
        for (n, path) in self.files.iter().enumerate() {
            let path = at.join(path);
            let found = fs::read(&path).with_context(|| path.display().to_string())?;
            ensure!(
                found == contents(n),
                "{}: the contents are not those written",
                path.display()
            );
        }
        for (link, to) in &self.links {
            let link = at.join(link);
            let found = fs::read_link(&link).with_context(|| link.display().to_string())?;
            ensure!(found == *to, "{} leads to {}", link.display(), found.display());
        }
        Ok(())
    }
}

/// Copies a directory and all that is in it, as a plain program does.
///
/// # Errors
/// A call fails.
pub fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir(to).with_context(|| to.display().to_string())?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (kind, target) = (entry.file_type()?, to.join(entry.file_name()));
        if kind.is_dir() {
            copy(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            symlink(fs::read_link(entry.path())?, &target).with_context(|| target.display().to_string())?;
        } else {
            let bytes = fs::read(entry.path())?;
            fs::write(&target, bytes).with_context(|| target.display().to_string())?;
        }
    }
    Ok(())
}

/// Lists all that is in a directory, with attributes; names, and the lengths of files together.
///
/// # Errors
/// A call fails.
pub fn list(at: &Path) -> anyhow::Result<(usize, u64)> {
    let (mut names, mut bytes) = (0, 0);
    let mut left = vec![at.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let entry = entry?;
            let found = entry
                .metadata()
                .with_context(|| entry.path().display().to_string())?;
            names += 1;
            if found.is_dir() {
                left.push(entry.path());
            } else if found.is_file() {
                bytes += found.len();
            }
        }
    }
    Ok((names, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_the_tree_and_a_change_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let tree = Source::new(250);
        assert_eq!(
            (tree.dirs.len(), tree.files.len(), tree.links.len()),
            (15, 250, 7)
        );
        tree.make(&from).unwrap();
        copy(&from, &to).unwrap();
        tree.verify(&to).unwrap();
        let listed = list(&to).unwrap();
        assert_eq!(listed.0, tree.names());
        let bytes: usize = (0..250).map(|n| contents(n).len()).sum();
        assert_eq!(listed.1, bytes as u64);
        let lengths = (0..250).map(|n| contents(n).len());
        assert!(lengths.clone().all(|len| (1 << 10..=16 << 10).contains(&len)));
        assert!(lengths.clone().max() > lengths.min());
        fs::write(to.join(&tree.files[249]), contents(248)).unwrap();
        assert!(tree.verify(&to).is_err());
        fs::write(to.join(&tree.files[249]), contents(249)).unwrap();
        fs::remove_file(to.join(&tree.links[6].0)).unwrap();
        assert!(tree.verify(&to).is_err());
    }
}
