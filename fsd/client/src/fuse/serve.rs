//! How a request finds a thread, and its answer.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fuser::ReplyEmpty;

use super::convert::error_of;
use crate::client::Client;
use crate::session::ctx::{Ctx, Res, Stop};

/// Names are never cached by the kernel: taking them back could deadlock with a create under way.
pub(super) const NAME_TTL: Duration = Duration::ZERO;

/// A request that can be tried more than once; `T` is its reply, taken when it is answered.
pub(super) fn serve<T: Send + 'static>(
    client: &Arc<Client>,
    reply: T,
    refuse: fn(T, fuser::Errno),
    mut step: impl FnMut(&Arc<Client>, &Ctx<'_>, &mut Option<T>) -> Res<()> + Send + 'static,
) {
    client.session.counters.requests.fetch_add(1, Ordering::Relaxed);
    let mut reply = Some(reply);
    let result = step(client, &Ctx::on_loop(&client.session.threads.permits), &mut reply);
    match result {
        Ok(()) => {}
        Err(Stop::Park) if reply.is_some() => {
            client.session.counters.parked.fetch_add(1, Ordering::Relaxed);
            let me = Arc::clone(client);
            client.session.threads.workers.run(move || {
                let result = step(&me, &Ctx::on_worker(), &mut reply);
                if let (Err(stop), Some(reply)) = (result, reply) {
                    refuse(reply, error_of(stop.errno()));
                }
            });
        }
        Err(stop) => {
            if let Some(reply) = reply {
                refuse(reply, error_of(stop.errno()));
            }
        }
    }
}

pub(super) fn done(reply: &mut Option<ReplyEmpty>) {
    if let Some(reply) = reply.take() {
        reply.ok();
    }
}
