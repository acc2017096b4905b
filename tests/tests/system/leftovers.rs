//! What killed processes leave behind, and who takes it away.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, ensure};
use system_tests::cluster::{Options, Role};
use system_tests::guard;
use system_tests::process::fsd_binary;

/// Memory files of stores below a folder.
fn memory_of(stores: &Path) -> anyhow::Result<Vec<String>> {
    let mut stems = BTreeSet::new();
    let mut names = Vec::new();
    for entry in fs::read_dir("/dev/shm")? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.ends_with(".note")
            && fs::read_to_string(&path).is_ok_and(|note| note.contains(&*stores.to_string_lossy()))
        {
            stems.insert(name.trim_end_matches(".note").to_owned());
        }
        names.push(name);
    }
    names.retain(|name| stems.iter().any(|stem| name.starts_with(stem)));
    Ok(names)
}

fn dev(temporary: &Path, script: &str) -> anyhow::Result<Output> {
    Command::new("timeout")
        .arg("60")
        .arg(fsd_binary()?)
        .args([
            "dev",
            "--storage",
            "1",
            "--pool",
            "64MiB",
            "--",
            "sh",
            "-c",
            script,
        ])
        .env("TMPDIR", temporary)
        .output()
        .context("fsd dev")
}

fn mounted_below(dir: &Path) -> anyhow::Result<bool> {
    Ok(fs::read_to_string("/proc/self/mountinfo")?.contains(&format!("{}/", dir.display())))
}

#[test]
fn a_killed_dev_cluster_leaves_nothing() -> anyhow::Result<()> {
    let body = || {
        let temporary = tempfile::Builder::new().prefix("dfst-").tempdir_in("/tmp")?;
        let dir = temporary.path();
        let count = |dir: &Path| -> anyhow::Result<usize> { Ok(fs::read_dir(dir)?.count()) };
        // Its servers were killed: it takes away what they made.
        let out = dev(dir, "for p in $FSD_PIDS; do kill -9 ${p##*=}; done")?;
        ensure!(out.status.success(), "{out:?}");
        ensure!(
            count(dir)? == 0 && memory_of(dir)?.is_empty(),
            "{:?}",
            memory_of(dir)?
        );
        // It was killed itself, with everything: the next one does.
        let out = dev(
            dir,
            "for p in $FSD_PIDS; do kill -9 ${p##*=}; done; kill -9 $PPID",
        )?;
        ensure!(
            out.status.signal() == Some(9) || out.status.code() == Some(137),
            "{out:?}"
        );
        ensure!(
            count(dir)? == 1 && !memory_of(dir)?.is_empty(),
            "nothing was left"
        );
        let out = dev(dir, "true")?;
        ensure!(out.status.success() && out.stderr.is_empty(), "{out:?}");
        ensure!(count(dir)? == 0, "a folder is left");
        ensure!(memory_of(dir)?.is_empty(), "{:?}", memory_of(dir)?);
        ensure!(!mounted_below(dir)?, "mounts are left");
        // But not what another one uses.
        let nested = format!(
            "TMPDIR={0} timeout 60 {1} dev --storage 1 --pool 64MiB -- true && echo x > $FSD_DIR/0/f && cat $FSD_DIR/1/f",
            dir.display(),
            fsd_binary()?.display()
        );
        let out = dev(dir, &nested)?;
        ensure!(out.status.success() && out.stdout == b"x\n", "{out:?}");
        Ok(())
    };
    guard::within(Duration::from_secs(90), body, || ())
}

#[test]
fn memory_without_a_store_can_be_removed() -> anyhow::Result<()> {
    let options = Options {
        storage: 2,
        mounts: 1,
        pool_mib: 16,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let memory = cluster.memory().display().to_string();
        let clean = |more: &[&str]| cluster.tool(&[&["clean", "--dir", &*memory], more].concat());
        // Seats come and go with connections.
        let lasts = |e: &fs::DirEntry| !e.file_name().to_string_lossy().contains(".seats.");
        let count = || -> anyhow::Result<usize> {
            let all = fs::read_dir(cluster.memory())?.collect::<Result<Vec<_>, _>>()?;
            Ok(all.iter().filter(|e| lasts(e)).count())
        };
        fs::write(cluster.mount(0).join("f"), vec![7; 1 << 20])?;
        fs::File::open(cluster.mount(0).join("f"))?.sync_all()?;
        let all = count()?;
        let listed = clean(&["--remove"])?;
        ensure!(listed.matches("in use").count() == 3, "{listed}");
        // A mount ends whose leases are lost with the memory.
        cluster.end(Role::Mount(0))?;
        cluster.kill(Role::Storage(1));
        let listed = clean(&["--remove"])?;
        ensure!(
            listed.contains("storage node 1 of cluster 'test'") && listed.contains("kept for the next start"),
            "{listed}"
        );
        ensure!(count()? == all, "something was removed: {listed}");
        let (store, away) = (cluster.path("storage1"), cluster.path("away"));
        fs::rename(&store, &away)?;
        let listed = clean(&[])?;
        ensure!(
            listed.contains("does not exist any more") && listed.contains("--remove"),
            "{listed}"
        );
        ensure!(
            count()? == all,
            "something was removed without being asked: {listed}"
        );
        let listed = clean(&["--remove"])?;
        ensure!(listed.contains(": removed") && count()? < all, "{listed}");
        ensure!(!clean(&[])?.contains("storage node 1"), "{listed}");
        // The others go on, and this one has what was stored.
        fs::rename(&away, &store)?;
        cluster.start_role(Role::Storage(1))?;
        cluster.start_role(Role::Mount(0))?;
        ensure!(fs::read(cluster.mount(0).join("f"))? == vec![7; 1 << 20]);
        Ok(())
    })
}
