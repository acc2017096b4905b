//! How a request finds a thread, and its answer.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use fuser::{ReplyEmpty, Request};
use rt::sync::Mutex;

use super::convert::{caller_of, error_of};
use crate::client::Client;
use crate::session::Session;
use crate::session::busy::UnderWay;
use crate::session::caller::Caller;
use crate::session::ctx::{Ctx, Res, Stop};
use crate::session::waiting::{Until, Waits};
use fsd_proto::rpc::Errno;

/// Names are never cached by the kernel: taking them back could deadlock with a create under way.
pub(super) const NAME_TTL: Duration = Duration::ZERO;

/// A reply, and who waits for it.
struct Slot<T> {
    reply: Mutex<Option<T>>,
    refuse: fn(T, fuser::Errno),
    waits: OnceLock<Waits>,
    _under_way: UnderWay,
}

impl<T> Slot<T> {
    fn refuse(&self, errno: Errno) {
        // Not in the condition: the answer is a system call.
        let reply = self.reply.lock().take();
        if let Some(reply) = reply {
            (self.refuse)(reply, error_of(errno));
        }
    }
}

/// A reply that has not been sent. It is sent only while the mount may act: by then others may have what it was made from. A process
/// that waits for it and is killed is answered at once; what it asked for goes on, and ends where it can.
pub(super) struct Pending<T> {
    slot: Arc<Slot<T>>,
    session: Arc<Session>,
    caller: Option<Caller>,
}

impl<T: Send + 'static> Pending<T> {
    /// A reply for a process, or, without one, for the kernel itself, which waits until it comes.
    pub(super) fn new(
        session: &Arc<Session>,
        caller: Option<Caller>,
        reply: T,
        refuse: fn(T, fuser::Errno),
    ) -> Self {
        Self {
            slot: Arc::new(Slot {
                reply: Mutex::new(Some(reply)),
                refuse,
                waits: OnceLock::new(),
                _under_way: session.threads.busy.begin(),
            }),
            session: Arc::clone(session),
            caller: caller.filter(|caller| caller.pid != 0),
        }
    }

    /// The process begins to wait: from then on it is looked at.
    pub(super) fn watch(&self) {
        let Some(caller) = self.caller else { return };
        self.slot.waits.get_or_init(|| {
            let slot = Arc::downgrade(&self.slot);
            self.session.threads.waiting.begin(caller, Until::Death, move || {
                if let Some(slot) = slot.upgrade() {
                    slot.refuse(Errno(libc::EINTR));
                }
            })
        });
    }

    /// The reply, to be sent now. A mount that is frozen waits; one that is thawed has all it had, and nobody else has got it. None
    /// if it was sent before, if its process was killed, or if the mount has been declared dead: then it is refused here.
    pub(super) fn take(&self) -> Option<T> {
        if !self.session.term.is_valid() {
            self.watch();
            if let Err(errno) = self.session.term.hold() {
                self.slot.refuse(errno);
            }
        }
        self.slot.reply.lock().take()
    }

    /// Waits while the mount is frozen, before anything is done.
    pub(super) fn hold(&self, ctx: &Ctx<'_>) -> Res<()> {
        if !self.session.term.is_valid() {
            ctx.may_wait()?;
            self.session.term.hold()?;
        }
        Ok(())
    }

    /// Has it not been sent?
    pub(super) fn is_open(&self) -> bool {
        self.slot.reply.lock().is_some()
    }

    pub(super) fn fail(&self, stop: Stop) {
        self.slot.refuse(stop.errno());
    }
}

/// A request of a process that can be tried more than once; `T` is its reply, taken when it is answered.
pub(super) fn serve<T: Send + 'static>(
    client: &Arc<Client>,
    req: &Request,
    reply: T,
    refuse: fn(T, fuser::Errno),
    step: impl FnMut(&Arc<Client>, &Ctx<'_>, &Pending<T>) -> Res<()> + Send + 'static,
) {
    run(
        client,
        Pending::new(&client.session, Some(caller_of(req)), reply, refuse),
        step,
    );
}

/// As [`serve`], of the kernel itself: no process waits for it.
pub(super) fn serve_kernel<T: Send + 'static>(
    client: &Arc<Client>,
    reply: T,
    refuse: fn(T, fuser::Errno),
    step: impl FnMut(&Arc<Client>, &Ctx<'_>, &Pending<T>) -> Res<()> + Send + 'static,
) {
    run(client, Pending::new(&client.session, None, reply, refuse), step);
}

fn run<T: Send + 'static>(
    client: &Arc<Client>,
    pending: Pending<T>,
    mut step: impl FnMut(&Arc<Client>, &Ctx<'_>, &Pending<T>) -> Res<()> + Send + 'static,
) {
    client.session.counters.requests.fetch_add(1, Ordering::Relaxed);
    let mut step = move |client: &Arc<Client>, ctx: &Ctx<'_>, pending: &Pending<T>| {
        pending.hold(ctx)?;
        step(client, ctx, pending)
    };
    let watch = || pending.watch();
    let ctx = Ctx::on_loop(&client.session.threads.permits).telling(&watch);
    let result = step(client, &ctx, &pending);
    drop(ctx);
    match result {
        Ok(()) => {}
        Err(Stop::Park) if pending.is_open() => {
            client.session.counters.parked.fetch_add(1, Ordering::Relaxed);
            pending.watch();
            let me = Arc::clone(client);
            client.session.threads.workers.run(move || {
                if let Err(stop) = step(&me, &Ctx::on_worker(), &pending) {
                    pending.fail(stop);
                }
            });
        }
        Err(stop) => pending.fail(stop),
    }
}

/// The kernel was not told of this open file: its process was killed while it waited for that.
pub(super) fn unopened(client: &Arc<Client>, handle: u64) {
    let me = Arc::clone(client);
    let under_way = client.session.threads.busy.begin();
    client.session.threads.workers.run(move || {
        let _under_way = under_way;
        if let Err(stop) = me.opens.open_files.release(&Ctx::on_worker(), handle) {
            tracing::warn!(
                "a file that was opened for nobody cannot be closed: {}",
                stop.errno()
            );
        }
    });
}

/// The kernel was not told of this inode, which was counted to be known to it.
pub(super) fn unnamed(client: &Arc<Client>, ino: u64) {
    let me = Arc::clone(client);
    let under_way = client.session.threads.busy.begin();
    // The inode is locked here.
    client.session.threads.workers.run(move || {
        let _under_way = under_way;
        me.revoke.forgetting.forget(ino, 1);
    });
}

pub(super) fn done(reply: &Pending<ReplyEmpty>) {
    if let Some(reply) = reply.take() {
        reply.ok();
    }
}
