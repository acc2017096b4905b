//! Files that a mount has just made: the kernel keeps their attributes for a moment, and nobody is shown old ones.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use anyhow::ensure;
use system_tests::cluster::{Cache, Cluster, Fabric, Options};
use system_tests::guard;

const LIMIT: Duration = Duration::from_secs(60);

fn options(fabric: Fabric) -> Options {
    Options {
        fabric,
        cache: Cache::Writethrough,
        ..Options::default()
    }
}

#[test]
fn making_a_file_does_not_ask_for_its_attributes() -> anyhow::Result<()> {
    const FILES: u64 = 200;
    guard::with_cluster_within(LIMIT, options(Fabric::Shm), |cluster| {
        let dir = cluster.mount(0).join("d");
        fs::create_dir(&dir)?;
        let before = cluster.total("requests")?;
        for n in 0..FILES {
            let mut file = File::create(dir.join(n.to_string()))?;
            ensure!(file.metadata()?.len() == 0);
            file.write_all(b"something")?;
        }
        // LOOKUP of both names, CREATE, WRITE, FLUSH, RELEASE; a busy machine may take longer than the kernel keeps what it has.
        let each = (cluster.total("requests")? - before) as f64 / FILES as f64;
        ensure!(each < 6.7, "{each} requests each");
        Ok(())
    })
}

/// It is open on the mount that has made it, whose kernel has said nothing about it since, or has just written it.
fn changed_elsewhere(cluster: &Cluster, n: u32, written: bool) -> anyhow::Result<()> {
    let name = format!("f{n}{written}");
    let (near, far) = (cluster.mount(0).join(&name), cluster.mount(1).join(&name));
    let made = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&near)?;
    if written {
        made.write_all_at(b"near", 0)?;
    }
    if n.is_multiple_of(3) {
        ensure!(made.metadata()?.len() == if written { 4 } else { 0 });
    }
    let mode = 0o600 | (n & 0o77);
    fs::set_permissions(&far, Permissions::from_mode(mode))?;
    let seen = [made.metadata()?, near.metadata()?];
    ensure!(
        seen.iter().all(|seen| seen.mode() & 0o777 == mode),
        "{name} has mode {:o} and {:o} instead of {mode:o}",
        seen[0].mode(),
        seen[1].mode()
    );
    let length = u64::from(n) * 100 + 10;
    File::options().write(true).open(&far)?.set_len(length)?;
    ensure!(made.metadata()?.len() == length && near.metadata()?.len() == length);
    fs::hard_link(&far, cluster.mount(1).join(format!("{name}-")))?;
    ensure!(made.metadata()?.nlink() == 2, "{name} has one name");
    Ok(())
}

#[test]
fn what_another_mount_changes_of_it_is_seen_at_once() -> anyhow::Result<()> {
    for fabric in [Fabric::Shm, Fabric::Tcp] {
        guard::with_cluster_within(LIMIT, options(fabric), |cluster| {
            for n in 0..40 {
                changed_elsewhere(cluster, n, false)?;
                changed_elsewhere(cluster, n, true)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}
