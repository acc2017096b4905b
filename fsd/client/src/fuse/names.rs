//! Names: looking up, making, removing, renaming.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Generation, INodeNo, RenameFlags, ReplyEmpty, ReplyEntry, Request};

use super::convert::attr_of;
use super::serve::{NAME_TTL, Pending, done, serve, unnamed};
use crate::client::Client;
use crate::namespace::names::New;
use fsd_proto::ino;
use fsd_proto::wire::{Attr, Kind};

fn send_entry(client: &Arc<Client>, reply: &Pending<ReplyEntry>, attr: &Attr, ttl: Duration) {
    match reply.take() {
        Some(reply) => reply.entry_with_ttls(
            &ttl,
            &NAME_TTL,
            &attr_of(attr),
            Generation(u64::from(ino::generation(attr.ino))),
        ),
        None => unnamed(client, attr.ino),
    }
}

pub(super) fn lookup(client: &Arc<Client>, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
    let thread = req.pid();
    let (name, parent) = (name.as_bytes().to_vec(), parent.0);
    serve(client, req, reply, ReplyEntry::error, move |c, ctx, reply| {
        if matches!(&name[..], b"." | b"..") {
            // The kernel has forgotten an inode that somebody has a handle of.
            return c
                .namespace
                .directories
                .lookup_by_number(ctx, parent, &name, thread, |_, attr, ttl| {
                    send_entry(c, reply, attr, ttl)
                });
        }
        c.namespace
            .directories
            .lookup(ctx, &c.cache.inode(parent), &name, thread, |_, attr, ttl| {
                send_entry(c, reply, attr, ttl)
            })
    });
}

fn make(client: &Arc<Client>, req: &Request, parent: INodeNo, name: &OsStr, mut new: New, reply: ReplyEntry) {
    let (name, parent) = (name.as_bytes().to_vec(), parent.0);
    (new.uid, new.gid) = (req.uid(), req.gid());
    serve(client, req, reply, ReplyEntry::error, move |c, ctx, reply| {
        c.namespace
            .names
            .create(ctx, &c.cache.inode(parent), &name, &new, |_, attr| {
                send_entry(c, reply, attr, c.kernel.caches.late_attr_ttl(attr.kind));
                Ok(())
            })
    });
}

pub(super) fn mknod(
    client: &Arc<Client>,
    req: &Request,
    parent: INodeNo,
    name: &OsStr,
    mode: u32,
    rdev: u32,
    reply: ReplyEntry,
) {
    let Some(kind) = Kind::from_mode(mode) else {
        return reply.error(fuser::Errno::EINVAL);
    };
    let new = New {
        kind,
        mode,
        uid: 0,
        gid: 0,
        rdev,
        target: Vec::new(),
    };
    make(client, req, parent, name, new, reply);
}

pub(super) fn mkdir(
    client: &Arc<Client>,
    req: &Request,
    parent: INodeNo,
    name: &OsStr,
    mode: u32,
    reply: ReplyEntry,
) {
    let new = New {
        kind: Kind::Directory,
        mode,
        uid: 0,
        gid: 0,
        rdev: 0,
        target: Vec::new(),
    };
    make(client, req, parent, name, new, reply);
}

pub(super) fn symlink(
    client: &Arc<Client>,
    req: &Request,
    parent: INodeNo,
    link_name: &OsStr,
    target: &Path,
    reply: ReplyEntry,
) {
    let target = target.as_os_str().as_bytes().to_vec();
    let new = New {
        kind: Kind::Symlink,
        mode: 0o777,
        uid: 0,
        gid: 0,
        rdev: 0,
        target,
    };
    make(client, req, parent, link_name, new, reply);
}

pub(super) fn remove(
    client: &Arc<Client>,
    req: &Request,
    parent: INodeNo,
    name: &OsStr,
    directory: bool,
    reply: ReplyEmpty,
) {
    let thread = req.pid();
    let (name, parent) = (name.as_bytes().to_vec(), parent.0);
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.namespace
            .names
            .remove(ctx, &c.cache.inode(parent), &name, directory, thread)?;
        done(reply);
        Ok(())
    });
}

pub(super) fn rename(
    client: &Arc<Client>,
    req: &Request,
    (parent, name): (INodeNo, &OsStr),
    (newparent, newname): (INodeNo, &OsStr),
    flags: RenameFlags,
    reply: ReplyEmpty,
) {
    let thread = req.pid();
    let (name, newname) = (name.as_bytes().to_vec(), newname.as_bytes().to_vec());
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        let (from, to) = (c.cache.inode(parent.0), c.cache.inode(newparent.0));
        c.namespace
            .names
            .rename(ctx, (&from, &name), (&to, &newname), flags.bits(), thread)?;
        done(reply);
        Ok(())
    });
}

pub(super) fn link(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    newparent: INodeNo,
    newname: &OsStr,
    reply: ReplyEntry,
) {
    let name = newname.as_bytes().to_vec();
    serve(client, req, reply, ReplyEntry::error, move |c, ctx, reply| {
        let (inode, dir) = (c.cache.inode(ino.0), c.cache.inode(newparent.0));
        c.namespace.names.link(ctx, &inode, &dir, &name, |_, attr, ttl| {
            send_entry(c, reply, attr, ttl)
        })
    });
}
