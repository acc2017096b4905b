//! Random sequences of operations on the mounts and on a local directory: results and trees must be equal.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::sys;

/// Names that the sequences use: few, so that they meet.
const NAMES: &[&str] = &["a", "b", "c", "d", "d/a", "d/b", "d/e", "d/e/a", "e", "e/a"];
/// Files held open at the same time.
const HANDLES: usize = 4;
/// Largest offset.
const REACH: u64 = 100_000;

/// What to do; the same on both sides.
#[derive(Debug, Clone)]
enum Op {
    Create(usize, bool),
    Write(usize, u64, usize, u8),
    Append(usize, usize, u8),
    Read(usize, u64, usize),
    Truncate(usize, u64),
    Rename(usize, usize, u32),
    Link(usize, usize),
    Symlink(usize, usize),
    ReadLink(usize),
    Unlink(usize),
    Mkdir(usize),
    Rmdir(usize),
    Chmod(usize, u32),
    Chown(usize, u32),
    Times(usize, i64, i64),
    SetXattr(usize, u8, usize, i32),
    GetXattr(usize, u8),
    ListXattr(usize),
    RemoveXattr(usize, u8),
    Fallocate(usize, i32, u64, u64),
    Readdir(usize),
    Stat(usize),
    Access(usize),
    Hold(usize, usize, i32),
    HeldWrite(usize, u64, usize, u8),
    HeldRead(usize, u64, usize),
    HeldStat(usize),
    HeldTruncate(usize, u64),
    HeldSeek(usize, u64),
    HeldSync(usize),
    Release(usize),
}

fn draw(rng: &mut StdRng) -> Op {
    let name = rng.random_range(0..NAMES.len());
    let other = rng.random_range(0..NAMES.len());
    let slot = rng.random_range(0..HANDLES);
    let at = rng.random_range(0..REACH);
    let len = rng.random_range(0..20_000);
    let byte = rng.random_range(1..=255);
    let key = rng.random_range(0..3);
    match rng.random_range(0..40) {
        0..3 => Op::Create(name, rng.random()),
        3..6 => Op::Write(name, at, len, byte),
        6 => Op::Append(name, len, byte),
        7..9 => Op::Read(name, at, len),
        9 => Op::Truncate(name, at),
        10..13 => Op::Rename(name, other, [0, 0, 1, 2][rng.random_range(0..4)]),
        13 => Op::Link(name, other),
        14 => Op::Symlink(name, other),
        15 => Op::ReadLink(name),
        16..18 => Op::Unlink(name),
        18..21 => Op::Mkdir(name),
        21 => Op::Rmdir(name),
        22 => Op::Chmod(name, rng.random_range(0..0o10000)),
        23 => Op::Times(
            name,
            rng.random_range(0..2_000_000_000),
            rng.random_range(0..1_000_000_000),
        ),
        24 => Op::SetXattr(
            name,
            key,
            len % 500,
            [0, libc::XATTR_CREATE, libc::XATTR_REPLACE][slot % 3],
        ),
        25 => Op::GetXattr(name, key),
        26 => Op::ListXattr(name),
        27 => Op::RemoveXattr(name, key),
        28 => {
            let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            let modes = [0, libc::FALLOC_FL_KEEP_SIZE, punch, libc::FALLOC_FL_ZERO_RANGE];
            Op::Fallocate(name, modes[slot % 4], at, len as u64)
        }
        29 => Op::Readdir(name),
        30 => Op::Stat(name),
        31 => Op::Access(name),
        32 => Op::Hold(
            slot,
            name,
            [libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC][usize::from(byte > 200)],
        ),
        33 => Op::HeldWrite(slot, at, len, byte),
        34 => Op::HeldRead(slot, at, len),
        35 => Op::HeldStat(slot),
        36 => Op::HeldTruncate(slot, at),
        37 => Op::HeldSeek(slot, at),
        38 => {
            if rng.random() {
                Op::HeldSync(slot)
            } else {
                Op::Chown(name, rng.random_range(0..3))
            }
        }
        _ => Op::Release(slot),
    }
}

/// One side: the mounts (each operation by one of them) or the local directory.
struct Side {
    roots: Vec<PathBuf>,
    held: Vec<Option<File>>,
}

fn summary(data: &[u8]) -> String {
    let sum = data
        .iter()
        .fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(*b)));
    format!("{} bytes {sum:x}", data.len())
}

/// What must be equal of two inodes. Sizes of directories are each file system's own.
fn attributes(meta: &fs::Metadata) -> String {
    let size = if meta.is_dir() { 0 } else { meta.len() };
    format!(
        "mode {:o} links {} size {size} uid {} gid {}",
        meta.mode(),
        meta.nlink(),
        meta.uid(),
        meta.gid()
    )
}

