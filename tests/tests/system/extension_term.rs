//! A mount's daemon that is stopped for longer than its term: with the kernel extension nobody on its host sees anything old.

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use system_tests::cluster::{Cluster, Fabric, Options, Role};
use system_tests::pressure::Setting;
use system_tests::stale::{KINDS, Readers, Seen, Writer};
use system_tests::{guard, sys};

/// Others go on after a term and its margin. Guests of the lab are slow.
const OTHERS: Duration = Duration::from_secs(20);
/// A mount that was declared dead serves again within.
const ANEW: Duration = Duration::from_secs(60);
/// How long the daemon is stopped at least.
const STOPPED: Duration = Duration::from_secs(6);
/// Looks of each reader.
const LOOKS: u64 = 30;

fn cluster() -> anyhow::Result<Cluster> {
    Cluster::start(Options {
        fabric: Fabric::Tcp,
        term: Duration::from_secs(2),
        ..Options::extension()
    })
}

fn none_is_stale(seen: &[Seen], when: &str) -> anyhow::Result<()> {
    let stale: u64 = seen.iter().map(|s| s.stale).sum();
    let table: Vec<_> = KINDS.iter().zip(seen).collect();
    eprintln!("{when}: {table:?}");
    ensure!(stale == 0, "{when} {stale} looks at something old: {table:?}");
    Ok(())
}

#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_stopped_past_its_term() -> anyhow::Result<()> {
    guard::with(cluster()?, |cluster| {
        // Nothing is written back meanwhile by the kernel's own clock.
        let _clock = Setting::set("vm/dirty_writeback_centisecs", "0")?;
        let board = cluster.path("board");
        let mut writer = Writer::new(&cluster.mount(0).join("f"), &board)?;
        // What the mount has not stored when it dies is lost, and whoever wrote it is told.
        let dirty = sys::open(&cluster.mount(1).join("dirty"), libc::O_RDWR | libc::O_CREAT)?;
        dirty.write_all_at(&[b's'; 8192], 0)?;
        dirty.sync_all()?;
        dirty.write_all_at(&[b'd'; 8192], 0)?;
        let mut readers = Readers::start(&cluster.mount(1).join("f"), &board)?;
        readers.wait_for_looks(LOOKS, OTHERS)?;
        writer.step()?;
        readers.wait_for_looks(LOOKS, OTHERS)?;
        none_is_stale(&readers.seen()?, "before")?;

        cluster.signal(Role::Mount(1), Signal::STOP)?;
        let stopped = Instant::now();
        let others = stopped_for_long(cluster, &mut writer, &mut readers, stopped);
        cluster.signal(Role::Mount(1), Signal::CONT)?;
        others?;
        readers.wait_for_looks(LOOKS, ANEW)?;
        none_is_stale(&readers.seen()?, "when it goes on")?;
        for _ in 0..5 {
            writer.step()?;
            readers.wait_for_looks(2, OTHERS)?;
        }
        none_is_stale(&readers.seen()?, "in its next life")?;
        ensure!(dirty.sync_all().is_err(), "nobody is told of what is lost");
        drop(dirty);
        let anew = fs::read(cluster.mount(1).join("dirty"))?;
        ensure!(
            anew == [b's'; 8192],
            "what was not stored is there in the next life"
        );
        Ok(())
    })
}

fn stopped_for_long(
    cluster: &Cluster,
    writer: &mut Writer,
    readers: &mut Readers,
    stopped: Instant,
) -> anyhow::Result<()> {
    writer.step()?;
    let waited = stopped.elapsed();
    eprintln!("the other mount waited for {waited:?}");
    ensure!(waited < OTHERS, "the other mount waited for {waited:?}");
    while stopped.elapsed() < STOPPED.max(waited + STOPPED / 3) {
        writer.step()?;
        std::thread::sleep(Duration::from_millis(100));
    }
    let seen = readers.seen()?;
    none_is_stale(&seen, "while it is stopped")?;
    let other = fs::read(cluster.mount(0).join("dirty"))?;
    ensure!(other == [b's'; 8192], "the other mount reads what was not stored");
    std::thread::sleep(Duration::from_secs(1));
    ensure!(readers.seen()? == seen, "somebody is answered past the term");
    Ok(())
}

/// The metadata server is silent for longer than a term: all mounts freeze, and go on with all they had when they hear of it.
#[test]
#[ignore = "needs the kernel extension: make lab"]
fn extension_frozen_while_nobody_answers() -> anyhow::Result<()> {
    guard::with(cluster()?, |cluster| {
        let _clock = Setting::set("vm/dirty_writeback_centisecs", "0")?;
        let board = cluster.path("board");
        let mut writer = Writer::new(&cluster.mount(0).join("f"), &board)?;
        let dirty = sys::open(&cluster.mount(1).join("dirty"), libc::O_RDWR | libc::O_CREAT)?;
        dirty.write_all_at(&[b'd'; 8192], 0)?;
        let mut readers = Readers::start(&cluster.mount(1).join("f"), &board)?;
        readers.wait_for_looks(LOOKS, OTHERS)?;
        cluster.signal(Role::Meta, Signal::STOP)?;
        std::thread::sleep(STOPPED / 2);
        let frozen = readers.seen();
        std::thread::sleep(STOPPED / 6);
        let still = readers.seen();
        cluster.signal(Role::Meta, Signal::CONT)?;
        let (frozen, still) = (frozen?, still?);
        none_is_stale(&still, "while nobody answers")?;
        ensure!(
            frozen == still,
            "answered past the term: {frozen:?}, then {still:?}"
        );
        readers.wait_for_looks(LOOKS, ANEW)?;
        writer.step()?;
        readers.wait_for_looks(LOOKS, OTHERS)?;
        let seen = readers.seen()?;
        none_is_stale(&seen, "when it goes on")?;
        ensure!(
            seen.iter().all(|s| s.failed == 0),
            "something failed although nobody died: {seen:?}"
        );
        dirty.sync_all().context("what was dirty")?;
        drop(dirty);
        ensure!(
            fs::read(cluster.mount(0).join("dirty"))? == [b'd'; 8192],
            "what was dirty"
        );
        Ok(())
    })
}
