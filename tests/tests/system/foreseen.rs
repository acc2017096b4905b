//! Names that a mount changes under exclusive leases, and tells the metadata server of later: all mounts see the same, and a mount that dies
//! loses no more than the end of what it did.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use system_tests::chance;
use system_tests::cluster::{Cache, Fabric, Options, Role};
use system_tests::guard;

/// What stat(2) and readdir(3) say of something.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    ino: u64,
    mode: u32,
    links: u64,
    size: u64,
    owner: (u32, u32),
    modified: (i64, i64),
    changed: (i64, i64),
    target: Option<PathBuf>,
    /// Names in the order in which they are listed.
    names: Vec<PathBuf>,
}

/// Everything below a directory, by path.
fn look(root: &Path) -> anyhow::Result<BTreeMap<PathBuf, Seen>> {
    let (mut all, mut todo) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(path) = todo.pop() {
        let at = root.join(&path);
        let meta = fs::symlink_metadata(&at)?;
        let mut names = Vec::new();
        if meta.is_dir() {
            for entry in fs::read_dir(&at)? {
                names.push(PathBuf::from(entry?.file_name()));
            }
            todo.extend(names.iter().map(|name| path.join(name)));
        }
        let seen = Seen {
            ino: meta.ino(),
            mode: meta.mode(),
            links: meta.nlink(),
            size: meta.size(),
            owner: (meta.uid(), meta.gid()),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
            target: fs::read_link(&at).ok(),
            names,
        };
        all.insert(path, seen);
    }
    Ok(all)
}

/// Changes names at random below a directory; what is refused changes nothing.
fn change(root: &Path, rng: &mut StdRng, calls: usize) {
    let path = |rng: &mut StdRng| {
        let mut path = root.to_path_buf();
        for _ in 0..rng.random_range(0..3) {
            path.push(format!("d{}", rng.random_range(0..3)));
        }
        path
    };
    for _ in 0..calls {
        let (dir, other) = (path(rng), path(rng));
        let (file, sub) = (
            format!("f{}", rng.random_range(0..6)),
            format!("d{}", rng.random_range(0..3)),
        );
        let to = format!("f{}", rng.random_range(0..6));
        let _ = match rng.random_range(0..10) {
            0..=2 => fs::OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(dir.join(&file))
                .and_then(|file| file.set_len(rng.random_range(0..9000))),
            3 => fs::DirBuilder::new().mode(0o2750).create(dir.join(&sub)),
            4 => symlink("anywhere", dir.join(&file)),
            5 => fs::rename(dir.join(&file), dir.join(&to)),
            6 => fs::rename(dir.join(&file), other.join(&to)),
            7 => fs::rename(dir.join(&sub), other.join(format!("d{}", rng.random_range(0..3)))),
            8 => fs::remove_file(dir.join(&file)),
            _ => match rng.random_range(0..3) {
                0 => fs::remove_dir(dir.join(&sub)),
                1 => fs::hard_link(dir.join(&file), other.join(&to)),
                _ => fs::read_dir(&dir).map(|entries| assert!(entries.count() < 1000)),
            },
        };
    }
}

/// What a mount says of its own changes is what the server has made of them, and what others see.
fn all_see_the_same(fabric: Fabric, cache: Cache) -> anyhow::Result<()> {
    let seed = chance::seeds(1)?[0];
    println!("seed {seed}");
    let options = Options {
        fabric,
        cache,
        ..Options::default()
    };
    guard::with_cluster(options, move |cluster| {
        let mut rng = StdRng::seed_from_u64(seed);
        for round in 0..12 {
            let (at, elsewhere) = (round % 2, 1 - round % 2);
            change(&cluster.mount(at), &mut rng, 400);
            let own = look(&cluster.mount(at))?;
            let others = look(&cluster.mount(elsewhere))?;
            for (path, seen) in &own {
                ensure!(
                    others.get(path) == Some(seen),
                    "round {round}, {}: {seen:?}, and on the other mount {:?}",
                    path.display(),
                    others.get(path)
                );
            }
            ensure!(
                own.len() == others.len(),
                "the other mount has names that this one has not"
            );
            ensure!(
                own == look(&cluster.mount(at))?,
                "what this mount says has changed since"
            );
        }
        Ok(())
    })
}

#[test]
fn all_mounts_see_what_one_has_foreseen() -> anyhow::Result<()> {
    all_see_the_same(Fabric::Shm, Cache::Writethrough)
}

#[test]
fn all_mounts_see_what_one_has_foreseen_over_tcp() -> anyhow::Result<()> {
    all_see_the_same(Fabric::Tcp, Cache::Direct)
}

/// A mount is killed while it makes files: those that are there are the first ones it made, and no fewer than were fsynced.
#[test]
fn a_mount_that_dies_loses_the_end_of_what_it_did() -> anyhow::Result<()> {
    const FILES: usize = 20_000;
    let seed = chance::seeds(1)?[0];
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    for round in 0..3 {
        let (synced, after) = (
            rng.random_range(50..300),
            Duration::from_millis(rng.random_range(5..80)),
        );
        guard::with_cluster(Options::default(), move |cluster| {
            let dir = cluster.mount(0).join("d");
            fs::create_dir(&dir)?;
            for n in 0..synced {
                File::create(dir.join(n.to_string()))?;
            }
            File::open(&dir)?.sync_all()?;
            std::thread::scope(|scope| {
                let making =
                    scope.spawn(|| (synced..FILES).find(|n| File::create(dir.join(n.to_string())).is_err()));
                std::thread::sleep(after);
                cluster.kill(Role::Mount(0));
                let made = making
                    .join()
                    .ok()
                    .flatten()
                    .context("the mount was not killed in time")?;
                let there = fs::read_dir(cluster.mount(1).join("d"))?;
                let mut there: Vec<usize> = there
                    .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
                    .collect::<anyhow::Result<_>>()?;
                there.sort_unstable();
                println!(
                    "round {round}: {synced} fsynced, {made} made, {} there",
                    there.len()
                );
                ensure!(
                    there.iter().enumerate().all(|(n, name)| n == *name),
                    "not the first ones: {there:?}"
                );
                ensure!(
                    there.len() >= synced,
                    "{} of {synced} that were fsynced",
                    there.len()
                );
                ensure!(
                    there.len() <= made + 1,
                    "{} were made, {} are there",
                    made,
                    there.len()
                );
                Ok(())
            })
        })?;
    }
    Ok(())
}
