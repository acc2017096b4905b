//! Data, size, times, mode, xattrs.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, ensure};

use super::{Pair, pattern, same};
use crate::{guard, sys};

pub(super) fn overwrite(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 8192))?;
    let reader = File::open(&b)?;
    same(
        "first content",
        &sys::read_at(&reader, 0, 9000)?,
        &pattern(round, 0, 8192),
    )?;
    let writer = sys::open(&a, libc::O_WRONLY)?;
    for i in 1..5 {
        let new = pattern(round, i, 4096);
        writer.write_all_at(&new, 1000)?;
        same(
            "through a handle opened before",
            &sys::read_at(&reader, 1000, 4096)?,
            &new,
        )?;
        same("through a new handle", &fs::read(&b)?[1000..5096], &new)?;
        same("on the writer's side", &fs::read(&a)?[1000..5096], &new)?;
    }
    Ok(())
}

pub(super) fn ping_pong(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, vec![0; 4096])?;
    let writers = [sys::open(&a, libc::O_WRONLY)?, sys::open(&b, libc::O_WRONLY)?];
    let readers = [File::open(&a)?, File::open(&b)?];
    for i in 0..8 {
        let new = pattern(round, i, 4096);
        writers[i % 2].write_all_at(&new, 0)?;
        for side in [1 - i % 2, i % 2] {
            let got = sys::read_at(&readers[side], 0, 4096)?;
            same(&format!("write {i}, seen at side {side}"), &got, &new)?;
        }
    }
    Ok(())
}

pub(super) fn append(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let mut writer = sys::open(&a, libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND)?;
    let reader = File::open(&b)?;
    let mut want = Vec::new();
    for i in 0..6 {
        let piece = pattern(round, i, 700 * (i + 1));
        writer.write_all(&piece)?;
        want.extend_from_slice(&piece);
        ensure!(
            b.metadata()?.len() == want.len() as u64,
            "stat: size after append {i}"
        );
        same(
            "read after append",
            &sys::read_at(&reader, 0, want.len() + 10)?,
            &want,
        )?;
    }
    Ok(())
}

pub(super) fn append_both(pair: &Pair, round: usize) -> anyhow::Result<()> {
    const EACH: usize = 40;
    let (a, b) = pair.both("f");
    File::create(&a)?;
    let paths = [&a, &b];
    guard::together(paths.len(), |side| {
        let mut file = sys::open(paths[side], libc::O_WRONLY | libc::O_APPEND)?;
        for i in 0..EACH {
            file.write_all(format!("{side} {i:03} {round:07}\n").as_bytes())?;
        }
        Ok(())
    })?;
    for path in [&a, &b] {
        let text = fs::read_to_string(path)?;
        let lines: Vec<&str> = text.lines().collect();
        ensure!(
            lines.len() == 2 * EACH,
            "{} records instead of {}",
            lines.len(),
            2 * EACH
        );
        for side in 0..2 {
            let mine = lines.iter().filter(|l| l.starts_with(&format!("{side} ")));
            let want = (0..EACH).map(|i| format!("{side} {i:03} {round:07}"));
            ensure!(
                mine.copied().eq(want),
                "records of side {side} lost, torn or out of order"
            );
        }
    }
    Ok(())
}

pub(super) fn shrink(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let full = pattern(round, 0, 20_000);
    fs::write(&a, &full)?;
    let reader = File::open(&b)?;
    same("before", &sys::read_at(&reader, 0, 30_000)?, &full)?;
    sys::truncate(&a, 5001)?;
    ensure!(reader.metadata()?.len() == 5001, "fstat after truncate");
    same("after", &sys::read_at(&reader, 0, 30_000)?, &full[..5001])?;
    ensure!(
        sys::read_at(&reader, 6000, 100)?.is_empty(),
        "data behind the end"
    );
    // What was cut off must not come back.
    sys::truncate(&b, 9000)?;
    let mut want = full[..5001].to_vec();
    want.resize(9000, 0);
    same("cut and grown", &fs::read(&a)?, &want)
}

pub(super) fn grow(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let mut want = pattern(round, 0, 100);
    fs::write(&a, &want)?;
    let reader = File::open(&b)?;
    same("before", &sys::read_at(&reader, 0, 30_000)?, &want)?;
    let writer = sys::open(&a, libc::O_WRONLY)?;
    writer.set_len(10_000)?;
    want.resize(10_000, 0);
    same("grown", &sys::read_at(&reader, 0, 30_000)?, &want)?;
    writer.write_all_at(b"tail", 20_000)?;
    want.resize(20_000, 0);
    want.extend_from_slice(b"tail");
    same(
        "written behind the end",
        &sys::read_at(&reader, 0, 30_000)?,
        &want,
    )
}

