//! Extended attributes.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use fuser::{INodeNo, ReplyEmpty, ReplyXattr, Request};

use super::serve::{Pending, done, serve};
use crate::client::Client;

fn send_xattr(reply: &Pending<ReplyXattr>, value: &[u8], size: u32) {
    let Some(reply) = reply.take() else { return };
    if size == 0 {
        reply.size(value.len() as u32);
    } else if value.len() > size as usize {
        reply.error(fuser::Errno::ERANGE);
    } else {
        reply.data(value);
    }
}

pub(super) fn setxattr(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    name: &OsStr,
    value: &[u8],
    flags: i32,
    reply: ReplyEmpty,
) {
    let (name, value) = (name.as_bytes().to_vec(), value.to_vec());
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.namespace
            .xattrs
            .setxattr(ctx, &c.cache.inode(ino.0), &name, &value, flags)?;
        done(reply);
        Ok(())
    });
}

pub(super) fn getxattr(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    name: &OsStr,
    size: u32,
    reply: ReplyXattr,
) {
    let name = name.as_bytes().to_vec();
    serve(client, req, reply, ReplyXattr::error, move |c, ctx, reply| {
        let value = c.namespace.xattrs.getxattr(ctx, &c.cache.inode(ino.0), &name)?;
        send_xattr(reply, &value, size);
        Ok(())
    });
}

pub(super) fn listxattr(client: &Arc<Client>, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
    let privileged = req.uid() == 0;
    serve(client, req, reply, ReplyXattr::error, move |c, ctx, reply| {
        let names = c
            .namespace
            .xattrs
            .listxattr(ctx, &c.cache.inode(ino.0), privileged)?;
        send_xattr(reply, &names, size);
        Ok(())
    });
}

pub(super) fn removexattr(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    name: &OsStr,
    reply: ReplyEmpty,
) {
    let name = name.as_bytes().to_vec();
    serve(client, req, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.namespace
            .xattrs
            .removexattr(ctx, &c.cache.inode(ino.0), &name)?;
        done(reply);
        Ok(())
    });
}
