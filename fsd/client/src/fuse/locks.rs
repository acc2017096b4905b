//! File locks.

use std::sync::Arc;

use fuser::{FileHandle, LockOwner, ReplyEmpty, ReplyLock, Request};

use super::convert::error_of;
use super::serve::{done, serve};
use crate::client::Client;
use crate::files::locks::{PassedWaiter, type_of};
use fsd_proto::wire::LockSpec;

/// In `fuse_lk_in`: the lock is one of flock(2) (`linux/fuse.h`).
const FUSE_LK_FLOCK: u32 = 1;

/// `fuse_in_header` (`linux/fuse.h`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct InHeader {
    len: u32,
    opcode: u32,
    unique: u64,
    nodeid: u64,
    uid: u32,
    gid: u32,
    pid: u32,
    padding: u32,
}

/// `fuse_lk_in` (`linux/fuse.h`).
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct LkIn {
    fh: u64,
    owner: u64,
    start: u64,
    end: u64,
    typ: u32,
    pid: u32,
    flags: u32,
    padding: u32,
}

/// A SETLK or SETLKW as the kernel sends it.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct SetLk {
    header: InHeader,
    lock: LkIn,
}

/// Opcodes of `fuse_in_header`.
const FUSE_SETLK: u32 = 32;
const FUSE_SETLKW: u32 = 33;

const _: () = assert!(size_of::<SetLk>() == 88 && size_of::<Request>() == 40);
const _: () = assert!(size_of::<InHeader>() == 40);

/// Is the lock one of flock(2)? The library takes the request apart and passes on all of it but that, so this looks at the message itself.
pub(super) fn is_flock(req: &Request, fh: FileHandle, owner: LockOwner, (start, end): (u64, u64)) -> bool {
    let message = std::ptr::from_ref(req).cast::<SetLk>();
    // SAFETY: the library's `Request` is the header of the message, in place at the beginning of the buffer that the message was read into (its
    // version is fixed in Cargo.toml for that). The buffer is aligned for a header, and outlives this call. It is longer than any message,
    // so all that is read here is memory of the buffer; whether it is what it is taken for is checked below.
    let message = unsafe { message.read_unaligned() };
    let SetLk { header, lock } = message;
    header.len as usize == size_of::<SetLk>()
        && matches!(header.opcode, FUSE_SETLK | FUSE_SETLKW)
        && (lock.fh, lock.owner) == (fh.0, owner.0)
        && (lock.start, lock.end) == (start, end)
        && lock.flags & FUSE_LK_FLOCK != 0
}

pub(super) fn getlk(client: &Arc<Client>, req: &Request, lock: LockSpec, reply: ReplyLock) {
    serve(client, req, reply, ReplyLock::error, move |c, ctx, reply| {
        let found = c.files.locks.getlk(ctx, lock)?;
        if let Some(reply) = reply.take() {
            match found {
                // A process of another host has no number here, and the kernel shows none that it does not know: so the daemon stands in,
                // through which that lock reaches this host.
                Some(l) => {
                    let here = l.owner.node == c.session.node.0;
                    let pid = if here { l.pid } else { std::process::id() };
                    reply.locked(l.range.start, l.range.end, type_of(l.kind), pid);
                }
                None => reply.locked(0, 0, libc::F_UNLCK, 0),
            }
        }
        Ok(())
    });
}

/// `sleep`: wait for a lock that is taken.
pub(super) fn setlk(
    client: &Arc<Client>,
    req: &Request,
    lock: LockSpec,
    handle: u64,
    sleep: bool,
    reply: ReplyEmpty,
) {
    if sleep && lock.kind.is_some() {
        let unique = req.unique().0;
        let asked = PassedWaiter { unique, lock, handle };
        return client.files.locks.setlk_wait(asked, move |result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(error_of(e)),
        });
    }
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.files.locks.setlk(ctx, lock, handle)?;
        done(reply);
        Ok(())
    });
}
