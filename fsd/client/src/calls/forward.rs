//! Forwarded operations: a call that is done where the lease is, for that costs two messages and taking the lease more.
//!
//! Whoever lost a lease remembers to whom, and sends its calls there. The owner does them under its lease, writes to the
//! storage nodes before it answers (so that its end takes nothing with it that others were told is written), and has the
//! forwarder take the lease where forwarded operations would cost more: one that comes alone, reads that nobody writes between, a
//! kernel that writes at the owner's, a file that grows. A hint that is wrong costs a message.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use distfuse_abi::{Act as Asked, Answer, Call};
use lockmgr::{Guard, Mode, NodeId, OwnerWord, RecordLayout};
use rdma_transport::Op;
use rt::sync::Mutex;
use rt::time::Instant;

use crate::cache::Cache;
use crate::cache::inode::Inode;
use crate::calls::here::{Admission, Here, called_write, mode_of};
use crate::calls::space::SpaceCalls;
use crate::data::reading::Reads;
use crate::data::stored::Stored;
use crate::data::writing::Writing;
use crate::kernel::delegations::Delegations;
use crate::kernel::extension::Extension;
use crate::namespace::xattrs::Xattrs;
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop};
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, Responder, RpcError};
use fsd_proto::wire::{Act, Visited};

/// Other mounts asked, one after the other, before the lease is: two by hearsay, then the one that its record names.
const HOPS: u32 = 2;

/// Calls that another mount was asked to do.
#[derive(Debug, Default)]
pub(crate) struct Away {
    next: AtomicU64,
    calls: Mutex<HashMap<u64, Sent>>,
}

/// A call at another mount.
#[derive(Debug)]
struct Sent {
    call: Call,
    peer: u16,
    since: Instant,
}

impl Away {
    fn begin(&self, call: Call, peer: u16) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let since = Instant::now();
        self.calls.lock().insert(number, Sent { call, peer, since });
        number
    }

    /// False: it has been given up, and its number may be another's.
    fn end(&self, number: u64) -> bool {
        self.calls.lock().remove(&number).is_some()
    }

    fn give_up(&self, after: Duration) -> Vec<Call> {
        self.take_back(|sent| sent.since.elapsed() > after)
    }

    fn take_back(&self, which: impl Fn(&Sent) -> bool) -> Vec<Call> {
        let mut calls = self.calls.lock();
        let taken = calls.extract_if(|_, sent| which(sent));
        taken.map(|(_, sent)| sent.call).collect()
    }
}

/// Forwarded operations.
pub struct Forward {
    /// Operations that another mount was asked to do.
    pub(crate) away: Away,
    pub(crate) session: Arc<Session>,
    pub(crate) cache: Arc<Cache>,
    pub(crate) delegations: Arc<Delegations>,
    pub(crate) stored: Arc<Stored>,
    pub(crate) reads: Arc<Reads>,
    pub(crate) writing: Arc<Writing>,
    pub(crate) xattrs: Arc<Xattrs>,
    pub(crate) space_calls: Arc<SpaceCalls>,
    pub(crate) here: Arc<Here>,
}

impl Forward {
    /// Does what a task wants, here or where the lease is. It sleeps until then.
    pub(crate) fn answer_call(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        let (me, ext) = (Arc::clone(self), Arc::clone(ext));
        self.session.in_term(move |held| match held {
            Ok(()) => me.answer_in_term(&ext, call),
            Err(errno) => ext.answer(&call, Answer::Failed(errno.0)),
        });
    }

    fn answer_in_term(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        if call.act == Asked::Space {
            return self.space_calls.provide_space(ext, call);
        }
        let inode = self.cache.inode(call.ino);
        let here = match mode_of(&call) {
            Mode::Shared => self.cache.holds(&inode),
            Mode::Exclusive => self.cache.holds_exclusively(&inode),
        };
        match inode.peer().filter(|_| !here) {
            Some(peer) => self.send(ext, call, peer, HOPS),
            None => self.here.call_here(ext, call),
        }
    }

    fn send(self: &Arc<Self>, ext: &Arc<Extension>, call: Call, peer: u16, hops: u32) {
        let act = match call.act {
            Asked::Read => Act::Read(call.len),
            Asked::Write { kill_priv } => Act::Write {
                data: ext.data_of(&call),
                kill_priv,
            },
            Asked::Space => return self.space_calls.provide_space(ext, call),
        };
        let request = ask::mount::Visit {
            ino: call.ino,
            offset: call.offset,
            act,
        };
        let number = self.away.begin(call, peer);
        let (me, theirs) = (Arc::clone(self), Arc::clone(ext));
        let asked = self.session.net.peers.ask(NodeId(peer), request, move |result| {
            if me.away.end(number) {
                me.sent(&theirs, call, peer, hops, result);
            }
        });
        if asked.is_none() && self.away.end(number) {
            self.here.call_here(ext, call);
        }
    }

