//! Names under leases: the kernel walks paths by itself, and another mount's changes to them are seen at once.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::Options;
use system_tests::{guard, sys};

use super::extension::counted;

const FILES: usize = 4;
const NOBODY: u32 = 65534;

/// The number of what a path leads to.
fn number(path: &Path) -> anyhow::Result<Option<u64>> {
    let found = fs::symlink_metadata(path);
    match sys::errno(&found) {
        libc::ENOENT => Ok(None),
        _ => Ok(Some(found.with_context(|| format!("{}", path.display()))?.ino())),
    }
}

/// A tree with files `f0` … at its end, and no `absent`.
fn grow(root: &Path) -> anyhow::Result<()> {
    let leaf = root.join("a/b/c");
    fs::create_dir_all(&leaf)?;
    (0..FILES).try_for_each(|i| fs::write(leaf.join(format!("f{i}")), b"x").map_err(Into::into))
}

/// Looks at all of it.
fn walk(root: &Path) -> anyhow::Result<()> {
    let leaf = root.join("a/b/c");
    for i in 0..FILES {
        ensure!(
            number(&leaf.join(format!("f{i}")))?.is_some(),
            "f{i} is not there"
        );
    }
    ensure!(
        number(&leaf.join("absent"))?.is_none(),
        "a name that nobody has made"
    );
    Ok(())
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn paths_are_walked_without_a_request() -> anyhow::Result<()> {
    const WALKS: u64 = 200;
    guard::with_cluster(Options::extension(), |cluster| {
        grow(&cluster.mount(0))?;
        for mount in 0..2 {
            let root = cluster.mount(mount);
            // Found; delegated; kept.
            (0..3).try_for_each(|_| walk(&root))?;
            let looked = || anyhow::Ok((cluster.total("requests")?, counted(cluster, mount, "name_local")?));
            let before = looked()?;
            (0..WALKS).try_for_each(|_| walk(&root))?;
            let after = looked()?;
            let (asked, local) = (after.0 - before.0, after.1 - before.1);
            eprintln!("{WALKS} walks on mount {mount}: {asked} requests, {local} names by the kernel");
            // Both mounts' files may still be being closed.
            ensure!(asked < WALKS / 10, "{asked} requests for {WALKS} walks");
            ensure!(local >= WALKS * FILES as u64, "{local} names by the kernel");
        }
        Ok(())
    })
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn what_another_mount_does_to_a_path_is_seen() -> anyhow::Result<()> {
    guard::with_cluster(Options::extension(), |cluster| {
        for round in 0..16 {
            let name = format!("tree{round}");
            let (here, there) = (
                cluster.mount(round % 2).join(&name),
                cluster.mount(1 - round % 2).join(&name),
            );
            grow(&here)?;
            for _ in 0..3 {
                walk(&here)?;
                walk(&there)?;
            }
            let leaf = |root: &Path, name: &str| root.join("a/b/c").join(name);
            let f1 = number(&leaf(&here, "f1"))?;
            fs::remove_file(leaf(&there, "f0"))?;
            ensure!(number(&leaf(&here, "f0"))?.is_none(), "a name taken away");
            fs::write(leaf(&there, "absent"), b"y")?;
            ensure!(
                number(&leaf(&here, "absent"))? == number(&leaf(&there, "absent"))?,
                "a name made"
            );
            ensure!(fs::read(leaf(&here, "absent"))? == b"y", "what it leads to");
            fs::rename(leaf(&there, "f1"), leaf(&there, "f2"))?;
            ensure!(number(&leaf(&here, "f1"))?.is_none(), "a name moved away");
            ensure!(number(&leaf(&here, "f2"))? == f1, "a name replaced");
            // Where a path leads through.
            fs::rename(there.join("a/b"), there.join("a/d"))?;
            ensure!(
                number(&leaf(&here, "f2"))?.is_none(),
                "a path through a directory that was moved"
            );
            ensure!(number(&here.join("a/d/c/f2"))? == f1, "the way to it now");
            let stat = || {
                sys::as_user(NOBODY, NOBODY, || {
                    sys::errno(&fs::metadata(here.join("a/d/c/f2")))
                })
            };
            ensure!(stat()? == 0, "everybody may walk");
            fs::set_permissions(there.join("a/d"), Permissions::from_mode(0o700))?;
            ensure!(
                stat()? == libc::EACCES,
                "a directory that has been closed to others"
            );
            fs::set_permissions(there.join("a/d"), Permissions::from_mode(0o755))?;
            ensure!(stat()? == 0, "and opened again");
        }
        Ok(())
    })
}

/// Between the look-up of a name and the look at what it led to another mount may take it away. A handle that does not
/// open the file stands for the moment in between.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn what_is_gone_can_be_looked_at() -> anyhow::Result<()> {
    guard::with_cluster(Options::extension(), |cluster| {
        let (here, there) = (cluster.mount(0).join("file"), cluster.mount(1).join("file"));
        for round in 0..8 {
            fs::write(&there, b"one")?;
            fs::write(&here, b"three")?;
            let found = sys::open(&here, libc::O_PATH)?;
            ensure!(found.metadata()?.len() == 5, "found in round {round}");
            fs::remove_file(&there)?;
            let last = found
                .metadata()
                .with_context(|| format!("gone in round {round}"))?;
            ensure!(
                (last.nlink(), last.len()) == (0, 5),
                "{} links, {} bytes in round {round}",
                last.nlink(),
                last.len()
            );
            ensure!(number(&here)?.is_none(), "the name in round {round}");
        }
        Ok(())
    })
}

/// A name is there all the time, and leads to another file every moment: looking at it never fails.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn a_name_that_is_replaced_all_the_time_is_always_there() -> anyhow::Result<()> {
    const TURNS: usize = 40;
    let options = Options {
        mounts: 3,
        ..Options::extension()
    };
    guard::with_cluster(options, |cluster| {
        let name = |mount: usize| cluster.mount(mount).join("name");
        fs::write(name(0), b"first")?;
        let replacing = AtomicUsize::new(4);
        let seen = guard::together(6, |n| {
            let (mount, path) = (n % 3, name(n % 3));
            if n >= 4 {
                let mut looked = 0;
                while replacing.load(Ordering::SeqCst) > 0 {
                    looked += 1;
                    let found = fs::symlink_metadata(&path).with_context(|| format!("look {looked}"))?;
                    ensure!(found.len() == 5, "{} bytes", found.len());
                }
                return Ok(looked);
            }
            let done = (0..TURNS).try_for_each(|turn| {
                let own = cluster.mount(mount).join(format!("own{n}-{turn}"));
                fs::write(&own, b"other")?;
                fs::rename(&own, &path)
            });
            replacing.fetch_sub(1, Ordering::SeqCst);
            Ok(done.map(|()| 0)?)
        })?;
        eprintln!("looked {seen:?} times");
        Ok(())
    })
}

