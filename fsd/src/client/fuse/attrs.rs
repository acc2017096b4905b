//! Attributes of inodes and of the file system, and the targets of links.

use std::sync::Arc;
use std::time::Duration;

use fuser::{INodeNo, ReplyAttr, ReplyData, ReplyStatfs};

use super::convert::attr_of;
use super::serve;
use crate::client::Client;
use crate::client::attrs::SetAttr;
use crate::client::ctx::Stop;
use crate::rpc::Errno;
use crate::wire::{Attr, MetaReply, MetaRequest};

fn send_attr(reply: &mut Option<ReplyAttr>, attr: &Attr, ttl: Duration) {
    if let Some(reply) = reply.take() {
        reply.attr(&ttl, &attr_of(attr));
    }
}

pub(super) fn getattr(client: &Arc<Client>, ino: INodeNo, reply: ReplyAttr) {
    serve(client, reply, ReplyAttr::error, move |c, ctx, reply| {
        c.getattr(ctx, &c.inode(ino.0), |attr, ttl| send_attr(reply, attr, ttl))
    });
}

pub(super) fn setattr(client: &Arc<Client>, ino: INodeNo, set: SetAttr, reply: ReplyAttr) {
    serve(client, reply, ReplyAttr::error, move |c, ctx, reply| {
        c.setattr(ctx, &c.inode(ino.0), &set, |attr, ttl| {
            send_attr(reply, attr, ttl)
        })
    });
}

pub(super) fn readlink(client: &Arc<Client>, ino: INodeNo, reply: ReplyData) {
    serve(client, reply, ReplyData::error, move |c, ctx, reply| {
        let target = c.readlink(ctx, &c.inode(ino.0))?;
        if let Some(reply) = reply.take() {
            reply.data(&target);
        }
        Ok(())
    });
}

pub(super) fn statfs(client: &Arc<Client>, reply: ReplyStatfs) {
    serve(client, reply, ReplyStatfs::error, move |c, ctx, reply| {
        ctx.may_wait()?;
        let (mut total, mut free) = (0, 0);
        for node in 0..c.net.storage_count() {
            let space = c.pool_space(node)?;
            total += space.total;
            free += space.free;
        }
        let MetaReply::StatFs(meta) = c.net.meta(&MetaRequest::StatFs)? else {
            return Err(Stop::Errno(Errno(libc::EPROTO)));
        };
        if let Some(reply) = reply.take() {
            let unit = 4096;
            let free = free / unit;
            reply.statfs(
                total / unit,
                free,
                free,
                meta.inodes + meta.free,
                meta.free,
                unit as u32,
                255,
                unit as u32,
            );
        }
        Ok(())
    });
}