    fn sent(
        self: &Arc<Self>,
        ext: &Arc<Extension>,
        call: Call,
        peer: u16,
        hops: u32,
        result: Result<Visited, RpcError>,
    ) {
        let answer = match (call.act, result) {
            (Asked::Read, Ok(Visited::Read(data))) if data.len() <= call.len as usize => {
                ext.attachment.fill_buffer(call.number, &data);
                Answer::Done(data.len() as u32)
            }
            (Asked::Write { .. }, Ok(Visited::Written)) => Answer::Done(call.len),
            (_, Ok(Visited::Elsewhere(Some(next))))
                if hops > 1 && next != peer && next != self.session.node.0 =>
            {
                return self.send(ext, call, next, hops - 1);
            }
            (_, Ok(Visited::Elsewhere(_))) if hops > 0 => return self.look_up(ext, call),
            // Whether it was written is not known: to do it again might undo what others have written since.
            (Asked::Write { .. }, Err(error @ (RpcError::Transport(_) | RpcError::Wire(_)))) => {
                tracing::error!("a write of {:#x} at mount {peer}: {error}", call.ino);
                Answer::Failed(libc::EIO)
            }
            (_, Ok(Visited::Failed(Errno(error)))) => Answer::Failed(error),
            _ => return self.here.call_here(ext, call),
        };
        self.cache.inode(call.ino).heard_of(peer);
        self.session.counters.sent.fetch_add(1, Ordering::Relaxed);
        self.here.answer(ext, call, answer);
    }

    /// Reads in the lease's record who owns it, and sends the call there.
    fn look_up(self: &Arc<Self>, ext: &Arc<Extension>, call: Call) {
        let (me, ext) = (Arc::clone(self), Arc::clone(ext));
        self.session
            .threads
            .workers
            .run(move || match me.owner_of(call.ino) {
                Some(owner) if owner != me.session.node.0 => me.send(&ext, call, owner, 0),
                _ => me.here.call_here(&ext, call),
            });
    }

    fn owner_of(&self, ino: u64) -> Option<u16> {
        let (conn, record) = self
            .session
            .net
            .storage
            .record(fsd_proto::ino::record(ino))
            .ok()?;
        let mut word = [0; 8];
        let at = record.plus(RecordLayout::OWNER);
        conn.execute(&mut [Op::Read { at, into: &mut word }]).ok()?;
        let owner = OwnerWord::decode(u64::from_ne_bytes(word)).writer?;
        Some(owner.0)
    }

    /// Ends calls that another mount does not answer, although it can be reached.
    pub(crate) fn give_up_calls(&self, ext: &Extension) {
        let Some(limit) = self.session.longest_wait() else {
            return;
        };
        for call in self.away.give_up(limit) {
            tracing::error!("another mount has not answered a read or write for {limit:?}");
            ext.answer(&call, Answer::Failed(libc::ETIMEDOUT));
        }
    }

    /// Another mount does not answer just now: what it was to read is read here. What it was to write it may have written, so its
    /// answer is waited for.
    pub(crate) fn take_back_reads(self: &Arc<Self>, peer: u16) {
        let reads = self
            .away
            .take_back(|sent| sent.peer == peer && matches!(sent.call.act, Asked::Read));
        for call in reads {
            self.here.call_here(&self.delegations.ext, call);
        }
    }

    /// Another mount wants something done under the lease that it thinks is here. Called on a thread that must not wait.
    pub fn receive(self: &Arc<Self>, from: u16, ino: u64, offset: u64, act: Act, responder: Responder) {
        let ext = &self.delegations.ext;
        // Writing has to wait for the storage nodes, and must not begin twice.
        if matches!(act, Act::Read(_))
            && let Ok(done) = self.carry_out(&Ctx::on_loop(&ext.nobody_waits), ext, from, ino, offset, &act)
        {
            return self.reply(responder, done);
        }
        let (me, ext) = (Arc::clone(self), Arc::clone(ext));
        self.session.threads.workers.run(move || {
            let done = me.carry_out(&Ctx::on_worker(), &ext, from, ino, offset, &act);
            // Nothing was done: whoever takes the lease is told why by the servers.
            me.reply(responder, done.unwrap_or(Visited::Take));
        });
    }

