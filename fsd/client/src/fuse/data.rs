//! Reading and writing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{INodeNo, ReplyData, ReplyWrite, Request};

use super::convert::{caller_of, error_of};
use super::serve::{Pending, serve};
use crate::cache::MAX_FILE_SIZE;
use crate::cache::inode::Inode;
use crate::cache::write::{Queued, Write};
use crate::client::Client;
use crate::opens::handles::Handle;
use crate::session::ctx::{Ctx, Permits, Res, Stop};
use crate::storing::syncing::Scope;
use fsd_node::config::CacheMode;

/// `fills`: the kernel puts what it gets into its page cache.
pub(super) fn read(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    offset: u64,
    size: u32,
    fills: bool,
    reply: ReplyData,
) {
    serve(client, req, reply, ReplyData::error, move |c, ctx, reply| {
        let (inode, len) = (c.cache.inode(ino.0), size as usize);
        c.files.opened.read(ctx, &inode, offset, len, fills, |data| {
            if let Some(reply) = reply.take() {
                reply.data(data);
            }
        })
    });
}

/// `mapped`: the pages come from the kernel's page cache, which may hold them locked.
pub(super) fn write(
    client: &Arc<Client>,
    req: &Request,
    ino: INodeNo,
    write: &Write<'_>,
    mapped: bool,
    reply: ReplyWrite,
) {
    client.session.counters.requests.fetch_add(1, Ordering::Relaxed);
    let inode = client.cache.inode(ino.0);
    if mapped {
        return write_mapped(client, inode, write, reply);
    }
    let pending = Pending::new(&client.session, Some(caller_of(req)), reply, ReplyWrite::error);
    // The data is only borrowed here: the first attempt uses it in place.
    if client.session.term.is_valid() {
        let watch = || pending.watch();
        let ctx = Ctx::on_loop(&client.session.threads.permits).telling(&watch);
        match client.files.writes.write(&ctx, &inode, write) {
            Err(Stop::Park) => {}
            result => return written(&pending, result),
        }
    }
    pending.watch();
    let (me, queued) = (Arc::clone(client), Queued::from(write));
    client.session.counters.parked.fetch_add(1, Ordering::Relaxed);
    client.session.threads.workers.run(move || {
        let ctx = Ctx::on_worker();
        let held = pending.hold(&ctx);
        let result = held.and_then(|()| me.files.writes.write(&ctx, &inode, &queued.write()));
        written(&pending, result);
    });
}

fn written(pending: &Pending<ReplyWrite>, result: Res<u32>) {
    match result {
        Ok(n) => {
            if let Some(reply) = pending.take() {
                reply.written(n);
            }
        }
        Err(stop) => pending.fail(stop),
    }
}

/// A write that is answered when it is durable: on a worker at once, for it will wait.
pub(super) fn write_sync(
    client: &Arc<Client>,
    req: &Request,
    handle: Arc<Handle>,
    write: &Write<'_>,
    scope: Scope,
    reply: ReplyWrite,
) {
    client.session.counters.requests.fetch_add(1, Ordering::Relaxed);
    let (me, queued) = (Arc::clone(client), Queued::from(write));
    let pending = Pending::new(&client.session, Some(caller_of(req)), reply, ReplyWrite::error);
    pending.watch();
    client.session.threads.workers.run(move || {
        let ctx = Ctx::on_worker();
        let done = pending
            .hold(&ctx)
            .and_then(|()| me.files.writes.write(&ctx, &handle.inode, &queued.write()));
        let durable = done.and_then(|n| {
            me.files
                .opened
                .fsync(&ctx, &handle.inode, Some(&handle.seen), scope)?;
            Ok(n)
        });
        written(&pending, durable);
    });
}

/// A write of mapped pages: answered when applied, or when a revocation cannot wait for that. So it is known to revocations before it
/// waits for anything.
fn write_mapped(client: &Arc<Client>, inode: Arc<Inode>, write: &Write<'_>, reply: ReplyWrite) {
    let len = write.data.len() as u32;
    let under_way = client.session.threads.busy.begin();
    let (number, at_once) = inode.waiting.mapped.begin(Box::new(move |result| match result {
        Ok(()) => reply.written(len),
        Err(error) => reply.error(error_of(error)),
    }));
    if at_once && client.cache.holds_exclusively(&inode) {
        // Not to wait for anything: a revocation may wait for this. The kernel extension writes back before the lease is
        // given up, so there it does not.
        let never = Permits::new(0, 0);
        let permits = if client.kernel.caches.mode == CacheMode::Writeback {
            &client.session.threads.permits
        } else {
            &never
        };
        match client
            .files
            .writes
            .write_pages(&Ctx::on_loop(permits), &inode, write)
        {
            Err(Stop::Park) => {}
            result => {
                let result = result.map(drop).map_err(Stop::errno);
                if let Some(error) = inode.waiting.mapped.end(number, result) {
                    inode.errors.set(error);
                }
                return;
            }
        }
    }
    inode.waiting.mapped.enqueue(number, Queued::from(write));
    let me = Arc::clone(client);
    client.session.threads.workers.run(move || {
        let _under_way = under_way;
        me.files.writes.bring_mapped(&Ctx::on_worker(), &inode, number);
    });
}

pub(super) fn copy_file_range(
    client: &Arc<Client>,
    req: &Request,
    (ino_in, offset_in): (INodeNo, u64),
    (ino_out, offset_out): (INodeNo, u64),
    len: u64,
    reply: ReplyWrite,
) {
    if offset_out.saturating_add(len) > MAX_FILE_SIZE {
        return reply.error(fuser::Errno::EFBIG);
    }
    let caller = caller_of(req);
    serve(client, req, reply, ReplyWrite::error, move |c, ctx, reply| {
        let (from, to) = (c.cache.inode(ino_in.0), c.cache.inode(ino_out.0));
        let n = c
            .files
            .opened
            .copy_range(ctx, (&from, offset_in), (&to, offset_out), len, caller)?;
        if let Some(reply) = reply.take() {
            reply.written(n);
        }
        Ok(())
    });
}