impl Side {
    fn new(roots: Vec<PathBuf>) -> Self {
        Self {
            roots,
            held: (0..HANDLES).map(|_| None).collect(),
        }
    }

    fn held(&self, slot: usize) -> io::Result<&File> {
        self.held[slot]
            .as_ref()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Does it through root `way`; the result as text.
    fn apply(&mut self, op: &Op, way: usize) -> String {
        let root = self.roots[way % self.roots.len()].clone();
        match self.attempt(op, &root) {
            Ok(text) => text,
            Err(error) => format!("errno {}", error.raw_os_error().unwrap_or(-1)),
        }
    }

    fn attempt(&mut self, op: &Op, root: &Path) -> io::Result<String> {
        let path = |i: &usize| root.join(NAMES[*i]);
        let ok = |()| "ok".to_owned();
        match op {
            Op::Create(n, exclusive) => {
                let excl = if *exclusive { libc::O_EXCL } else { 0 };
                sys::open(&path(n), libc::O_RDWR | libc::O_CREAT | excl).map(|_| "ok".into())
            }
            Op::Write(n, at, len, byte) => {
                let file = sys::open(&path(n), libc::O_WRONLY | libc::O_NOFOLLOW)?;
                file.write_all_at(&vec![*byte; *len], *at).map(ok)
            }
            Op::Append(n, len, byte) => {
                let mut file = sys::open(&path(n), libc::O_WRONLY | libc::O_APPEND | libc::O_NOFOLLOW)?;
                file.write_all(&vec![*byte; *len]).map(ok)
            }
            Op::Read(n, at, len) => Ok(summary(&sys::read_at(&File::open(path(n))?, *at, *len)?)),
            Op::Truncate(n, at) => sys::truncate(&path(n), *at as i64).map(ok),
            Op::Rename(n, m, flags) => rename(&path(n), &path(m), *flags).map(ok),
            Op::Link(n, m) => fs::hard_link(path(n), path(m)).map(ok),
            Op::Symlink(n, m) => std::os::unix::fs::symlink(NAMES[*n], path(m)).map(ok),
            Op::ReadLink(n) => Ok(format!("{:?}", fs::read_link(path(n))?)),
            Op::Unlink(n) => fs::remove_file(path(n)).map(ok),
            Op::Mkdir(n) => {
                fs::create_dir(path(n))?;
                Ok(attributes(&path(n).symlink_metadata()?))
            }
            Op::Rmdir(n) => fs::remove_dir(path(n)).map(ok),
            Op::Chmod(n, mode) => fs::set_permissions(path(n), fs::Permissions::from_mode(*mode)).map(ok),
            Op::Chown(n, id) => std::os::unix::fs::lchown(path(n), Some(*id), Some(*id)).map(ok),
            Op::Times(n, seconds, nanos) => {
                sys::utimens(&path(n), (*seconds, *nanos), (*seconds + 1, *nanos))?;
                let meta = path(n).symlink_metadata()?;
                Ok(format!("{} {}", meta.mtime(), meta.mtime_nsec()))
            }
            Op::SetXattr(n, key, len, flags) => {
                sys::setxattr(&path(n), &format!("user.k{key}"), &vec![*key; *len], *flags).map(ok)
            }
            Op::GetXattr(n, key) => Ok(summary(&sys::getxattr(&path(n), &format!("user.k{key}"))?)),
            Op::ListXattr(n) => Ok(sys::listxattr(&path(n))?.join(" ")),
            Op::RemoveXattr(n, key) => sys::removexattr(&path(n), &format!("user.k{key}")).map(ok),
            Op::Fallocate(n, mode, at, len) => {
                sys::fallocate(&sys::open(&path(n), libc::O_WRONLY)?, *mode, *at, *len).map(ok)
            }
            Op::Readdir(n) => Ok(list(&path(n))?.join(" ")),
            Op::Stat(n) => Ok(attributes(&path(n).symlink_metadata()?)),
            Op::Access(n) => rustix::fs::access(path(n), rustix::fs::Access::EXEC_OK)
                .map(ok)
                .map_err(io::Error::from),
            Op::Hold(slot, n, flags) => {
                self.held[*slot] = None;
                self.held[*slot] = Some(sys::open(&path(n), *flags)?);
                Ok("ok".into())
            }
            Op::HeldWrite(slot, at, len, byte) => {
                self.held(*slot)?.write_all_at(&vec![*byte; *len], *at).map(ok)
            }
            Op::HeldRead(slot, at, len) => Ok(summary(&sys::read_at(self.held(*slot)?, *at, *len)?)),
            Op::HeldStat(slot) => Ok(attributes(&self.held(*slot)?.metadata()?)),
            Op::HeldTruncate(slot, at) => self.held(*slot)?.set_len(*at).map(ok),
            Op::HeldSeek(slot, at) => {
                // Where holes begin is each file system's own; what lies behind the end is not.
                let file = self.held(*slot)?;
                let size = file.metadata()?.len();
                let data = sys::seek_data(file, size + at)?;
                Ok(format!("{data} {}", sys::seek_hole(file, size + at)?))
            }
            Op::HeldSync(slot) => self.held(*slot)?.sync_all().map(ok),
            Op::Release(slot) => {
                self.held[*slot] = None;
                Ok("ok".into())
            }
        }
    }
}

/// A stock kernel cannot move its entry of a directory that another mount has moved while it holds the lock of a
/// rename itself: it says ESTALE. A look at the names before does it.
fn rename(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let flags = rustix::fs::RenameFlags::from_bits_retain(flags);
    let first = sys::rename2(from, to, flags);
    if sys::errno(&first) != libc::ESTALE {
        return first;
    }
    let _ = (from.symlink_metadata(), to.symlink_metadata());
    sys::rename2(from, to, flags)
}

fn list(path: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Everything below a directory as text.
fn tree(path: &Path, depth: usize, out: &mut Vec<String>) -> io::Result<()> {
    let meta = path.symlink_metadata()?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let detail = match meta.file_type() {
        t if t.is_symlink() => format!("{:?}", fs::read_link(path)?),
        t if t.is_dir() => String::new(),
        _ => summary(&fs::read(path)?),
    };
    let name = if depth == 0 { "/".into() } else { name };
    out.push(format!("{:depth$}{name}: {} {detail}", "", attributes(&meta)));
    if meta.is_dir() {
        for child in list(path)? {
            tree(&path.join(child), depth + 1, out)?;
        }
    }
    Ok(())
}

/// What the local file system does not know, and so cannot say.
#[derive(Debug)]
struct Lacks {
    zero_range: bool,
    xattrs: bool,
}

impl Lacks {
    fn of(local: &Path) -> anyhow::Result<Self> {
        let path = local.join("probe");
        let file = File::create(&path)?;
        let unknown = |result: io::Result<()>| sys::errno(&result) == libc::EOPNOTSUPP;
        let lacks = Self {
            zero_range: unknown(sys::fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 0, 1)),
            xattrs: unknown(sys::setxattr(&path, "user.probe", b"x", 0)),
        };
        fs::remove_file(path)?;
        if lacks.zero_range || lacks.xattrs {
            eprintln!("not compared, as {} lacks it: {lacks:?}", local.display());
        }
        Ok(lacks)
    }

    fn covers(&self, op: &Op) -> bool {
        match op {
            Op::Fallocate(_, libc::FALLOC_FL_ZERO_RANGE, ..) => self.zero_range,
            Op::SetXattr(..) | Op::GetXattr(..) | Op::ListXattr(..) | Op::RemoveXattr(..) => self.xattrs,
            _ => false,
        }
    }
}

/// Applies `steps` random operations to the folder that `mounts` all show and to `local`.
///
/// # Errors
/// Something differs; with the seed and the operations before.
pub fn run(mounts: &[PathBuf], local: &Path, steps: usize, seed: u64) -> anyhow::Result<()> {
    let folder = format!("model-{seed}-{}", rand::random::<u16>());
    fs::create_dir(mounts[0].join(&folder))?;
    let local = local.join(&folder);
    fs::create_dir(&local)?;
    let mut ours = Side::new(mounts.iter().map(|m| m.join(&folder)).collect());
    let mut theirs = Side::new(vec![local.clone()]);
    let mut rng = StdRng::seed_from_u64(seed);
    let mut log: Vec<String> = Vec::new();
    let lacks = Lacks::of(&local)?;
    for step in 0..steps {
        let op = draw(&mut rng);
        let way = rng.random_range(0..mounts.len());
        if lacks.covers(&op) {
            continue;
        }
        let (got, want) = (ours.apply(&op, way), theirs.apply(&op, 0));
        log.push(format!("  {step}: mount {way} {op:?} → {want}"));
        ensure!(
            got == want,
            "seed {seed}, step {step}, mount {way}: {op:?} gives \"{got}\", locally \"{want}\"; before:\n{}",
            log[log.len().saturating_sub(25)..].join("\n")
        );
    }
    let mut want = Vec::new();
    tree(&local, 0, &mut want)?;
    for (i, root) in ours.roots.iter().enumerate() {
        let mut got = Vec::new();
        tree(root, 0, &mut got).with_context(|| format!("tree on mount {i}, seed {seed}"))?;
        let differs = got.iter().zip(&want).find(|(g, w)| g != w);
        ensure!(
            got == want,
            "seed {seed}: trees differ on mount {i} at {differs:?}\n{got:#?}\n{want:#?}\nafter:\n{}",
            log.join("\n")
        );
    }
    Ok(())
}
