//! The checks.

mod asked;
pub mod bench;
mod calls;
mod ends;
mod gate;
mod mapped;
mod names;
mod revoke;
mod rewritten;
mod space;
mod stress;
mod term;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail};

use crate::fixture::Fixture;
use crate::memory::Mapping;

/// A check by its name.
pub type Check = (&'static str, fn() -> Result<()>);

/// All of them.
pub const ALL: &[Check] = &[
    ("attach: refused with a reason", gate::refused),
    ("gate: reads and writes wait for their lease", gate::waits),
    ("gate: a waiter can be killed", gate::killed),
    ("gate: the daemon can refuse", gate::denied),
    ("gate: a held lease asks nobody", gate::quiet),
    ("gate: who looks for an answer need not be woken", gate::looks),
    ("gate: others are left alone", gate::others),
    ("gate: more waiters than the ring has room for", gate::overflow),
    ("gate: more files than the table has room for", gate::eviction),
    ("revoke: clean, without a system call", revoke::clean),
    ("revoke: dirty, all writes answered", revoke::dirty),
    ("revoke: another version drops pages", revoke::version),
    ("revoke: down to shared keeps pages", revoke::downgrade),
    ("revoke: waits for who is inside", revoke::drains),
    ("revoke: waits for setattr with the inode locked", revoke::setattr),
    ("revoke: a write error is the application's to see", revoke::error),
    ("revoke: without an open file, or an inode", revoke::closed),
    ("mmap: reads and writes wait, revocations unmap", mapped::gate),
    ("mmap: written by one mount, read by another", mapped::coherent),
    ("mmap: as a buffer of the same and another file", mapped::buffers),
    ("asked: the daemon reads and writes", asked::done),
    ("asked: it leaves it to the kernel, or refuses", asked::again),
    ("asked: buffers of the killed, and of nobody's", asked::buffers),
    ("space: asked for where none is promised", space::range),
    ("space: a full pool is told of by write", space::full),
    ("space: an append is put down as a whole", space::whole),
    ("space: a store without it is SIGBUS", space::mapped),
    ("space: the killed, and more than can ask", space::ends),
    ("writes: into dirty pages do what FUSE does", rewritten::same),
    ("calls: splice, sendfile, copy", calls::splice),
    ("calls: O_DIRECT", calls::direct),
    ("calls: append from two mounts", calls::append),
    ("calls: truncate, fallocate, seek on two mounts", calls::sizes),
    ("calls: NOWAIT", calls::nowait),
    ("calls: freezing is refused", calls::freeze),
    ("calls: fadvise, created and unnamed files", calls::others),
    ("names: stat and walks ask nobody", names::quiet),
    ("names: another version asks again", names::version),
    (
        "names: permissions and times come with the grant",
        names::attributes,
    ),
    ("names: another mount's chmod holds", names::chmod),
    ("names: a mode that no answer brought", names::mode),
    ("names: made under a name known not to be there", names::born),
    ("calls: exec of what another mount replaces", calls::exec),
    ("term: past its end all wait, and go on", term::over),
    ("term: past its end nothing is mapped", term::mapped),
    ("term: who sleeps past its end is found out", term::slept),
    ("term: who waits past its end can be killed", term::killed),
    ("end: the device is closed with waiters", ends::device),
    ("end: the daemon is killed with dirty pages", ends::killed),
    ("end: unmounted with dirty pages, device open", ends::unmounted),
    ("end: attached again", ends::again),
    ("stress: stamps on two mounts", stress::stamps),
    ("stress: the word, kernel against daemon", stress::word),
];

/// Does something to a file in a process of its own, which can be killed.
pub fn touch(kind: &str, path: &Path) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    match kind {
        "read" => file.read_exact_at(&mut [0], 0)?,
        "write" => file.write_all_at(b"!", 0)?,
        "map" => {
            println!("{}", Mapping::new(&file, 4096)?.get(0));
        }
        "store" => Mapping::new(&file, 4096)?.set(0, b'!'),
        "load-store" => {
            let map = Mapping::new(&file, 4096)?;
            println!("{}", map.get(0));
            map.set(0, b'!');
        }
        other => bail!("touch {other}?"),
    }
    Ok(())
}

/// Keeps a mount attached, with a dirty file, until there is no more input.
pub fn hold() -> Result<()> {
    let fixture = Fixture::one()?;
    let file = fixture.open(0, "f0")?;
    file.write_all_at(b"held", 0)?;
    println!("attached");
    std::io::copy(&mut std::io::stdin(), &mut std::io::sink())?;
    drop(file);
    fixture.end()
}

/// Reads `len` bytes.
fn read_at(file: &File, offset: u64, len: usize) -> Result<Vec<u8>> {
    let mut data = vec![0; len];
    let mut done = 0;
    while let Some(rest) = data.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    data.truncate(done);
    Ok(data)
}

/// Fails if not so.
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($what:tt)*) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            anyhow::bail!("{}: {left:?}, not {right:?}", format!($($what)*));
        }
    }};
}
pub(crate) use ensure_eq;
