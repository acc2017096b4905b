//! Changes of where a file's data is that a storage node carries out and its mount does not learn of, or only another node's
//! part of. The frames that such a change frees are soon another file's.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cluster, Fabric, Options, Role};
use system_tests::guard;

/// Bytes of a file's blocks, which lie on the storage nodes in turn.
const BLOCK: usize = 256 << 10;
/// Blocks of a long file.
const BLOCKS: usize = 64;
/// Small files.
const FILES: usize = 16;
/// Longest time that work may stand still after a storage node is back.
const RECOVERY: Duration = Duration::from_secs(20);

/// Two storage nodes, and mounts that soon give up one that does not answer.
fn options() -> Options {
    Options {
        fabric: Fabric::Tcp,
        storage: 2,
        timeout: Duration::from_millis(300),
        hard: Some(Duration::from_millis(300)),
        ..Options::default()
    }
}

/// Writes a file that is new or is as it is to be, once its storage nodes are back, and makes it durable.
fn write_durably(path: &Path, byte: u8, len: usize) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let write = || {
            let file = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            file.write_all_at(&vec![byte; len], 0)?;
            file.sync_all()
        };
        match write() {
            Err(_) if start.elapsed() < RECOVERY => std::thread::sleep(Duration::from_millis(20)),
            result => return result.with_context(|| format!("{} after {RECOVERY:?}", path.display())),
        }
    }
}

/// Writes new files, which get the frames that are free, then files of before; each must be what was written to it.
fn new_files_are_theirs(
    cluster: &Cluster,
    (count, len): (usize, usize),
    before: &[(String, usize)],
) -> anyhow::Result<()> {
    let mut all: Vec<(String, u8, usize)> = Vec::new();
    all.extend((0..count).map(|i| (format!("new{i}"), b'n', len)));
    all.extend(before.iter().map(|(name, len)| (name.clone(), b'b', *len)));
    for (name, byte, len) in &all {
        write_durably(&cluster.mount(0).join(name), *byte, *len)?;
    }
    for (name, byte, len) in &all {
        let seen = fs::read(cluster.mount(1).join(name))?;
        ensure!(
            seen.len() >= *len && seen[..*len].iter().all(|b| b == byte),
            "{name} holds what was written to another file"
        );
    }
    Ok(())
}

/// A file of many blocks on both nodes.
fn long_file(cluster: &Cluster) -> anyhow::Result<File> {
    let file = File::create(cluster.mount(0).join("long"))?;
    file.write_all_at(&vec![b'l'; BLOCKS * BLOCK], 0)?;
    file.sync_all()?;
    Ok(file)
}

fn cannot_be_cut(long: &File) -> anyhow::Result<()> {
    let failed = long.set_len(0).err();
    let failed = failed.context("cut although a storage node is away")?;
    ensure!(
        long.metadata()?.len() == (BLOCKS * BLOCK) as u64,
        "cut, and failed: {failed}"
    );
    Ok(())
}

/// As many blocks as the long file had, of files that are new; then the long file is written again.
fn blocks_are_not_shared(cluster: &Cluster) -> anyhow::Result<()> {
    new_files_are_theirs(
        cluster,
        (BLOCKS, 2 * BLOCK),
        &[("long".to_owned(), BLOCKS * BLOCK)],
    )
}

/// One node frees its part, and the other is dead.
#[test]
fn a_truncation_that_fails_half_way_keeps_no_freed_block() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let long = long_file(cluster)?;
        cluster.kill(Role::Storage(1));
        cannot_be_cut(&long)?;
        cluster.start_role(Role::Storage(1))?;
        blocks_are_not_shared(cluster)
    })
}

/// A node frees its part when it goes on, long after the mount has given up waiting for it.
#[test]
fn a_truncation_that_is_carried_out_late_keeps_no_freed_block() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let long = long_file(cluster)?;
        let stopped = cluster.stopped(Role::Storage(1))?;
        cannot_be_cut(&long)?;
        drop(stopped);
        blocks_are_not_shared(cluster)
    })
}

/// A node moves blocks to larger frames when it goes on, long after the mount has given up waiting for it.
#[test]
fn blocks_that_are_moved_late_are_not_written_where_they_were() -> anyhow::Result<()> {
    guard::with_cluster(options(), |cluster| {
        let small: Vec<(String, usize)> = (0..FILES).map(|i| (format!("small{i}"), 4096)).collect();
        for (name, len) in &small {
            write_durably(&cluster.mount(0).join(name), b's', *len)?;
        }
        // Opened before: that is noted in the lease's record.
        let open =
            |(name, _): &(String, usize)| File::options().write(true).open(cluster.mount(0).join(name));
        let files: Vec<File> = small.iter().map(open).collect::<Result<_, _>>()?;
        // The storage node of an inode has its first block, too.
        let home = files[0].metadata()?.ino() >> 36 & 0xff;
        let stopped = cluster.stopped(Role::Storage(home as usize))?;
        let longer = files
            .iter()
            .map(|file| file.write_all_at(&vec![b'l'; 128 << 10], 4096));
        let failed = longer.filter(Result::is_err).count();
        ensure!(
            failed > 0,
            "no file has its block on the storage node that is stopped"
        );
        drop(stopped);
        new_files_are_theirs(cluster, (4 * FILES, 4096), &small)
    })
}