pub(super) fn open_truncates(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 9000))?;
    let reader = File::open(&b)?;
    ensure!(sys::read_at(&reader, 0, 9000)?.len() == 9000, "before");
    let writer = sys::open(&a, libc::O_WRONLY | libc::O_TRUNC)?;
    ensure!(reader.metadata()?.len() == 0, "size after O_TRUNC");
    ensure!(
        sys::read_at(&reader, 0, 9000)?.is_empty(),
        "old data after O_TRUNC"
    );
    writer.write_all_at(b"new", 0)?;
    same("new content", &sys::read_at(&reader, 0, 100)?, b"new")
}

pub(super) fn size(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let writer = File::create(&a)?;
    let held = File::open(&b)?;
    for i in 1..8u64 {
        let end = i * 3333 + round as u64;
        writer.write_all_at(b"x", end - 1)?;
        ensure!(
            b.metadata()?.len() == end,
            "stat: {} instead of {end}",
            b.metadata()?.len()
        );
        ensure!(
            held.metadata()?.len() == end,
            "fstat: {} instead of {end}",
            held.metadata()?.len()
        );
        let seek = rustix::fs::seek(&held, rustix::fs::SeekFrom::End(0))?;
        ensure!(seek == end, "SEEK_END: {seek} instead of {end}");
    }
    Ok(())
}

pub(super) fn times(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, b"x")?;
    let nanos = 123_456_789 + round as i64;
    sys::utimens(&a, (1_000_000_007, nanos), (1_234_567_890, nanos + 1))?;
    let seen = b.metadata()?;
    ensure!(
        (seen.mtime(), seen.mtime_nsec()) == (1_234_567_890, nanos + 1),
        "mtime {seen:?}"
    );
    ensure!(
        (seen.atime(), seen.atime_nsec()) == (1_000_000_007, nanos),
        "atime {seen:?}"
    );
    sys::open(&a, libc::O_WRONLY)?.write_all_at(b"y", 0)?;
    let written = b.metadata()?.modified()?;
    ensure!(
        written > UNIX_EPOCH + Duration::from_secs(1_600_000_000),
        "mtime does not move with a write"
    );
    ensure!(a.metadata()?.modified()? == written, "two mounts, two times");
    std::thread::sleep(Duration::from_millis(2));
    sys::open(&b, libc::O_WRONLY)?.write_all_at(b"z", 0)?;
    let again = a.metadata()?.modified()?;
    ensure!(again >= written, "mtime goes back: {written:?} {again:?}");
    ensure!(
        b.metadata()?.modified()? == again,
        "two mounts, two times after the second write"
    );
    Ok(())
}

pub(super) fn mode_owner(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, b"x")?;
    let held = File::open(&b)?;
    for i in 0..4 {
        let mode = 0o600 + ((round + i) % 64) as u32;
        fs::set_permissions(&a, fs::Permissions::from_mode(mode))?;
        ensure!(b.metadata()?.mode() & 0o7777 == mode, "mode by path");
        ensure!(held.metadata()?.mode() & 0o7777 == mode, "mode by handle");
        let uid = 1000 + (round + i) as u32;
        std::os::unix::fs::chown(&a, Some(uid), Some(uid + 1))?;
        let seen = b.metadata()?;
        ensure!(
            (seen.uid(), seen.gid()) == (uid, uid + 1),
            "owner {} {}",
            seen.uid(),
            seen.gid()
        );
        ensure!(seen.ctime() >= seen.mtime(), "ctime before mtime");
    }
    // A right taken away counts at once.
    fs::set_permissions(&a, fs::Permissions::from_mode(0o600))?;
    let refused = sys::as_user(65534, 65534, || sys::errno(&File::open(&b)))?;
    ensure!(refused == libc::EACCES, "open without a right: errno {refused}");
    Ok(())
}

pub(super) fn xattrs(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, b"x")?;
    ensure!(
        sys::errno(&sys::getxattr(&b, "user.k")) == libc::ENODATA,
        "one there before it is set"
    );
    for i in 0..4 {
        let value = format!("{round} {i}");
        sys::setxattr(&a, "user.k", value.as_bytes(), 0)?;
        same("value", &sys::getxattr(&b, "user.k")?, value.as_bytes())?;
    }
    sys::setxattr(&b, "user.l", b"", libc::XATTR_CREATE)?;
    ensure!(
        sys::listxattr(&a)? == ["user.k", "user.l"],
        "list {:?}",
        sys::listxattr(&a)?
    );
    sys::removexattr(&a, "user.k")?;
    ensure!(
        sys::errno(&sys::getxattr(&b, "user.k")) == libc::ENODATA,
        "still there after removal"
    );
    ensure!(sys::listxattr(&b)? == ["user.l"], "list after removal");
    Ok(())
}

