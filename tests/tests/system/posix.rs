//! Details of POSIX.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rustix::fs::RenameFlags;
use system_tests::cluster::{Cache, Options};
use system_tests::guard;
use system_tests::sys::{self, errno};

const NOBODY: u32 = 65534;

/// Runs a check with a folder seen through two mounts, in both cache modes.
fn check(job: fn(&Path, &Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    for cache in [Cache::Writethrough, Cache::Direct] {
        guard::with_cluster(
            Options {
                cache,
                storage: 1,
                ..Options::default()
            },
            move |cluster| job(&cluster.mount(0), &cluster.mount(1)).with_context(|| format!("{cache:?}")),
        )?;
    }
    Ok(())
}

fn mode(path: &Path, mode: u32) -> anyhow::Result<()> {
    Ok(fs::set_permissions(path, Permissions::from_mode(mode))?)
}

fn bits(path: &Path) -> anyhow::Result<u32> {
    Ok(path.symlink_metadata()?.mode() & 0o7777)
}

fn is(what: &str, got: i32, want: i32) -> anyhow::Result<()> {
    ensure!(got == want, "{what}: errno {got} instead of {want}");
    Ok(())
}

#[test]
fn names_and_links() -> anyhow::Result<()> {
    check(|a, b| {
        let dir = a.join("d");
        fs::create_dir(&dir)?;
        ensure!(
            b.join("d").metadata()?.nlink() == 2,
            "links of an empty directory"
        );
        fs::create_dir(dir.join("sub"))?;
        ensure!(
            b.join("d").metadata()?.nlink() == 3,
            "links with one subdirectory"
        );
        File::create(dir.join("f"))?;
        is(
            "rmdir of a full directory",
            errno(&fs::remove_dir(b.join("d"))),
            libc::ENOTEMPTY,
        )?;
        is(
            "unlink of a directory",
            errno(&fs::remove_file(b.join("d"))),
            libc::EISDIR,
        )?;
        is(
            "rmdir of a file",
            errno(&fs::remove_dir(b.join("d/f"))),
            libc::ENOTDIR,
        )?;
        is(
            "a file as a directory",
            errno(&fs::metadata(b.join("d/f/x"))),
            libc::ENOTDIR,
        )?;
        is(
            "hard link of a directory",
            errno(&fs::hard_link(&dir, a.join("l"))),
            libc::EPERM,
        )?;
        is(
            "mkdir over a file",
            errno(&fs::create_dir(b.join("d/f"))),
            libc::EEXIST,
        )?;
        symlink("loop2", a.join("loop1"))?;
        symlink("loop1", a.join("loop2"))?;
        is(
            "a loop of links",
            errno(&fs::metadata(b.join("loop1"))),
            libc::ELOOP,
        )?;
        is(
            "O_NOFOLLOW",
            errno(&sys::open(&b.join("loop1"), libc::O_NOFOLLOW)),
            libc::ELOOP,
        )?;
        is(
            "O_DIRECTORY",
            errno(&sys::open(&b.join("d/f"), libc::O_DIRECTORY)),
            libc::ENOTDIR,
        )?;
        is(
            "write to a directory",
            errno(&sys::open(&dir, libc::O_WRONLY)),
            libc::EISDIR,
        )?;
        let exclusive = libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY;
        is(
            "O_EXCL on a link",
            errno(&sys::open(&b.join("loop1"), exclusive)),
            libc::EEXIST,
        )?;
        fs::rename(dir.join("sub"), a.join("sub"))?;
        ensure!(
            b.join("d").metadata()?.nlink() == 2,
            "links after the subdirectory has gone"
        );
        is(
            "rename over a full one",
            errno(&fs::rename(a.join("sub"), &dir)),
            libc::ENOTEMPTY,
        )?;
        is(
            "directory over file",
            errno(&fs::rename(a.join("sub"), dir.join("f"))),
            libc::ENOTDIR,
        )?;
        is(
            "file over directory",
            errno(&fs::rename(dir.join("f"), a.join("sub"))),
            libc::EISDIR,
        )
    })
}

#[test]
fn rename_flags() -> anyhow::Result<()> {
    check(|a, b| {
        fs::write(a.join("x"), b"x")?;
        fs::write(a.join("y"), b"y")?;
        let taken = sys::rename2(&b.join("x"), &b.join("y"), RenameFlags::NOREPLACE);
        is("NOREPLACE over a file", errno(&taken), libc::EEXIST)?;
        sys::rename2(&b.join("x"), &b.join("z"), RenameFlags::NOREPLACE)?;
        ensure!(fs::read(a.join("z"))? == b"x", "NOREPLACE to a free name");
        sys::rename2(&a.join("z"), &a.join("y"), RenameFlags::EXCHANGE)?;
        ensure!(
            fs::read(b.join("z"))? == b"y" && fs::read(b.join("y"))? == b"x",
            "EXCHANGE"
        );
        fs::create_dir_all(a.join("d/sub"))?;
        sys::rename2(&b.join("d/sub"), &b.join("y"), RenameFlags::EXCHANGE)?;
        ensure!(
            a.join("y").is_dir() && fs::read(a.join("d/sub"))? == b"x",
            "EXCHANGE of unlike kinds"
        );
        ensure!(
            a.join("d").metadata()?.nlink() == 2,
            "links after a directory was exchanged"
        );
        let missing = sys::rename2(&a.join("z"), &a.join("no"), RenameFlags::EXCHANGE);
        is("EXCHANGE with nothing", errno(&missing), libc::ENOENT)
    })
}

#[test]
fn permissions_of_another_user() -> anyhow::Result<()> {
    check(|a, b| {
        mode(a, 0o755)?;
        fs::create_dir(a.join("private"))?;
        mode(&a.join("private"), 0o700)?;
        fs::write(a.join("private/f"), b"x")?;
        fs::write(a.join("readable"), b"x")?;
        mode(&a.join("readable"), 0o644)?;
        let b = b.to_owned();
        let got: Vec<i32> = sys::as_user(NOBODY, NOBODY, || {
            vec![
                errno(&fs::read_dir(b.join("private"))),
                errno(&fs::read(b.join("private/f"))),
                errno(&fs::read(b.join("readable"))),
                errno(&sys::open(&b.join("readable"), libc::O_WRONLY)),
                errno(&File::create(b.join("new"))),
                errno(&fs::set_permissions(
                    b.join("readable"),
                    Permissions::from_mode(0o666),
                )),
                errno(&chown(b.join("readable"), Some(NOBODY), None)),
                errno(&sys::utimens(&b.join("readable"), (1, 1), (1, 1))),
                errno(&fs::remove_file(b.join("readable"))),
                errno(&fs::rename(b.join("readable"), b.join("other"))),
            ]
        })?;
        use libc::{EACCES, EPERM};
        let want = [
            EACCES, EACCES, 0, EACCES, EACCES, EPERM, EPERM, EPERM, EACCES, EACCES,
        ];
        ensure!(got == want, "{got:?} instead of {want:?}");
        fs::create_dir(a.join("open"))?;
        mode(&a.join("open"), 0o777)?;
        sys::as_user(NOBODY, NOBODY, || fs::write(b.join("open/mine"), b"mine"))??;
        let mine = a.join("open/mine").metadata()?;
        ensure!(
            (mine.uid(), mine.gid()) == (NOBODY, NOBODY),
            "owner of the new file"
        );
        Ok(())
    })
}

#[test]
fn sticky_directory() -> anyhow::Result<()> {
    check(|a, b| {
        fs::create_dir(a.join("tmp"))?;
        mode(&a.join("tmp"), 0o1777)?;
        fs::write(a.join("tmp/roots"), b"x")?;
        mode(&a.join("tmp/roots"), 0o666)?;
        let roots = b.join("tmp/roots");
        let refused = sys::as_user(NOBODY, NOBODY, || errno(&fs::remove_file(&roots)))?;
        is("unlink of another's file", refused, libc::EPERM)?;
        let refused = sys::as_user(NOBODY, NOBODY, || errno(&fs::rename(&roots, b.join("tmp/n"))))?;
        is("rename of another's file", refused, libc::EPERM)?;
        let own = b.join("tmp/own");
        sys::as_user(NOBODY, NOBODY, || {
            fs::write(&own, b"x").and_then(|()| fs::remove_file(&own))
        })??;
        Ok(())
    })
}

#[test]
fn setgid_directory() -> anyhow::Result<()> {
    check(|a, b| {
        let dir = a.join("team");
        fs::create_dir(&dir)?;
        chown(&dir, None, Some(777))?;
        mode(&dir, 0o2775)?;
        fs::write(b.join("team/f"), b"x")?;
        fs::create_dir(b.join("team/sub"))?;
        symlink("f", b.join("team/l"))?;
        ensure!(dir.join("f").metadata()?.gid() == 777, "group of a file");
        ensure!(dir.join("l").symlink_metadata()?.gid() == 777, "group of a link");
        ensure!(dir.join("sub").metadata()?.gid() == 777, "group of a directory");
        ensure!(bits(&dir.join("f"))? & 0o2000 == 0, "setgid inherited by a file");
        ensure!(
            bits(&dir.join("sub"))? & 0o2000 != 0,
            "setgid not inherited by a directory"
        );
        // On the mount where the mode was changed, too, and where it is changed back.
        fs::create_dir(dir.join("sub2"))?;
        ensure!(
            bits(&b.join("team/sub2"))? & 0o2000 != 0,
            "setgid not inherited at once"
        );
        mode(&dir, 0o775)?;
        fs::create_dir(b.join("team/sub3"))?;
        ensure!(
            bits(&dir.join("sub3"))? & 0o2000 == 0,
            "setgid inherited from a bit taken away"
        );
        Ok(())
    })
}

#[test]
fn set_id_bits_are_cleared() -> anyhow::Result<()> {
    check(|a, b| {
        let (a, b) = (a.join("f"), b.join("f"));
        fs::write(&a, b"x")?;
        // An unprivileged writer clears both bits.
        chown(&a, Some(NOBODY), Some(NOBODY))?;
        mode(&a, 0o6777)?;
        ensure!(bits(&b)? == 0o6777, "bits as set: {:o}", bits(&b)?);
        sys::as_user(1000, 1000, || {
            sys::open(&b, libc::O_WRONLY).and_then(|f| f.write_all_at(b"y", 0))
        })??;
        ensure!(bits(&a)? == 0o777, "bits after a write: {:o}", bits(&a)?);
        mode(&a, 0o6777)?;
        sys::as_user(1000, 1000, || sys::truncate(&b, 0))??;
        ensure!(bits(&a)? == 0o777, "bits after a truncation: {:o}", bits(&a)?);
        let (keep, punch) = (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE);
        for how in [0, keep, keep | punch] {
            mode(&a, 0o6777)?;
            sys::as_user(1000, 1000, || {
                sys::open(&b, libc::O_WRONLY).and_then(|f| sys::fallocate(&f, how, 0, 8192))
            })??;
            ensure!(bits(&a)? == 0o777, "bits after fallocate {how}: {:o}", bits(&a)?);
        }
        fs::write(b.with_file_name("source"), b"source")?;
        mode(&a, 0o6777)?;
        sys::as_user(1000, 1000, || {
            let source = File::open(b.with_file_name("source"))?;
            sys::copy_range(&source, 0, &sys::open(&b, libc::O_WRONLY)?, 0, 6)
        })??;
        ensure!(bits(&a)? == 0o777, "bits after a copy: {:o}", bits(&a)?);
        mode(&a, 0o6777)?;
        sys::fallocate(&sys::open(&b, libc::O_WRONLY)?, 0, 0, 8192)?;
        ensure!(
            bits(&a)? == 0o6777,
            "bits after root's fallocate: {:o}",
            bits(&a)?
        );
        // Even root's change of owner does.
        mode(&a, 0o6777)?;
        chown(&b, Some(1000), Some(1000))?;
        ensure!(
            bits(&a)? == 0o777,
            "bits after a change of owner: {:o}",
            bits(&a)?
        );
        Ok(())
    })
}

#[test]
fn times_have_nanoseconds_and_order() -> anyhow::Result<()> {
    check(|a, b| {
        let (fa, fb) = (a.join("f"), b.join("f"));
        fs::write(&fa, b"x")?;
        for mtime in [
            (1_700_000_000, 1),
            (0, 0),
            (-1000, 999_999_999),
            (5_000_000_000, 123),
        ] {
            sys::utimens(&fa, mtime, mtime)?;
            let seen = fb.metadata()?;
            ensure!(
                (seen.mtime(), seen.mtime_nsec()) == mtime,
                "{mtime:?} became {} {}",
                seen.mtime(),
                seen.mtime_nsec()
            );
        }
        let before = fb.metadata()?;
        mode(&fa, 0o600)?;
        let after = fb.metadata()?;
        let ctime = |m: &fs::Metadata| (m.ctime(), m.ctime_nsec());
        ensure!(ctime(&after) >= ctime(&before), "ctime goes back");
        ensure!(
            (after.mtime(), after.mtime_nsec()) == (5_000_000_000, 123),
            "chmod moved mtime"
        );
        let dir = b.metadata()?.modified()?;
        std::thread::sleep(std::time::Duration::from_millis(20));
        File::create(a.join("g"))?;
        ensure!(
            b.metadata()?.modified()? > dir,
            "mtime of a directory after a create"
        );
        Ok(())
    })
}

#[test]
fn unlinked_files_live_while_open() -> anyhow::Result<()> {
    check(|a, b| {
        let mut file = sys::open(&a.join("f"), libc::O_RDWR | libc::O_CREAT)?;
        let far = File::open(b.join("f"))?;
        fs::remove_file(b.join("f"))?;
        file.write_all(&[7; 100_000])?;
        ensure!(sys::read_at(&file, 0, 200_000)? == [7; 100_000], "own handle");
        ensure!(
            sys::read_at(&far, 0, 200_000)? == [7; 100_000],
            "handle of another mount"
        );
        file.set_len(10)?;
        ensure!(
            far.metadata()?.len() == 10 && far.metadata()?.nlink() == 0,
            "attributes"
        );
        drop(file);
        ensure!(sys::read_at(&far, 0, 100)? == [7; 10], "after one of two closes");
        fs::write(a.join("f"), b"another")?;
        ensure!(
            sys::read_at(&far, 0, 100)? == [7; 10],
            "beside a new file of this name"
        );
        Ok(())
    })
}

#[test]
fn special_files() -> anyhow::Result<()> {
    check(|a, b| {
        sys::mknod(&a.join("fifo"), libc::S_IFIFO | 0o644, 0)?;
        ensure!(b.join("fifo").symlink_metadata()?.file_type().is_fifo(), "a fifo");
        sys::mknod(&a.join("sock"), libc::S_IFSOCK | 0o644, 0)?;
        ensure!(
            b.join("sock").symlink_metadata()?.file_type().is_socket(),
            "a socket"
        );
        sys::mknod(&a.join("null"), libc::S_IFCHR | 0o666, libc::makedev(1, 3))?;
        let null = b.join("null").symlink_metadata()?;
        ensure!(
            null.file_type().is_char_device() && null.rdev() == libc::makedev(1, 3),
            "a device"
        );
        // A fifo is local to a node, and works on it.
        let fifo = b.join("fifo");
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| fs::read(&fifo));
            fs::write(&fifo, b"through")?;
            let got = reader.join().map_err(|_| anyhow::anyhow!("reader"))??;
            ensure!(got == b"through", "content of the fifo");
            Ok(())
        })
    })
}

