//! What fsync says to whom, and what is left when the power goes right after.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::ensure;
use system_tests::cluster::{Cache, Fabric, Options};
use system_tests::guard;

const LIMIT: Duration = Duration::from_secs(120);
const PAGE: u64 = 4096;
/// Pages of the file that is written over; several blocks on each storage node.
const PAGES: u64 = 1024;
const CALLS: u64 = 400;

fn options(fabric: Fabric) -> Options {
    Options {
        fabric,
        cache: Cache::Direct,
        mounts: 1,
        ..Options::default()
    }
}

fn open(path: &Path) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    Ok(options
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?)
}

fn page(n: u64) -> Vec<u8> {
    (n + 1).to_le_bytes().repeat(PAGE as usize / 8)
}

/// Where a call writes: no two at the same place, and not in order.
fn place(n: u64) -> u64 {
    n * 389 % PAGES
}

fn costs_and_lasts(fabric: Fabric) -> anyhow::Result<()> {
    guard::with_cluster_within(LIMIT, options(fabric), |cluster| {
        let path = |name: &str| cluster.mount(0).join(name);
        let over = open(&path("over"))?;
        over.write_all_at(&vec![0xee; (PAGES * PAGE) as usize], 0)?;
        over.sync_all()?;
        cluster.messages_below(1.3, "written over", CALLS, |n| {
            over.write_all_at(&page(n), place(n) * PAGE)?;
            Ok(over.sync_data()?)
        })?;
        let longer = open(&path("longer"))?;
        cluster.messages_below(3.5, "made longer", CALLS, |n| {
            longer.write_all_at(&page(n), n * PAGE)?;
            Ok(longer.sync_data()?)
        })?;
        for n in 0..20 {
            let new = open(&path(&format!("new{n}")))?;
            new.write_all_at(&page(n)[..1000], 0)?;
            new.sync_all()?;
        }
        // Over some that have been stored meanwhile, and some that have not.
        for n in (0..CALLS).step_by(7) {
            over.write_all_at(&page(n + CALLS), place(n) * PAGE)?;
            over.sync_data()?;
        }
        cluster.abort();
        drop((over, longer));
        for entry in fs::read_dir(cluster.memory())? {
            fs::remove_file(entry?.path())?;
        }
        cluster.restart_after_abort()?;
        let mut expected = vec![0xee; (PAGES * PAGE) as usize];
        for n in 0..CALLS {
            let at = (place(n) * PAGE) as usize;
            let content = if n.is_multiple_of(7) {
                page(n + CALLS)
            } else {
                page(n)
            };
            expected[at..at + PAGE as usize].copy_from_slice(&content);
        }
        ensure!(
            fs::read(path("over"))? == expected,
            "what was written over is not there"
        );
        let expected: Vec<u8> = (0..CALLS).flat_map(page).collect();
        ensure!(
            fs::read(path("longer"))? == expected,
            "what was made longer is not there"
        );
        for n in 0..20 {
            ensure!(fs::read(path(&format!("new{n}")))? == page(n)[..1000], "file {n}");
        }
        Ok(())
    })
}

#[test]
fn an_fdatasync_that_writes_over_is_one_request() -> anyhow::Result<()> {
    costs_and_lasts(Fabric::Tcp)
}

#[test]
fn an_fdatasync_that_writes_over_is_one_request_in_shared_memory() -> anyhow::Result<()> {
    costs_and_lasts(Fabric::Shm)
}