/// A mapping for reading; none where the mount refuses shared mappings (`mount.shared_mappings`), which is not incoherent.
fn mapped(file: &File) -> anyhow::Result<Option<sys::Map>> {
    match sys::Map::new(file, 16_384) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        map => Ok(Some(map.context("mmap")?)),
    }
}

pub(super) fn map_fresh(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 16_384))?;
    let reader = File::open(&b)?;
    let writer = sys::open(&a, libc::O_WRONLY)?;
    for i in 1..4 {
        let Some(map) = mapped(&reader)? else {
            return Ok(());
        };
        same(
            "mapping",
            &map.read(0, 16_384),
            &sys::read_at(&reader, 0, 16_384)?,
        )?;
        drop(map);
        let new = pattern(round, i, 6000);
        writer.write_all_at(&new, 3000)?;
        let Some(map) = mapped(&reader)? else {
            return Ok(());
        };
        same("fresh mapping after a remote write", &map.read(3000, 6000), &new)?;
    }
    Ok(())
}

pub(super) fn map_held(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 16_384))?;
    let Some(map) = mapped(&File::open(&b)?)? else {
        return Ok(());
    };
    let writer = sys::open(&a, libc::O_WRONLY)?;
    for i in 1..5 {
        same(
            "mapping",
            &map.read(12_000, 100),
            &pattern(round, 0, 16_384)[12_000..12_100],
        )?;
        let new = pattern(round, i, 6000);
        writer.write_all_at(&new, 3000)?;
        same("held mapping after a remote write", &map.read(3000, 6000), &new)?;
    }
    Ok(())
}

pub(super) fn map_written(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 16_384))?;
    let map = sys::Map::writable(&sys::open(&a, libc::O_RDWR)?, 16_384).context("mmap")?;
    let (reader, held) = (
        File::open(&b)?,
        sys::Map::new(&File::open(&b)?, 16_384).context("mmap")?,
    );
    for i in 1..5 {
        let new = pattern(round, i, 5000);
        map.write(6000, &new);
        same(
            "read after a store elsewhere",
            &sys::read_at(&reader, 6000, 5000)?,
            &new,
        )?;
        same("mapping after a store elsewhere", &held.read(6000, 5000), &new)?;
    }
    Ok(())
}

pub(super) fn map_in_turns(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 12_288))?;
    let maps = [&a, &b].map(|path| sys::Map::writable(&sys::open(path, libc::O_RDWR)?, 12_288));
    let [first, second] = maps;
    let (first, second) = (first.context("mmap")?, second.context("mmap")?);
    for i in 1..6 {
        // The same page, and one that only this side writes.
        first.write(100, &pattern(round, i, 300));
        same(
            "one side's store",
            &second.read(100, 300),
            &pattern(round, i, 300),
        )?;
        second.write(200, &pattern(round, i + 10, 100));
        second.write(9000, &pattern(round, i, 3000));
        same(
            "the other side's store",
            &first.read(200, 100),
            &pattern(round, i + 10, 100),
        )?;
        same("beside it", &first.read(100, 100), &pattern(round, i, 300)[..100])?;
        same("another page", &first.read(9000, 3000), &pattern(round, i, 3000))?;
    }
    same("the file", &fs::read(&a)?, &fs::read(&b)?)
}

pub(super) fn map_beside_write(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 8192))?;
    let map = sys::Map::writable(&sys::open(&a, libc::O_RDWR)?, 8192).context("mmap")?;
    let writer = sys::open(&b, libc::O_RDWR)?;
    for i in 1..5 {
        map.write(1000, &pattern(round, i, 50));
        writer.write_all_at(&pattern(round, i + 20, 50), 1050)?;
        same(
            "the store is not lost",
            &sys::read_at(&writer, 1000, 50)?,
            &pattern(round, i, 50),
        )?;
        same(
            "the write is seen",
            &map.read(1050, 50),
            &pattern(round, i + 20, 50),
        )?;
        // Cut and grown elsewhere: zeros, under the mapping as well.
        sys::truncate(&b, 4096 + 10)?;
        sys::truncate(&b, 8192)?;
        same("zeros after a cut", &map.read(5000, 100), &[0; 100])?;
        map.write(5000, &pattern(round, i, 100));
        same(
            "written again",
            &sys::read_at(&writer, 5000, 100)?,
            &pattern(round, i, 100),
        )?;
    }
    Ok(())
}
