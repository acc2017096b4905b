//! Names, directories, links.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Barrier;

use anyhow::ensure;

use super::{Pair, pattern, same};
use crate::sys;

fn absent(path: &Path) -> anyhow::Result<()> {
    let errno = sys::errno(&path.symlink_metadata());
    ensure!(
        errno == libc::ENOENT,
        "{}: errno {errno} instead of ENOENT",
        path.display()
    );
    Ok(())
}

fn list(path: &Path) -> anyhow::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

pub(super) fn create_unlink(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    for i in 0..4 {
        absent(&b)?;
        fs::write(&a, pattern(round, i, 100))?;
        same("content of the new file", &fs::read(&b)?, &pattern(round, i, 100))?;
        fs::remove_file(&a)?;
        absent(&b)?;
        let errno = sys::errno(&File::open(&b));
        ensure!(errno == libc::ENOENT, "open after unlink: errno {errno}");
        // The other way in the same turn: a name cached as absent must appear.
        fs::write(&b, b"back")?;
        same("created by the observer", &fs::read(&a)?, b"back")?;
        fs::remove_file(&a)?;
    }
    Ok(())
}

fn race(pair: &Pair, job: impl Fn(&Path) -> i32 + Sync, name: &str) -> anyhow::Result<()> {
    let (a, b) = pair.both(name);
    let barrier = Barrier::new(4);
    let run = |path| {
        barrier.wait();
        job(path)
    };
    let run = &run;
    let results: Vec<i32> = std::thread::scope(|scope| {
        let threads: Vec<_> = [&a, &b, &a, &b]
            .map(|path| scope.spawn(move || run(path)))
            .into_iter()
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or(-2)).collect()
    });
    let won = results.iter().filter(|r| **r == 0).count();
    let lost = results.iter().filter(|r| **r == libc::EEXIST).count();
    ensure!(
        (won, lost) == (1, 3),
        "errnos {results:?}: exactly one must win, the others get EEXIST"
    );
    Ok(())
}

pub(super) fn exclusive_race(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    race(
        pair,
        |path| sys::errno(&sys::open(path, flags)),
        &format!("x{round}"),
    )
}

pub(super) fn mkdir_race(pair: &Pair, round: usize) -> anyhow::Result<()> {
    race(
        pair,
        |path| sys::errno(&fs::create_dir(path)),
        &format!("d{round}"),
    )
}

pub(super) fn rename_over(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let (a2, b2) = pair.both("new");
    fs::write(&a, b"old")?;
    for i in 0..4 {
        let old = b.metadata()?.ino();
        fs::write(&a2, pattern(round, i, 500))?;
        fs::rename(&a2, &a)?;
        same("by the replaced name", &fs::read(&b)?, &pattern(round, i, 500))?;
        ensure!(b.metadata()?.ino() != old, "the replaced inode is still found");
        absent(&b2)?;
    }
    Ok(())
}

pub(super) fn rename_directory(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("dir");
    let (a2, b2) = pair.both("moved");
    fs::create_dir_all(a.join("sub"))?;
    fs::write(a.join("sub/f"), pattern(round, 0, 99))?;
    ensure!(fs::read(b.join("sub/f"))?.len() == 99, "before");
    fs::rename(&a, &a2)?;
    absent(&b)?;
    absent(&b.join("sub/f"))?;
    same(
        "at the new place",
        &fs::read(b2.join("sub/f"))?,
        &pattern(round, 0, 99),
    )?;
    // Into another directory: `..` and the link counts follow.
    fs::create_dir(&b)?;
    fs::rename(b2.join("sub"), b.join("sub"))?;
    same(
        "moved across",
        &fs::read(a.join("sub/f"))?,
        &pattern(round, 0, 99),
    )?;
    ensure!(
        a.join("sub/..").metadata()?.ino() == a.metadata()?.ino(),
        "parent of the moved directory"
    );
    ensure!(
        a.metadata()?.nlink() == 3,
        "links of the new parent: {}",
        a.metadata()?.nlink()
    );
    ensure!(
        a2.metadata()?.nlink() == 2,
        "links of the old parent: {}",
        a2.metadata()?.nlink()
    );
    let into_itself = sys::errno(&fs::rename(&a, a.join("sub/x")));
    ensure!(
        into_itself == libc::EINVAL,
        "rename into itself: errno {into_itself}"
    );
    Ok(())
}

