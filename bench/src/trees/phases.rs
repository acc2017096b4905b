//! What users do to trees.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

use super::source::{Source, copy, list};

/// One thing that is done to a whole tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Copied by a plain program, on the first mount.
    Copy,
    /// That copy, read on the second mount.
    ReadThere,
    /// Copied by `cp -a`.
    CopyAll,
    /// That copy, listed with attributes where it was made.
    List,
    /// And on the second mount.
    ListThere,
    /// A repository with the tree, cloned.
    Clone,
    /// An archive of it, unpacked.
    Unpack,
    /// What was unpacked, removed by `rm -rf`: no other mount knows of it.
    Remove,
    /// What the second mount has read, removed where it was made.
    RemoveRead,
    /// What the first mount has made, removed on the second.
    RemoveThere,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 10] = [
        Self::Copy,
        Self::ReadThere,
        Self::CopyAll,
        Self::List,
        Self::ListThere,
        Self::Clone,
        Self::Unpack,
        Self::Remove,
        Self::RemoveRead,
        Self::RemoveThere,
    ];

    /// As rows say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy, plain program",
            Self::ReadThere => "read on the second mount",
            Self::CopyAll => "cp -a",
            Self::List => "list with attributes",
            Self::ListThere => "list on the second mount",
            Self::Clone => "git clone",
            Self::Unpack => "tar -x",
            Self::Remove => "rm -rf",
            Self::RemoveRead => "rm -rf of what the second has read",
            Self::RemoveThere => "rm -rf on the second mount",
        }
    }

    /// On which mount.
    pub fn mount(self) -> usize {
        usize::from(matches!(
            self,
            Self::ReadThere | Self::ListThere | Self::RemoveThere
        ))
    }

    /// To which of the trees of a system.
    fn tree(self) -> &'static str {
        match self {
            Self::Copy | Self::ReadThere | Self::RemoveRead => "copied",
            Self::CopyAll | Self::List | Self::ListThere | Self::RemoveThere => "copied-all",
            Self::Clone => "cloned",
            Self::Unpack | Self::Remove => "unpacked",
        }
    }
}

/// Where trees come from: a directory in memory with the tree itself, a repository, and an archive.
pub struct Origin {
    source: Source,
    dir: tempfile::TempDir,
    bytes: u64,
    /// There is a repository.
    pub has_repository: bool,
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let out = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .with_context(|| format!("cannot run {:?}", command.get_program()))?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{command:?}: {}", said.trim());
    Ok(())
}

/// git, as nobody has set it up.
fn git() -> Command {
    let mut git = Command::new("git");
    git.env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_SYSTEM", "/dev/null")
        .args(["-c", "user.name=bench", "-c", "user.email=bench@localhost"])
        .args(["-c", "gc.auto=0", "-c", "init.defaultBranch=main"]);
    git
}

