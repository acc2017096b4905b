//! The metadata server's host loses power: its store comes back without the last transactions, and its memory is gone. What
//! the mounts were answered is there all the same.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::ensure;
use system_tests::cluster::{Cluster, Fabric, Options, Role};
use system_tests::{guard, sys};

/// As the disk of the host has it at this moment.
struct Disk<'a> {
    cluster: &'a Cluster,
    copy: PathBuf,
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status()?;
    ensure!(copied.success(), "cp -a {} {}", from.display(), to.display());
    Ok(())
}

impl<'a> Disk<'a> {
    /// Nothing is written meanwhile: the server is stopped for as long as it takes.
    fn of(cluster: &'a Cluster) -> anyhow::Result<Self> {
        let copied = cluster.path("meta.disk");
        let _ = fs::remove_dir_all(&copied);
        let pid = cluster.pid(Role::Meta).unwrap_or_default().to_string();
        let signal = |name: &str| Command::new("kill").args([name, &pid]).status();
        signal("-STOP")?;
        let done = copy(&cluster.path("meta"), &copied);
        signal("-CONT")?;
        done?;
        Ok(Self {
            cluster,
            copy: copied,
        })
    }

    /// The host dies, and comes back with what its disk had then.
    fn power_cut(self) -> anyhow::Result<()> {
        self.cluster.kill(Role::Meta);
        let store = self.cluster.path("meta");
        fs::remove_dir_all(&store)?;
        fs::rename(&self.copy, &store)?;
        for entry in fs::read_dir(self.cluster.memory())? {
            let path = entry?.path();
            if path
                .file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("distfuse-meta-"))
            {
                fs::remove_file(path)?;
            }
        }
        self.cluster.start_role(Role::Meta)
    }
}

fn options() -> Options {
    Options {
        fabric: Fabric::Tcp,
        mounts: 3,
        ..Options::default()
    }
}

fn names(dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    names.sort();
    Ok(names)
}

const FILES: usize = 60;

#[test]
fn what_was_answered_is_there() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let [a, b, c] = [0, 1, 2].map(|mount| cluster.mount(mount));
        fs::create_dir(a.join("d"))?;
        // So that every mount has numbers for new files: what gives out more makes everything durable.
        for (dir, old) in [(&a, "linked"), (&b, "renamed"), (&c, "kept")] {
            fs::write(dir.join("d").join(old), old)?;
        }
        fs::hard_link(a.join("d/linked"), a.join("d/gone"))?;
        File::open(a.join("d"))?.sync_all()?;
        let disk = Disk::of(cluster)?;
        // By turns on both mounts, in one directory. None looks at what the other one has just done: that would make it durable.
        let mut expected: Vec<String> = ["kept", "linked", "new", "open", "sub", "after"]
            .map(String::from)
            .to_vec();
        for i in 0..FILES {
            let mine = if i % 2 == 0 { &a } else { &b };
            fs::write(mine.join("d").join(format!("f{i}")), vec![i as u8; 100 + i])?;
            if i % 3 == 0 {
                fs::rename(mine.join(format!("d/f{i}")), mine.join(format!("d/g{i}")))?;
            }
            expected.push(format!("{}{i}", if i % 3 == 0 { 'g' } else { 'f' }));
            if i % 5 == 0 {
                let name = if i % 3 == 0 { 'g' } else { 'f' };
                sys::setxattr(&mine.join(format!("d/{name}{i}")), "user.i", &[i as u8], 0)?;
            }
        }
        fs::remove_file(b.join("d/gone"))?;
        fs::rename(a.join("d/renamed"), a.join("d/new"))?;
        fs::create_dir(b.join("d/sub"))?;
        let open = File::create(a.join("d/open"))?;
        disk.power_cut()?;
        // Also what is asked for while the mounts are still telling.
        fs::write(c.join("d/after"), "after")?;
        open.sync_all()?;
        File::open(b.join("d"))?.sync_all()?;
        expected.sort();
        for dir in [&a, &b, &c] {
            ensure!(names(&dir.join("d"))? == expected, "names in {}", dir.display());
            for i in 0..FILES {
                let name = if i % 3 == 0 { 'g' } else { 'f' };
                let path = dir.join(format!("d/{name}{i}"));
                ensure!(fs::read(&path)? == vec![i as u8; 100 + i], "{}", path.display());
                if i % 5 == 0 {
                    ensure!(sys::getxattr(&path, "user.i")? == [i as u8], "{}", path.display());
                }
            }
        }
        // Numbers given out before are not given out again.
        let mut inos: Vec<u64> = fs::read_dir(c.join("d"))?
            .map(|entry| Ok(std::os::unix::fs::MetadataExt::ino(&entry?.metadata()?)))
            .collect::<std::io::Result<_>>()?;
        let count = inos.len();
        inos.sort_unstable();
        inos.dedup();
        ensure!(inos.len() == count, "two files of one number");
        Ok(())
    })
}

/// A mount dies with the server's host: what it alone knew is left out, and the others go on.
#[test]
fn a_mount_is_lost_with_it() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let [a, b, c] = [0, 1, 2].map(|mount| cluster.mount(mount));
        for dir in ["a", "b"] {
            fs::create_dir(a.join(dir))?;
        }
        // So that the mount that dies holds nothing that the others will ask for, and has numbers for new files.
        fs::write(a.join("a/first"), "first")?;
        File::open(&a)?.sync_all()?;
        fs::write(b.join("b/first"), "first")?;
        names(&c.join("b"))?;
        File::open(b.join("b"))?.sync_all()?;
        let disk = Disk::of(cluster)?;
        fs::write(b.join("b/theirs"), "theirs")?;
        fs::write(a.join("a/mine"), "mine")?;
        cluster.kill(Role::Mount(0));
        system_tests::cluster::detach(&a);
        disk.power_cut()?;
        // When it is known that it does not come.
        ensure!(
            fs::read_to_string(b.join("b/theirs"))? == "theirs",
            "what a living mount did"
        );
        fs::write(c.join("b/after"), "after")?;
        ensure!(
            names(&b.join("b"))? == ["after", "first", "theirs"],
            "names: {:?}",
            names(&b.join("b"))?
        );
        Ok(())
    })
}