#[test]
fn xattr_limits() -> anyhow::Result<()> {
    check(|a, b| {
        let (fa, fb) = (a.join("f"), b.join("f"));
        fs::write(&fa, b"x")?;
        for name in ["user.a", "trusted.a", "security.a"] {
            sys::setxattr(&fa, name, b"v", 0).with_context(|| name.to_owned())?;
            ensure!(sys::getxattr(&fb, name)? == b"v", "{name}");
        }
        sys::setxattr(&fa, &format!("user.{}", "n".repeat(250)), b"v", 0).context("longest name")?;
        let long = sys::setxattr(&fa, &format!("user.{}", "n".repeat(251)), b"v", 0);
        is("a name too long", errno(&long), libc::ERANGE)?;
        let big = sys::setxattr(&fa, "user.big", &vec![1; 65_537], 0);
        is("a value too long", errno(&big), libc::E2BIG)?;
        let twice = sys::setxattr(&fb, "user.a", b"w", libc::XATTR_CREATE);
        is("XATTR_CREATE of one there", errno(&twice), libc::EEXIST)?;
        let none = sys::setxattr(&fb, "user.none", b"w", libc::XATTR_REPLACE);
        is("XATTR_REPLACE of none", errno(&none), libc::ENODATA)?;
        let other = sys::as_user(NOBODY, NOBODY, || {
            errno(&sys::setxattr(&fb, "trusted.b", b"v", 0))
        })?;
        is("trusted by another user", other, libc::EPERM)?;
        let other = sys::as_user(NOBODY, NOBODY, || errno(&sys::setxattr(&fb, "user.b", b"v", 0)))?;
        is("user by another user", other, libc::EACCES)
    })
}

