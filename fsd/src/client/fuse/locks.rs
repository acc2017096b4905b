//! File locks.

use std::sync::Arc;

use fuser::{ReplyEmpty, ReplyLock};

use super::convert::error_of;
use super::{done, serve};
use crate::client::Client;
use crate::client::locks::type_of;
use crate::wire::LockSpec;

pub(super) fn getlk(client: &Arc<Client>, lock: LockSpec, reply: ReplyLock) {
    serve(client, reply, ReplyLock::error, move |c, ctx, reply| {
        let found = c.getlk(ctx, lock)?;
        if let Some(reply) = reply.take() {
            match found {
                // A process of another host has no number here.
                Some(l) => {
                    let pid = if l.owner.node == c.node.0 { l.pid } else { 0 };
                    reply.locked(l.range.start, l.range.end, type_of(l.kind), pid);
                }
                None => reply.locked(0, 0, libc::F_UNLCK, 0),
            }
        }
        Ok(())
    });
}

/// `sleep`: wait for a lock that is taken.
pub(super) fn setlk(client: &Arc<Client>, lock: LockSpec, sleep: bool, reply: ReplyEmpty) {
    if sleep && lock.kind.is_some() {
        return client.setlk_wait(lock, move |result| match result {
            Ok(()) => reply.ok(),
            Err(e) => reply.error(error_of(e)),
        });
    }
    serve(client, reply, ReplyEmpty::error, move |c, ctx, reply| {
        c.setlk(ctx, lock)?;
        done(reply);
        Ok(())
    });
}
