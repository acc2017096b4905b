//! A mount dies with data beyond the end of a file as the metadata server knows it: nobody ever sees them, and their space is
//! given back.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Fabric, Options, Role};
use system_tests::{guard, sys};

/// Frames of all storage nodes.
fn frames(cluster: &Cluster) -> anyhow::Result<u64> {
    let status = cluster.status()?;
    let nodes = status["storage"].as_array().context("no storage nodes")?;
    Ok(nodes
        .iter()
        .map(|n| n[1]["Ok"]["frames"].as_u64().unwrap_or(0))
        .sum())
}

#[test]
fn what_a_dead_mount_left_beyond_the_end_is_gone() -> anyhow::Result<()> {
    let options = Options {
        fabric: Fabric::Tcp,
        cache: Cache::Direct,
        mounts: 1,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let path = cluster.mount(0).join("f");
        let file = File::create(&path)?;
        file.write_all_at(&[1; 100], 0)?;
        file.sync_all()?;
        let before = frames(cluster)?;
        // Large writes go to the frames at once; how long the file has become the mount tells later.
        file.write_all_at(&vec![2; 1 << 20], 0)?;
        ensure!(frames(cluster)? > before, "nothing has been written");
        cluster.kill(Role::Mount(0));
        drop(file);
        cluster.start_role(Role::Mount(0))?;
        ensure!(
            fs::metadata(&path)?.len() == 100,
            "the mount had told it, and nothing is tested"
        );
        ensure!(frames(cluster)? == before, "the frames are not given back");
        sys::truncate(&path, 1 << 20)?;
        let read = fs::read(&path)?;
        ensure!(
            read.len() == 1 << 20 && read[100..].iter().all(|&b| b == 0),
            "what was never told is seen"
        );
        Ok(())
    })
}
