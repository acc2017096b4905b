//! What a file may do beyond its caller goes with the first write, whichever mount gave it and whichever writes.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Options};
use system_tests::{guard, sys};

const CAPABILITY: &str = "security.capability";
/// CAP_NET_RAW, permitted and effective: `struct vfs_cap_data`.
const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// What is longer than the extension leaves to the daemon.
static LONG: [u8; 40_000] = [b'l'; 40_000];

fn open(path: &Path) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

/// Gives the file capabilities through one mount, does something through the other, which has not looked meanwhile, and
/// looks through both.
fn go_with(
    what: &str,
    by: &Path,
    to: &Path,
    change: impl FnOnce() -> std::io::Result<()>,
) -> anyhow::Result<()> {
    sys::setxattr(by, CAPABILITY, &NET_RAW, 0).context("give")?;
    ensure!(sys::getxattr(by, CAPABILITY)? == NET_RAW, "{what}: not given");
    change().with_context(|| what.to_owned())?;
    for path in [to, by] {
        let left = sys::getxattr(path, CAPABILITY);
        ensure!(
            left.as_ref()
                .is_err_and(|e| e.raw_os_error() == Some(libc::ENODATA)),
            "{what}: {} has {left:?}",
            path.display()
        );
    }
    Ok(())
}

fn capabilities(cluster: &Cluster) -> anyhow::Result<()> {
    let (a, b) = (cluster.mount(0).join("f"), cluster.mount(1).join("f"));
    let from = cluster.mount(1).join("from");
    fs::write(&from, LONG)?;
    fs::write(&a, [b'a'; 8192])?;
    let (mine, other) = (open(&a)?, open(&b)?);
    // The kernel of each mount sees that there are none.
    mine.write_all_at(&LONG, 0)?;
    other.write_all_at(&LONG, 1)?;
    go_with("a long write", &a, &b, || other.write_all_at(&LONG, 2))?;
    go_with("and of the other", &b, &a, || mine.write_all_at(&LONG, 3))?;
    go_with("a write", &a, &b, || other.write_all_at(b"b", 2))?;
    go_with("another", &a, &b, || other.write_all_at(b"b", 3))?;
    go_with("a write of the same mount", &a, &b, || mine.write_all_at(b"a", 4))?;
    go_with("a truncation", &a, &b, || other.set_len(4097))?;
    go_with("an allocation", &a, &b, || sys::fallocate(&other, 0, 0, 4096))?;
    go_with("a copy", &a, &b, || {
        let mut from = File::open(&from)?;
        std::io::copy(&mut from, &mut &other).map(drop)
    })?;
    go_with("an opening that truncates", &b, &a, || File::create(&a).map(drop))?;
    // Taken from each other, so that with the extension the writes are calls and forwarded operations.
    for n in 0..40 {
        mine.write_all_at(b"a", n)?;
        other.write_all_at(b"b", n)?;
    }
    for n in 0..4 {
        go_with("a contended write", &a, &b, || other.write_all_at(b"b", n))?;
        go_with("and of the other", &b, &a, || mine.write_all_at(b"a", n))?;
    }
    // Others stay.
    sys::setxattr(&a, "user.kept", b"v", 0)?;
    go_with("a write beside another attribute", &a, &b, || {
        other.write_all_at(b"b", 2)
    })?;
    ensure!(
        sys::getxattr(&b, "user.kept")? == b"v",
        "another attribute is gone"
    );
    Ok(())
}

fn set_user_id(cluster: &Cluster) -> anyhow::Result<()> {
    let (a, b) = (cluster.mount(0).join("s"), cluster.mount(1).join("s"));
    fs::write(&a, [b'a'; 8192])?;
    fs::set_permissions(&a, Permissions::from_mode(0o666))?;
    let other = open(&b)?;
    let bits = |path: &Path| anyhow::Ok(path.metadata()?.mode() & 0o7777);
    for n in 0..8 {
        other.write_all_at(b"b", n)?;
        fs::set_permissions(&a, Permissions::from_mode(0o6777))?;
        // The owner of the handle has not the right to keep them.
        sys::as_user(65534, 65534, || other.write_all_at(b"c", n))??;
        ensure!(bits(&b)? == 0o777, "the writer sees {:o}", bits(&b)?);
        ensure!(bits(&a)? == 0o777, "the other sees {:o}", bits(&a)?);
    }
    Ok(())
}

#[test]
fn privileges_go_with_a_write() -> anyhow::Result<()> {
    for cache in [Cache::Writethrough, Cache::Direct] {
        guard::with_cluster(
            Options {
                cache,
                ..Options::default()
            },
            move |cluster| {
                capabilities(cluster)
                    .and_then(|()| set_user_id(cluster))
                    .with_context(|| format!("{cache:?}"))
            },
        )?;
    }
    Ok(())
}

#[test]
#[ignore = "needs the kernel extension: run in a virtual machine"]
fn extension_privileges_go_with_a_write() -> anyhow::Result<()> {
    guard::with_cluster(Options::extension(), |cluster| {
        capabilities(cluster)?;
        set_user_id(cluster)
    })
}