#[test]
fn statfs_is_sane() -> anyhow::Result<()> {
    check(|a, b| {
        let free = |path: &PathBuf| rustix::fs::statvfs(path).map(|s| s.f_bfree * s.f_frsize);
        let (a, b) = (a.to_owned(), b.to_owned());
        let all = rustix::fs::statvfs(&a)?;
        ensure!(
            all.f_blocks * all.f_frsize == 128 << 20,
            "size {}",
            all.f_blocks * all.f_frsize
        );
        ensure!(
            all.f_bfree <= all.f_blocks && all.f_bavail <= all.f_bfree,
            "free {} of {}",
            all.f_bfree,
            all.f_blocks
        );
        let most = u64::from(u32::MAX);
        ensure!(
            all.f_files <= most && all.f_blocks <= most,
            "not for 32-bit programs: {} inodes, {} blocks",
            all.f_files,
            all.f_blocks
        );
        ensure!(all.f_namemax == 255, "longest name {}", all.f_namemax);
        let before = free(&b)?;
        let file = File::create(a.join("f"))?;
        file.write_all_at(&vec![1; 8 << 20], 0)?;
        file.sync_all()?;
        let used = before - free(&b)?;
        ensure!((8 << 20..12 << 20).contains(&used), "8 MiB use {used}");
        drop(file);
        fs::remove_file(a.join("f"))?;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while free(&b)? < before {
            ensure!(
                std::time::Instant::now() < deadline,
                "space does not come back: {} of {before}",
                free(&b)?
            );
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        Ok(())
    })
}
