//! Writes that are to be durable when they return: O_SYNC, O_DSYNC, and flags of a single call.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Options};
use system_tests::{guard, sys};

const OLD: &[u8] = &[b'0'; 100];
const NEW: &[u8] = &[b'D'; 100];

/// Open flags, and flags of the call.
const KINDS: [(i32, i32); 8] = [
    (libc::O_WRONLY | libc::O_DSYNC, 0),
    (libc::O_WRONLY | libc::O_SYNC, 0),
    (libc::O_RDWR | libc::O_DSYNC, 0),
    (libc::O_RDWR | libc::O_SYNC, 0),
    (libc::O_WRONLY, libc::RWF_DSYNC),
    (libc::O_WRONLY, libc::RWF_SYNC),
    (libc::O_RDWR, libc::RWF_DSYNC),
    (libc::O_RDWR, libc::RWF_SYNC),
];

fn write(path: &Path, (open, call): (i32, i32)) -> anyhow::Result<File> {
    let file = sys::open(path, open)?;
    sys::write_with(&file, 0, NEW, call)?;
    Ok(file)
}

/// What a synchronous write has returned for is there when everything was killed right after.
fn survives(cache: Cache) -> anyhow::Result<()> {
    let options = Options {
        cache,
        mounts: 1,
        storage: 1,
        ..Options::default()
    };
    guard::with_cluster(options, |cluster| {
        let name = |i: usize| cluster.mount(0).join(format!("f{i}"));
        for i in 0..KINDS.len() {
            let file = File::create(name(i))?;
            file.write_all_at(OLD, 0)?;
            file.sync_all()?;
        }
        let mut open = Vec::new();
        for (i, kind) in KINDS.into_iter().enumerate() {
            open.push(write(&name(i), kind).with_context(|| format!("{kind:x?}"))?);
        }
        cluster.abort();
        drop(open);
        cluster.restart_after_abort()?;
        for (i, kind) in KINDS.into_iter().enumerate() {
            ensure!(fs::read(name(i))? == NEW, "open and call flags {kind:x?}: lost");
        }
        Ok(())
    })
}

#[test]
fn synchronous_writes_survive_past_the_page_cache() -> anyhow::Result<()> {
    survives(Cache::Direct)
}

#[test]
fn synchronous_writes_survive_through_the_page_cache() -> anyhow::Result<()> {
    survives(Cache::Writethrough)
}