impl Origin {
    /// A tree of so many files.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(files: usize) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("bench-trees-")
            .tempdir_in("/dev/shm")
            .context("a directory in /dev/shm")?;
        let source = Source::new(files);
        let tree = dir.path().join("tree");
        source.make(&tree)?;
        let (names, bytes) = list(&tree)?;
        ensure!(names == source.names(), "{names} names in {}", tree.display());
        let archive = dir.path().join("tree.tar");
        run(Command::new("tar")
            .arg("-cf")
            .arg(archive)
            .arg("-C")
            .arg(&tree)
            .arg("."))?;
        let git_there = git().arg("--version").stdout(Stdio::null()).status();
        let has_repository = git_there.is_ok_and(|status| status.success());
        if has_repository {
            let repository = dir.path().join("repository");
            copy(&tree, &repository)?;
            let at = || {
                let mut git = git();
                git.arg("-C").arg(&repository);
                git
            };
            run(at().args(["init", "-q"]))?;
            run(at().args(["add", "-A"]))?;
            run(at().args(["commit", "-q", "-m", "tree"]))?;
            run(at().args(["repack", "-a", "-d", "-q"]))?;
        }
        Ok(Self {
            source,
            dir,
            bytes,
            has_repository,
        })
    }

    /// Files of the tree.
    pub fn files(&self) -> usize {
        self.source.files.len()
    }

    /// Does one thing to a tree below `base` of the first or second mount.
    ///
    /// # Errors
    /// A call fails, or the tree is not what it must be.
    pub fn act(&self, phase: Phase, mounts: [&Path; 2], base: &str) -> anyhow::Result<()> {
        let at = mounts[phase.mount()].join(base).join(phase.tree());
        let from = |name: &str| self.dir.path().join(name);
        match phase {
            Phase::Copy => copy(&from("tree"), &at),
            Phase::ReadThere => self.source.verify(&at),
            Phase::CopyAll => run(Command::new("cp").arg("-a").arg(from("tree")).arg(&at)),
            Phase::List | Phase::ListThere => {
                let found = list(&at)?;
                let there = (self.source.names(), self.bytes);
                ensure!(found == there, "{found:?} instead of {there:?}");
                Ok(())
            }
            Phase::Clone => run(git()
                .args(["clone", "-q", "--no-hardlinks"])
                .arg(from("repository"))
                .arg(&at)),
            Phase::Unpack => {
                fs::create_dir(&at)?;
                run(Command::new("tar")
                    .arg("-xf")
                    .arg(from("tree.tar"))
                    .arg("-C")
                    .arg(&at))
            }
            Phase::Remove | Phase::RemoveRead | Phase::RemoveThere => remove(&at),
        }
    }

    /// What a phase has left is what it must be. Not in the time that is measured, nor where it would tell a mount of a tree that it is not
    /// to know of yet.
    ///
    /// # Errors
    /// It is not.
    pub fn check(&self, phase: Phase, mounts: [&Path; 2], base: &str) -> anyhow::Result<()> {
        let at = mounts[phase.mount()].join(base).join(phase.tree());
        match phase {
            Phase::Clone => self.source.verify(&at),
            Phase::Unpack | Phase::CopyAll => {
                let found = list(&at)?;
                ensure!(found == (self.source.names(), self.bytes), "{found:?}");
                Ok(())
            }
            Phase::Remove | Phase::RemoveRead | Phase::RemoveThere => {
                ensure!(!at.exists(), "{} is still there", at.display());
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Takes what is left below `base` away.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn end(&self, mounts: [&Path; 2], base: &str) -> anyhow::Result<()> {
        remove(&mounts[0].join(base))
    }
}

fn remove(at: &Path) -> anyhow::Result<()> {
    let path: PathBuf = at.to_owned();
    run(Command::new("rm").arg("-rf").arg(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_phases_on_a_plain_directory() {
        let origin = Origin::new(45).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mounts = [dir.path(), dir.path()];
        fs::create_dir(dir.path().join("b")).unwrap();
        for phase in Phase::ALL {
            if phase == Phase::Clone && !origin.has_repository {
                continue;
            }
            origin
                .act(phase, mounts, "b")
                .unwrap_or_else(|e| panic!("{phase:?}: {e:#}"));
            origin.check(phase, mounts, "b").unwrap();
        }
        let left: Vec<_> = fs::read_dir(dir.path().join("b")).unwrap().collect();
        assert_eq!(left.len(), usize::from(origin.has_repository));
        origin.end(mounts, "b").unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_name_that_is_missing_is_noticed() {
        let origin = Origin::new(45).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mounts = [dir.path(), dir.path()];
        fs::create_dir(dir.path().join("b")).unwrap();
        origin.act(Phase::CopyAll, mounts, "b").unwrap();
        fs::remove_file(dir.path().join("b/copied-all/part0/dir2/file44.txt")).unwrap();
        let wrong = origin.act(Phase::List, mounts, "b").unwrap_err();
        assert!(format!("{wrong:#}").contains("instead of"), "{wrong:#}");
    }
}
