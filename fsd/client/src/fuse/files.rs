//! Open files, and what is done to a whole file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuser::{
    FileHandle, FopenFlags, Generation, INodeNo, LockOwner, OpenFlags, ReplyCreate, ReplyEmpty, ReplyLseek,
    ReplyOpen, Request,
};

use super::convert::{attr_of, caller_of};
use super::created::Created;
use super::serve::{done, serve, serve_kernel, unnamed, unopened};
use crate::cache::inode::Inode;
use crate::client::Client;
use crate::namespace::dirs::ATTEMPTS;
use crate::namespace::names::New;
use crate::session::ctx::Stop;
use crate::storing::syncing::Scope;
use fsd_node::config::CacheMode;
use fsd_proto::ino;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{Attr, Kind};

fn open_flags(mode: CacheMode, cached: bool) -> FopenFlags {
    if cached && mode != CacheMode::Direct {
        // What the kernel has is valid as long as the lease is held, so it may keep it over an open.
        FopenFlags::FOPEN_KEEP_CACHE
    } else {
        FopenFlags::FOPEN_DIRECT_IO
    }
}

pub(super) fn open(client: &Arc<Client>, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
    let caller = caller_of(req);
    serve(client, req, reply, ReplyOpen::error, move |c, ctx, reply| {
        let (fh, cached) = c.files.opened.open(ctx, &c.cache.inode(ino.0), flags.0, caller)?;
        match reply.take() {
            Some(reply) => reply.opened(FileHandle(fh), open_flags(c.kernel.caches.mode, cached)),
            None => unopened(c, fh),
        }
        Ok(())
    });
}

pub(super) fn create(
    client: &Arc<Client>,
    req: &Request,
    parent: INodeNo,
    name: &OsStr,
    mode: u32,
    flags: i32,
    reply: ReplyCreate,
) {
    let (name, parent) = (name.as_bytes().to_vec(), parent.0);
    let (caller, unique) = (caller_of(req), req.unique().0);
    let new = New {
        kind: Kind::File,
        mode,
        uid: req.uid(),
        gid: req.gid(),
        rdev: 0,
        target: Vec::new(),
    };
    serve(client, req, reply, ReplyCreate::error, move |c, ctx, reply| {
        let dir = c.cache.inode(parent);
        let send = |made: Option<&Inode>, attr: &Attr, (fh, cached): (u64, bool)| {
            let Some(reply) = reply.take() else {
                unnamed(c, attr.ino);
                return unopened(c, fh);
            };
            let generation = Generation(u64::from(ino::generation(attr.ino)));
            let (kernel, attr) = (&c.kernel.caches, attr_of(attr));
            let open = open_flags(kernel.mode, cached);
            // Only on the loop that has read the request, which knows its descriptor: what is answered later goes the library's way.
            if let Some(inode) = made.filter(|_| ctx.is_on_loop() && kernel.mode != CacheMode::Writeback) {
                let created = Created {
                    unique,
                    attr: &attr,
                    ttl: kernel.created_ttl(inode, fh),
                    generation: generation.0,
                    handle: fh,
                    flags: open.bits(),
                };
                if created.send() {
                    // It has been answered, and the library would answer EIO when its reply is dropped. Given up like this, the reply still counts
                    // among those that keep the descriptor open, so that stays open until the process ends.
                    return std::mem::forget(reply);
                }
            }
            // One time serves name and attributes. A stock kernel must not keep names; the kernel extension has them looked up whenever the
            // directory's lease is not held, however long they live.
            let ttl = kernel.late_attr_ttl(Kind::File);
            reply.created(&ttl, &attr, generation, FileHandle(fh), open);
        };
        for _ in 0..ATTEMPTS {
            let made = c.namespace.names.create(ctx, &dir, &name, &new, |inode, attr| {
                send(
                    Some(inode),
                    attr,
                    c.opens.open_files.make_handle(ctx, inode, Kind::File, flags)?,
                );
                Ok(())
            });
            match made {
                Err(Stop::Errno(Errno(libc::EEXIST))) if flags & libc::O_EXCL == 0 => {}
                other => return other,
            }
            // Somebody else was faster: open what is there now.
            let mut found = None;
            match c
                .namespace
                .directories
                .lookup(ctx, &dir, &name, caller.pid, |inode, attr, _| {
                    found = Some((Arc::clone(inode), *attr))
                }) {
                Err(Stop::Errno(Errno(libc::ENOENT))) => continue,
                other => other?,
            }
            if let Some((inode, attr)) = found {
                match c.files.opened.open(ctx, &inode, flags, caller) {
                    Err(Stop::Errno(Errno(libc::ESTALE))) => continue,
                    opened => send(None, &attr, opened?),
                }
                return Ok(());
            }
        }
        Err(Stop::Errno(Errno(libc::ESTALE)))
    });
}

pub(super) fn flush(
    client: &Arc<Client>,
    req: &Request,
    fh: FileHandle,
    lock_owner: LockOwner,
    reply: ReplyEmpty,
) {
    let handle = client.opens.open_files.handles.get(fh.0);
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        if let Some(handle) = &handle {
            c.kernel.caches.knows_handle(&handle.inode, fh.0);
            c.files.locks.release_locks(
                ctx,
                handle.inode.ino,
                c.files.locks.lock_owner(lock_owner.0, false),
            )?;
            c.files.opened.flush(ctx, handle)?;
        }
        done(reply);
        Ok(())
    });
}

pub(super) fn release(
    client: &Arc<Client>,
    ino: INodeNo,
    fh: FileHandle,
    lock_owner: Option<LockOwner>,
    reply: ReplyEmpty,
) {
    serve_kernel(client, reply, ReplyEmpty::error, move |c, ctx, reply| {
        if let Some(owner) = lock_owner {
            c.files
                .locks
                .release_locks(ctx, ino.0, c.files.locks.lock_owner(owner.0, true))?;
        }
        c.files.locks.release_locks_through(ctx, ino.0, fh.0)?;
        if let Some(handle) = c.opens.open_files.handles.get(fh.0) {
            c.kernel.caches.knows_handle(&handle.inode, fh.0);
        }
        c.opens.open_files.release(ctx, fh.0)?;
        done(reply);
        Ok(())
    });
}

pub(super) fn fsync(
    client: &Arc<Client>,
    req: &Request,
    (ino, fh): (INodeNo, FileHandle),
    scope: Scope,
    reply: ReplyEmpty,
) {
    let handle = client.opens.open_files.handles.get(fh.0);
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.files.opened.fsync(
            ctx,
            &c.cache.inode(ino.0),
            handle.as_ref().map(|h| &h.seen),
            scope,
        )?;
        done(reply);
        Ok(())
    });
}

pub(super) fn fallocate(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    offset: u64,
    length: u64,
    mode: i32,
    reply: ReplyEmpty,
) {
    let caller = caller_of(req);
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.files
            .allocations
            .fallocate(ctx, &c.cache.inode(ino.0), (offset, length), mode, caller)?;
        done(reply);
        Ok(())
    });
}

pub(super) fn lseek(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    offset: i64,
    whence: i32,
    reply: ReplyLseek,
) {
    serve(client, req, reply, ReplyLseek::error, move |c, ctx, reply| {
        let at = c.files.opened.lseek(ctx, &c.cache.inode(ino.0), offset, whence)?;
        if let Some(reply) = reply.take() {
            reply.offset(at);
        }
        Ok(())
    });
}
