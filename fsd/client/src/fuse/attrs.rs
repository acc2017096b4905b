//! Attributes of inodes and of the file system, and the targets of links.

use std::sync::Arc;
use std::time::Duration;

use fuser::{INodeNo, ReplyAttr, ReplyData, ReplyStatfs, Request};

use super::convert::attr_of;
use super::serve::{Pending, serve};
use crate::client::Client;
use crate::files::attrs::SetAttr;
use fsd_proto::ask;
use fsd_proto::wire::Attr;

fn send_attr(reply: &Pending<ReplyAttr>, attr: &Attr, ttl: Duration) {
    if let Some(reply) = reply.take() {
        reply.attr(&ttl, &attr_of(attr));
    }
}

pub(super) fn getattr(client: &Arc<Client>, req: &Request, ino: INodeNo, reply: ReplyAttr) {
    serve(client, req, reply, ReplyAttr::error, move |c, ctx, reply| {
        c.files.attrs.getattr(ctx, &c.cache.inode(ino.0), |attr, ttl| {
            send_attr(reply, attr, ttl)
        })
    });
}

pub(super) fn setattr(client: &Arc<Client>, req: &Request, ino: INodeNo, set: SetAttr, reply: ReplyAttr) {
    serve(client, req, reply, ReplyAttr::error, move |c, ctx, reply| {
        c.files
            .attrs
            .setattr(ctx, &c.cache.inode(ino.0), &set, |attr, ttl| {
                send_attr(reply, attr, ttl)
            })
    });
}

pub(super) fn readlink(client: &Arc<Client>, req: &Request, ino: INodeNo, reply: ReplyData) {
    serve(client, req, reply, ReplyData::error, move |c, ctx, reply| {
        let target = c.namespace.directories.readlink(ctx, &c.cache.inode(ino.0))?;
        if let Some(reply) = reply.take() {
            reply.data(&target);
        }
        Ok(())
    });
}

pub(super) fn statfs(client: &Arc<Client>, req: &Request, reply: ReplyStatfs) {
    serve(client, req, reply, ReplyStatfs::error, move |c, ctx, reply| {
        ctx.may_wait()?;
        let (mut total, mut free) = (0, 0);
        for node in 0..c.session.net.storage.count() {
            let space = c.data.space.pool_space(node)?;
            total += space.total;
            free += space.free;
        }
        let meta = c.session.net.meta.ask(ask::meta::StatFs {})?;
        if let Some(reply) = reply.take() {
            let (unit, inodes, free_inodes) = in_32_bits(total, meta.inodes, meta.free);
            let free = free / u64::from(unit);
            let total = total / u64::from(unit);
            reply.statfs(total, free, free, inodes, free_inodes, unit, 255, unit);
        }
        Ok(())
    });
}

/// The unit of space, all inodes and the free ones, so that programs with 32-bit numbers can be told: for them the kernel fails
/// with EOVERFLOW otherwise.
fn in_32_bits(bytes: u64, used: u64, free: u64) -> (u32, u64, u64) {
    const MOST: u64 = u32::MAX as u64;
    let mut unit = 4096;
    while bytes / u64::from(unit) > MOST && unit < 1 << 30 {
        unit *= 2;
    }
    let all = used.saturating_add(free).min(MOST.max(used));
    (unit, all, all - used)
}

#[cfg(test)]
mod tests {
    use super::in_32_bits;

    #[test]
    fn what_statfs_says_fits_into_32_bits() {
        assert_eq!(in_32_bits(1 << 30, 10, 20), (4096, 30, 20));
        let (unit, all, free) = in_32_bits(1 << 45, 10, 1 << 36);
        assert!((1u64 << 45) / u64::from(unit) <= u64::from(u32::MAX));
        assert_eq!((all, free), (u64::from(u32::MAX), u64::from(u32::MAX) - 10));
        // More than that are in use: then it is said all the same.
        assert_eq!(in_32_bits(0, 1 << 33, 5), (4096, 1 << 33, 0));
    }
}
