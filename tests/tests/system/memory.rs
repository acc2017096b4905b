//! What a mount keeps in memory.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Cluster, Options};
use system_tests::guard;

fn inodes(cluster: &Cluster) -> anyhow::Result<Vec<u64>> {
    let status = cluster.status()?;
    let mounts = status["mounts"].as_array().context("no mounts in the status")?;
    mounts
        .iter()
        .map(|m| {
            m[1]["Ok"]["inodes"]
                .as_u64()
                .context("no inodes in the status of a mount")
        })
        .collect()
}

#[test]
fn inodes_the_kernel_has_forgotten_are_forgotten() -> anyhow::Result<()> {
    const FILES: usize = 2000;
    const LIMIT: usize = 200;
    let options = Options {
        cache: Cache::Writethrough,
        max_inodes: LIMIT,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let (a, b) = (cluster.mount(0).join("d"), cluster.mount(1).join("d"));
        let content = |i: usize| format!("{i}").repeat(20 + i % 300);
        fs::create_dir(&a)?;
        for i in 0..FILES {
            fs::write(a.join(format!("f{i}")), content(i))?;
        }
        let all_there = |dir: &std::path::Path| -> anyhow::Result<()> {
            for i in 0..FILES {
                let text = fs::read_to_string(dir.join(format!("f{i}")))?;
                ensure!(text == content(i), "contents of f{i}");
            }
            Ok(())
        };
        all_there(&b)?;
        ensure!(
            inodes(cluster)?.iter().all(|&n| n > FILES as u64),
            "the files are not known"
        );
        // The kernel forgets what nobody uses, but not all at once.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            fs::write("/proc/sys/vm/drop_caches", "2").context("dropping the kernel's inodes needs root")?;
            let known = inodes(cluster)?;
            if known.iter().all(|&n| n <= (LIMIT + LIMIT / 4) as u64) {
                break;
            }
            ensure!(Instant::now() < deadline, "still known after a minute: {known:?}");
            // So that there is something to be forgotten.
            for i in 0..50 {
                a.join(format!("f{i}")).metadata()?;
                b.join(format!("f{i}")).metadata()?;
            }
        }
        // Nothing was lost, and leases and caches begin anew.
        all_there(&a)?;
        fs::write(b.join("f7"), content(7) + "changed")?;
        ensure!(fs::read_to_string(a.join("f7"))? == content(7) + "changed");
        fs::write(b.join("f7"), content(7))?;
        all_there(&b)
    })
}