pub(super) fn readdir(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("dir");
    fs::create_dir(&a)?;
    let mut want = Vec::new();
    for i in 0..6 {
        let name = format!("n{round}-{i}");
        fs::write(a.join(&name), b"")?;
        want.push(name);
        ensure!(
            list(&b)? == want,
            "after a create: {:?} instead of {want:?}",
            list(&b)?
        );
    }
    while let Some(name) = want.pop() {
        fs::remove_file(a.join(name))?;
        ensure!(
            list(&b)? == want,
            "after an unlink: {:?} instead of {want:?}",
            list(&b)?
        );
    }
    fs::remove_dir(&a)?;
    absent(&b)
}

pub(super) fn readdir_many(pair: &Pair, _round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("many");
    fs::create_dir(&a)?;
    let mut want: Vec<String> = (0..500)
        .map(|i| format!("a-name-that-fills-pages-{i:04}"))
        .collect();
    for name in &want {
        File::create(a.join(name))?;
    }
    ensure!(list(&b)? == want, "{} of {} names", list(&b)?.len(), want.len());
    want.retain(|name| !name.ends_with('7'));
    for i in (7..500).step_by(10) {
        fs::remove_file(b.join(format!("a-name-that-fills-pages-{i:04}")))?;
    }
    ensure!(
        list(&a)? == want,
        "{} of {} names after removals",
        list(&a)?.len(),
        want.len()
    );
    Ok(())
}

pub(super) fn symlinks(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("link");
    for i in 0..3 {
        let target = format!("target-{round}-{i}");
        std::os::unix::fs::symlink(&target, &a)?;
        ensure!(
            fs::read_link(&b)? == Path::new(&target),
            "target {:?}",
            fs::read_link(&b)?
        );
        ensure!(
            b.symlink_metadata()?.len() == target.len() as u64,
            "size of a link"
        );
        fs::write(a.with_file_name(&target), b"through")?;
        same("through the link", &fs::read(&b)?, b"through")?;
        fs::remove_file(&a)?;
        absent(&b)?;
    }
    Ok(())
}

pub(super) fn hard_links(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    let (a2, b2) = pair.both("g");
    fs::write(&a, pattern(round, 0, 10))?;
    ensure!(b.metadata()?.nlink() == 1, "one link");
    fs::hard_link(&a, &a2)?;
    ensure!(
        b.metadata()?.nlink() == 2,
        "{} links instead of 2",
        b.metadata()?.nlink()
    );
    ensure!(b2.metadata()?.ino() == b.metadata()?.ino(), "two inodes");
    fs::write(&b2, pattern(round, 1, 20))?;
    same("by the other name", &fs::read(&a)?, &pattern(round, 1, 20))?;
    fs::remove_file(&b)?;
    ensure!(
        a2.metadata()?.nlink() == 1,
        "{} links instead of 1",
        a2.metadata()?.nlink()
    );
    absent(&a)
}

pub(super) fn unlinked_open(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 5000))?;
    let reader = File::open(&b)?;
    let writer = sys::open(&b, libc::O_WRONLY)?;
    let far = sys::open(&a, libc::O_RDONLY)?;
    fs::remove_file(&a)?;
    absent(&b)?;
    same(
        "after the unlink",
        &sys::read_at(&reader, 0, 9000)?,
        &pattern(round, 0, 5000),
    )?;
    writer.write_all_at(&pattern(round, 1, 100), 10)?;
    same(
        "written after the unlink",
        &sys::read_at(&reader, 10, 100)?,
        &pattern(round, 1, 100),
    )?;
    same(
        "on the other mount",
        &sys::read_at(&far, 10, 100)?,
        &pattern(round, 1, 100),
    )?;
    ensure!(
        far.metadata()?.nlink() == 0,
        "links of an unlinked file: {}",
        far.metadata()?.nlink()
    );
    drop((reader, writer));
    same(
        "by the last handle",
        &sys::read_at(&far, 10, 100)?,
        &pattern(round, 1, 100),
    )
}

pub(super) fn replaced_open(pair: &Pair, round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("f");
    fs::write(&a, pattern(round, 0, 3000))?;
    let old = File::open(&b)?;
    fs::write(a.with_file_name("new"), pattern(round, 1, 3000))?;
    fs::rename(a.with_file_name("new"), &a)?;
    same(
        "old handle",
        &sys::read_at(&old, 0, 9000)?,
        &pattern(round, 0, 3000),
    )?;
    same("new handle", &fs::read(&b)?, &pattern(round, 1, 3000))?;
    ensure!(old.metadata()?.nlink() == 0, "links of the replaced file");
    Ok(())
}