/// The kernel has a file locked while its name is removed, and a flush of its dirty pages wants that lock. A mount that kept the
/// directory's lease while it waited for the file's would wait for the other one, whose removal waits for the directory.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn two_mounts_remove_what_they_have_just_written() -> anyhow::Result<()> {
    const ROUNDS: usize = 8;
    const REMOVED: usize = 12;
    let wait = Duration::from_secs(20);
    let options = Options {
        lease_wait: wait,
        ..Options::extension()
    };
    guard::with_cluster(options, move |cluster| {
        let barrier = Barrier::new(2);
        let done = guard::together(2, |n| {
            let mut removed = 0;
            for round in 0..ROUNDS {
                let path = |i: usize| cluster.mount(n).join(format!("f{i}"));
                // A close would write them back.
                let mut open = Vec::new();
                for i in (0..REMOVED).filter(|i| (round + i) % 2 == n) {
                    let mut file = fs::File::create(path(i))?;
                    file.write_all(&[b'x'; 20_000])?;
                    open.push(file);
                }
                barrier.wait();
                for i in 0..REMOVED {
                    let begun = Instant::now();
                    match fs::remove_file(path(i)) {
                        Ok(()) => removed += 1,
                        Err(error) => {
                            ensure!(
                                error.kind() == std::io::ErrorKind::NotFound,
                                "round {round}: {error}"
                            );
                        }
                    }
                    let took = begun.elapsed();
                    ensure!(took < wait / 4, "round {round}: {took:?}");
                }
                barrier.wait();
            }
            Ok(removed)
        })?;
        ensure!(done.iter().sum::<usize>() == ROUNDS * REMOVED, "{done:?} removed");
        Ok(())
    })
}
