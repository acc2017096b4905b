//! How a request finds a thread, and its answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuser::ReplyEmpty;

use super::convert::error_of;
use crate::client::Client;
use crate::session::ctx::{Ctx, Res, Stop};
use crate::session::term::Term;

/// Names are never cached by the kernel: taking them back could deadlock with a create under way.
pub(super) const NAME_TTL: Duration = Duration::ZERO;

/// A reply that has not been sent. It is sent only while the mount may act: by then others may have what it was made from.
pub(super) struct Pending<T> {
    reply: Option<T>,
    refuse: fn(T, fuser::Errno),
    term: Arc<Term>,
}

impl<T> Pending<T> {
    /// The reply, to be sent now. A mount that is frozen waits; one that is thawed has all it had, and nobody else has got it. None
    /// if it was sent before, or if the mount has been declared dead: then it is refused here.
    pub(super) fn take(&mut self) -> Option<T> {
        if let Err(errno) = self.term.hold() {
            self.fail(Stop::Errno(errno));
        }
        self.reply.take()
    }

    fn fail(&mut self, stop: Stop) {
        if let Some(reply) = self.reply.take() {
            (self.refuse)(reply, error_of(stop.errno()));
        }
    }
}

/// A request that can be tried more than once; `T` is its reply, taken when it is answered.
pub(super) fn serve<T: Send + 'static>(
    client: &Arc<Client>,
    reply: T,
    refuse: fn(T, fuser::Errno),
    mut step: impl FnMut(&Arc<Client>, &Ctx<'_>, &mut Pending<T>) -> Res<()> + Send + 'static,
) {
    client.session.counters.requests.fetch_add(1, Ordering::Relaxed);
    let mut pending = Pending {
        reply: Some(reply),
        refuse,
        term: Arc::clone(&client.session.term),
    };
    let mut step = move |client: &Arc<Client>, ctx: &Ctx<'_>, pending: &mut Pending<T>| {
        if !pending.term.is_valid() {
            ctx.may_wait()?;
            pending.term.hold()?;
        }
        step(client, ctx, pending)
    };
    match step(
        client,
        &Ctx::on_loop(&client.session.threads.permits),
        &mut pending,
    ) {
        Ok(()) => {}
        Err(Stop::Park) if pending.reply.is_some() => {
            client.session.counters.parked.fetch_add(1, Ordering::Relaxed);
            let me = Arc::clone(client);
            client.session.threads.workers.run(move || {
                if let Err(stop) = step(&me, &Ctx::on_worker(), &mut pending) {
                    pending.fail(stop);
                }
            });
        }
        Err(stop) => pending.fail(stop),
    }
}

pub(super) fn done(reply: &mut Pending<ReplyEmpty>) {
    if let Some(reply) = reply.take() {
        reply.ok();
    }
}
