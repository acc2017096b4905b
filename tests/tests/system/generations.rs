//! Inodes whose lease records served others before.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use system_tests::cluster::{Cache, Options};
use system_tests::{guard, sys};

/// The part of an inode number that is used again: all but the generation.
fn place(number: u64) -> u64 {
    number & ((1 << 44) - 1)
}

/// Who asks for what is gone, by its number, must not bring it back in the place of what has its record now.
fn asked_for_again(options: Options) -> anyhow::Result<()> {
    const OLD: usize = 100;
    const MOST: usize = 2000;
    const WANTED: usize = 10;
    guard::with_cluster(options, |cluster| {
        let (here, there) = (cluster.mount(0), cluster.mount(1));
        // Handles that do not open the files, so that these can go.
        let mut gone: Vec<(u64, File)> = Vec::new();
        for i in 0..OLD {
            let name = format!("old{i}");
            fs::write(here.join(&name), b"old")?;
            let handle = sys::open(&here.join(&name), libc::O_PATH)?;
            gone.push((place(handle.metadata()?.ino()), handle));
            fs::remove_file(there.join(&name))?;
        }
        // They were looked up a moment ago, and are kept a moment for that; then their records are free when their blocks are.
        let end = Instant::now() + Duration::from_secs(20);
        let left = |what: &str| -> anyhow::Result<bool> { Ok(cluster.status()?["meta"]["Ok"][what] != 0) };
        while left("orphans")? || left("freeing")? {
            ensure!(Instant::now() < end, "files that were removed stay");
            std::thread::sleep(Duration::from_millis(50));
        }
        let mut made: Vec<(String, File)> = Vec::new();
        let mut asked = Vec::new();
        while asked.len() < WANTED && made.len() < MOST {
            let name = format!("new{}", made.len());
            let file = File::create(here.join(&name))?;
            file.write_all_at(b"newer", 0)?;
            let number = file.metadata()?.ino();
            let before = gone.iter().find(|(at, _)| *at == place(number));
            asked.extend(before.map(|(_, old)| (number, old.metadata())));
            made.push((name, file));
        }
        ensure!(
            asked.len() == WANTED,
            "of {MOST} files {} had the place of one before",
            asked.len()
        );
        for (name, file) in &made {
            file.write_all_at(b"still", 5)?;
            for mount in [&here, &there, &here] {
                let data = fs::read(mount.join(name))?;
                ensure!(
                    data == b"newerstill",
                    "{name}: {:?}",
                    String::from_utf8_lossy(&data)
                );
            }
        }
        for (number, old) in asked {
            let old = old.with_context(|| format!("what was before {number:#x}"))?;
            ensure!(
                old.ino() != number && old.nlink() == 0,
                "what was before {number:#x}: {old:?}"
            );
        }
        Ok(())
    })
}

fn options(cache: Cache) -> Options {
    Options {
        cache,
        storage: 1,
        ..Options::default()
    }
}

#[test]
fn asked_for_again_in_direct_mode() -> anyhow::Result<()> {
    asked_for_again(options(Cache::Direct))
}

#[test]
fn asked_for_again_in_writethrough_mode() -> anyhow::Result<()> {
    asked_for_again(options(Cache::Writethrough))
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn asked_for_again_with_the_extension() -> anyhow::Result<()> {
    asked_for_again(Options::extension())
}
