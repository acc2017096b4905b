//! Names, permissions, attributes.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;

use anyhow::{Result, anyhow, ensure};
use distfuse_abi::{Attributes, Grant, Mode, Options};

use super::ensure_eq;
use crate::fixture::{Fixture, all, ino};

const ROOT: u64 = 1;

pub(super) fn grant_root(fixture: &Fixture, version: u64) -> Result<()> {
    let grant = Grant {
        version,
        since: version,
        attributes: Attributes {
            mode: 0o755,
            nlink: 2,
            ..Attributes::default()
        },
        ..Grant::default()
    };
    let table = fixture.manager()?.mount(0)?.table();
    table.grant(ROOT, Mode::Shared, &grant)?;
    Ok(())
}

pub fn quiet() -> Result<()> {
    let fixture = Fixture::one()?;
    let manager = fixture.manager()?;
    grant_root(&fixture, 1)?;
    let walk = || -> Result<()> {
        for n in 0..4 {
            let meta = fs::metadata(fixture.path(0, &format!("f{n}")))?;
            ensure_eq!((meta.len(), meta.mode() & 0o7777), (65536, 0o644), "f{n}");
        }
        ensure!(!fixture.path(0, "none").exists(), "a name that is not there");
        ensure_eq!(fs::metadata(fixture.path(0, "."))?.mode() & 0o7777, 0o755, "root");
        Ok(())
    };
    walk()?;
    let before = (fixture.control.requests(), manager.events.load(SeqCst));
    for _ in 0..50 {
        walk()?;
    }
    let after = (fixture.control.requests(), manager.events.load(SeqCst));
    let counters = manager.mount(0)?.counters();
    let getattrs = fixture.control.block().getattrs.load(SeqCst);
    ensure_eq!(
        after,
        before,
        "requests ({getattrs} GETATTR) and events of fifty walks ({counters:?})"
    );
    ensure!(
        counters.name_local > 200 && counters.stat_local > 200,
        "{counters:?}"
    );
    fixture.end()
}

pub fn version() -> Result<()> {
    let fixture = Fixture::one()?;
    let table = fixture.manager()?.mount(0)?.table();
    grant_root(&fixture, 1)?;
    let there = |name: &str| fixture.path(0, name).exists();
    ensure!(there("f0") && !there("new"), "names at first");
    ensure!(there("f0") && !there("new"), "names from the cache");
    let lookups = fixture.control.block().lookups.load(SeqCst);
    // Back with the same version: the names are still right.
    table.revoke(ROOT, Mode::None, true);
    grant_root(&fixture, 1)?;
    ensure!(there("f0") && !there("new"), "names after the lease came back");
    ensure_eq!(fixture.control.block().lookups.load(SeqCst), lookups, "lookups");
    // Another mount makes one name and removes one.
    table.revoke(ROOT, Mode::None, true);
    let made = fixture.control.create("new", 0o600)?;
    fixture.control.remove(ino(0));
    ensure!(there("new"), "a new name without a lease");
    grant_root(&fixture, 2)?;
    ensure!(!there("f0") && there("new"), "names of the new version");
    fixture.control.remove(made);
    // Not told: under the lease the kernel need not ask.
    ensure!(there("new"), "a name that the lease keeps");
    table.revoke(ROOT, Mode::None, true);
    ensure!(!there("new"), "a name without a lease");
    fixture.end()
}

pub fn attributes() -> Result<()> {
    let fixture = Fixture::two()?;
    for round in 0..20u32 {
        let (me, other) = ((round % 2) as usize, (1 - round % 2) as usize);
        let mode = 0o600 | round;
        fs::set_permissions(fixture.path(me, "f0"), fs::Permissions::from_mode(mode))?;
        let meta = fs::metadata(fixture.path(other, "f0"))?;
        ensure_eq!(meta.mode() & 0o7777, mode, "mode in round {round}");
        let file = fixture.open(me, "f0")?;
        file.write_all_at(&round.to_le_bytes(), 0)?;
        let mine = file.metadata()?;
        let theirs = fs::metadata(fixture.path(other, "f0"))?;
        let times = |meta: &fs::Metadata| (meta.mtime(), meta.mtime_nsec());
        ensure_eq!(times(&theirs), times(&mine), "mtime in round {round}");
        let again = fs::metadata(fixture.path(me, "f0"))?;
        ensure_eq!(times(&again), times(&mine), "mtime once more in round {round}");
    }
    fixture.end()
}

/// Where stat is left to FUSE, which shows the mode of its server's last answer. Nothing that would bring another goes
/// before it: it is asked of an open file.
pub fn mode() -> Result<()> {
    let mut fixture = Fixture::new(2, None)?;
    fixture.attach(&Options { stat: false, ..all() })?;
    let open = [fixture.open(0, "f0")?, fixture.open(1, "f0")?];
    for round in 0..20u32 {
        let [me, other] = [&open[(round % 2) as usize], &open[(1 - round % 2) as usize]];
        let mode = 0o600 | round;
        me.set_permissions(fs::Permissions::from_mode(mode))?;
        for (whose, file) in [("its own", me), ("the other mount's", other)] {
            ensure_eq!(
                file.metadata()?.mode() & 0o7777,
                mode,
                "{whose} mode in round {round}"
            );
        }
    }
    drop(open);
    fixture.end()
}

/// A name that the kernel knew not to be there, made by one thread and opened by another at once.
pub fn born() -> Result<()> {
    let fixture = Fixture::one()?;
    grant_root(&fixture, 1)?;
    let path = fixture.path(0, "born");
    let counters = || -> Result<_> { Ok(fixture.manager()?.mount(0)?.counters()) };
    for round in 0..300 {
        ensure!(!path.exists(), "there before it is made in round {round}");
        let file = std::thread::scope(|scope| {
            let opened = scope.spawn(|| {
                loop {
                    match OpenOptions::new().read(true).write(true).open(&path) {
                        Err(e) if e.kind() == ErrorKind::NotFound => {}
                        result => break result,
                    }
                }
            });
            fs::write(&path, b"made")?;
            Ok::<_, anyhow::Error>(opened.join().map_err(|_| anyhow!("the opener panicked"))??)
        })?;
        let before = counters()?;
        file.write_all_at(b"more", 4)?;
        let after = counters()?;
        ensure!(
            after.hits + after.misses > before.hits + before.misses,
            "written without a lease in round {round}: {after:?}"
        );
        fs::remove_file(&path)?;
    }
    fixture.end()
}

pub fn chmod() -> Result<()> {
    let fixture = Fixture::two()?;
    for round in 0..10 {
        let (me, other) = (round % 2, 1 - round % 2);
        for (mode, allowed) in [(0o600, false), (0o666, true), (0o604, false)] {
            fs::set_permissions(fixture.path(me, "f0"), fs::Permissions::from_mode(mode))?;
            let done = Command::new(std::env::current_exe()?)
                .arg("touch")
                .arg("read")
                .arg(fixture.path(other, "f0"))
                .uid(1000)
                .gid(1000)
                .stderr(Stdio::null())
                .status()?;
            ensure_eq!(
                done.success(),
                allowed,
                "opened with mode {mode:o} in round {round}"
            );
        }
    }
    fixture.end()
}