    /// Answers another mount, and what was read only while this one may act. What was written is at the storage nodes, which refuse the
    /// dead, so that it was written in time.
    fn reply(&self, responder: Responder, done: Visited) {
        if !matches!(done, Visited::Read(_)) {
            return responder.reply(&Ok(done));
        }
        self.session
            .in_term(move |held| responder.reply(&Ok(held.map_or(Visited::Take, |()| done))));
    }

    /// Enters under a lease that is here, or on its way to here: a forwarder that took it then would only take it away again.
    fn enter_for_forwarded(
        &self,
        ctx: &Ctx<'_>,
        ext: &Extension,
        inode: &Inode,
        writes: bool,
    ) -> Res<Option<Guard>> {
        let record = inode.record();
        // Who shares the lease can read for others, too; for writing somebody has to take it from all who do.
        let least = if writes { Mode::Exclusive } else { Mode::Shared };
        let here = [Mode::Exclusive, least];
        let guard = here
            .into_iter()
            .find_map(|mode| self.session.leases.try_enter(record, mode));
        if guard.is_some() || !self.session.leases.is_awaited(record) {
            return Ok(guard);
        }
        ctx.may_wait()?;
        match self
            .cache
            .lease(&Ctx::on_loop(&ext.waiting_forwarded), inode, least)
        {
            Err(Stop::Park) => Ok(None),
            entered => entered.map(Some),
        }
    }

    fn carry_out(
        &self,
        ctx: &Ctx<'_>,
        ext: &Extension,
        from: u16,
        ino: u64,
        offset: u64,
        act: &Act,
    ) -> Res<Visited> {
        let Some(inode) = self.cache.inodes.find(ino) else {
            return Ok(Visited::Elsewhere(None));
        };
        let writes = matches!(act, Act::Write { .. });
        let Some(guard) = self.enter_for_forwarded(ctx, ext, &inode, writes)? else {
            let held = self.cache.holds(&inode);
            return Ok(if held {
                Visited::Take
            } else {
                Visited::Elsewhere(inode.peer())
            });
        };
        if writes {
            self.xattrs.drop_capability(ctx, &inode, &guard)?;
        }
        let Admission::Go(_calling) = self
            .here
            .admit(ext, &inode, distfuse_abi::Mode::Exclusive, writes)
        else {
            return Ok(Visited::Take);
        };
        if inode.delegation.state.lock().forwarders.are_enough(from, writes) {
            return Ok(Visited::Take);
        }
        let done = match act {
            Act::Read(len) => {
                let len = (*len as usize).min(distfuse_abi::layout::BUFFER_SIZE);
                let mut state = self
                    .reads
                    .claim_to_read(ctx, &inode, guard.version(), offset, len)?;
                let data = self.reads.read_held(ctx, &inode, &mut state, offset, len, true)?;
                Visited::Read(data.to_vec())
            }
            Act::Write { data, kill_priv } => {
                let mut state = self.stored.claim_to_change(ctx, &inode, guard.version())?;
                let size = self.cache.load_attr(ctx, &inode, &mut state)?.size;
                // How long a file is only its owner knows until it says so.
                if offset.checked_add(data.len() as u64).is_none_or(|end| end > size) {
                    return Ok(Visited::Take);
                }
                self.here
                    .call_write(ctx, &inode, &mut state, &called_write(offset, data, *kill_priv))?;
                match self.writing.flush_pages(ctx, &inode, &mut state) {
                    Ok(()) => Visited::Written,
                    // It is written here, and may be seen, and may not last.
                    Err(stop) => Visited::Failed(stop.errno()),
                }
            }
        };
        inode.delegation.state.lock().forwarded(from, writes);
        self.session.counters.visits.fetch_add(1, Ordering::Relaxed);
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_ends_once() {
        let away = Away::default();
        let call = Call {
            number: 7,
            ino: 1,
            offset: 0,
            len: 1,
            act: Asked::Read,
        };
        let (first, second, third) = (away.begin(call, 1), away.begin(call, 1), away.begin(call, 2));
        assert!(away.end(first) && !away.end(first));
        assert_eq!(away.take_back(|sent| sent.peer == 2), [call]);
        assert!(!away.end(third));
        assert!(away.give_up(Duration::from_secs(60)).is_empty());
        assert_eq!(away.give_up(Duration::ZERO), [call]);
        assert!(!away.end(second));
    }
}
