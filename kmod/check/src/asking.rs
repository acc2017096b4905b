//! How servers get leases for what they do themselves: they ask the lease manager over a socket.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::manager::Manager;

/// The socket's name, beside the shared file.
pub const NAME: &str = "leases";
/// As many as servers have.
pub const THREADS: usize = 8;

/// Does something under the exclusive lease. Without a manager there are no leases.
pub fn under<T>(socket: &Path, mount: usize, ino: u64, change: impl FnOnce() -> T) -> Result<T> {
    let Ok(mut stream) = UnixStream::connect(socket) else {
        return Ok(change());
    };
    let mut byte = [0];
    stream.write_all(&(mount as u64).to_le_bytes())?;
    stream.write_all(&ino.to_le_bytes())?;
    stream.read_exact(&mut byte)?;
    let done = change();
    stream.write_all(&byte)?;
    stream.read_exact(&mut byte)?;
    Ok(done)
}

/// Answers until the socket is taken away.
pub fn listen(socket: &Path, manager: &Arc<Manager>) -> Result<()> {
    let listener = Arc::new(UnixListener::bind(socket).context("the lease socket")?);
    // All there from the start: a new thread needs the address space, which a task of the tests may have
    // locked while it waits for an answer.
    for _ in 0..THREADS {
        let (listener, manager) = (Arc::clone(&listener), Arc::downgrade(manager));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let Some(manager) = manager.upgrade() else {
                    return;
                };
                if let Err(error) = serve(stream, &manager) {
                    eprintln!("a server's lease: {error:#}");
                }
            }
        });
    }
    Ok(())
}

fn serve(mut stream: UnixStream, manager: &Manager) -> Result<()> {
    let (mut mount, mut ino, mut byte) = ([0; 8], [0; 8], [1]);
    if stream.read_exact(&mut mount).is_err() {
        // Only to wake the listener.
        return Ok(());
    }
    stream.read_exact(&mut ino)?;
    let (mount, ino) = (u64::from_le_bytes(mount) as usize, u64::from_le_bytes(ino));
    manager.pin(mount, ino)?;
    let changed = stream
        .write_all(&byte)
        .and_then(|()| stream.read_exact(&mut byte));
    manager.unpin(mount, ino)?;
    changed?;
    stream.write_all(&byte)?;
    Ok(())
}
