//! Names under leases: the kernel walks paths by itself, and another mount's changes to them are seen at once.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

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
        _ => Ok(Some(
            found.with_context(|| format!("{}", path.display()))?.ino(),
        )),
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
        ensure!(number(&leaf.join(format!("f{i}")))?.is_some(), "f{i} is not there");
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
            // Found; lent; kept.
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
            let stat = || sys::as_user(NOBODY, NOBODY, || sys::errno(&fs::metadata(here.join("a/d/c/f2"))));
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
