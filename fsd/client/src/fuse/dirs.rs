//! Open directories.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuser::{
    FileHandle, FileType, FopenFlags, INodeNo, OpenFlags, ReplyDirectory, ReplyEmpty, ReplyOpen, Request,
};

use super::convert::kind_of;
use super::serve::{done, serve, serve_kernel, unopened};
use crate::client::Client;
use crate::namespace::dirs::{COOKIE_DOT, COOKIE_DOTDOT};
use crate::storing::syncing::Scope;
use fsd_proto::wire::Kind;

pub(super) fn opendir(client: &Arc<Client>, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
    serve(client, req, reply, ReplyOpen::error, move |c, ctx, reply| {
        let inode = c.cache.inode(ino.0);
        let (fh, _) = c
            .opens
            .open_files
            .make_handle(ctx, &inode, Kind::Directory, flags.0)?;
        c.files.accesses.directory_accessed(&inode, flags.0);
        match reply.take() {
            Some(reply) => reply.opened(FileHandle(fh), FopenFlags::empty()),
            None => unopened(c, fh),
        }
        Ok(())
    });
}

pub(super) fn readdir(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    fh: FileHandle,
    offset: u64,
    reply: ReplyDirectory,
) {
    let handle = client.opens.open_files.handles.get(fh.0);
    serve(client, req, reply, ReplyDirectory::error, move |c, ctx, reply| {
        let listing = {
            let kept = handle
                .as_ref()
                .and_then(|h| h.listing.lock().clone())
                .filter(|_| offset > 0);
            match kept {
                Some(listing) => listing,
                None => {
                    // From the start: as it is now (rewinddir shows what has changed since).
                    let listing = c.namespace.directories.listing(ctx, &c.cache.inode(ino.0))?;
                    if let Some(handle) = &handle {
                        *handle.listing.lock() = Some(Arc::clone(&listing));
                    }
                    listing
                }
            }
        };
        let Some(mut reply) = reply.take() else {
            return Ok(());
        };
        let dots = [(COOKIE_DOT, "."), (COOKIE_DOTDOT, "..")];
        for (cookie, name) in dots {
            if offset < cookie && reply.add(ino, cookie, FileType::Directory, name) {
                reply.ok();
                return Ok(());
            }
        }
        for (&cookie, (name, number, kind)) in listing.range(offset.max(COOKIE_DOTDOT) + 1..) {
            if reply.add(INodeNo(*number), cookie, kind_of(*kind), OsStr::from_bytes(name)) {
                break;
            }
        }
        reply.ok();
        Ok(())
    });
}

pub(super) fn releasedir(client: &Arc<Client>, fh: FileHandle, reply: ReplyEmpty) {
    serve_kernel(client, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.opens.open_files.release(ctx, fh.0)?;
        done(reply);
        Ok(())
    });
}

pub(super) fn fsyncdir(client: &Arc<Client>, req: &Request, ino: INodeNo, reply: ReplyEmpty) {
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.files
            .opened
            .fsync(ctx, &c.cache.inode(ino.0), None, Scope::All)?;
        done(reply);
        Ok(())
    });
}
