//! Group commit: one sync answers everybody who asked before it began.

use std::sync::Arc;
use std::time::Duration;

use rt::channel::{Either, Receiver, Sender, recv_either, unbounded};
use rt::time::Instant;

use super::order::Order;
use crate::error::Refusal;
use fsd_node::store::Store;
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::MetaReply;

/// How often it is looked whether something is to be made durable that nobody waits for.
const TICK: Duration = Duration::from_secs(1);

/// Transactions that nobody asks to be durable are so after this long, as with local file systems.
const SYNC_AFTER: Duration = Duration::from_secs(5);

/// An answer that is given when everything so far is durable.
pub type OnceDurable = (Responder, Result<MetaReply, Errno>);

/// Who waits until everything is durable.
pub struct Commits {
    store: Arc<dyn Store>,
    order: Arc<Order>,
    waiting: Sender<OnceDurable>,
}

impl Commits {
    /// Nobody; what [`Commits::run`] is told.
    pub fn new(store: Arc<dyn Store>, order: Arc<Order>) -> (Self, Receiver<OnceDurable>) {
        let (waiting, told) = unbounded();
        let commits = Self {
            store,
            order,
            waiting,
        };
        (commits, told)
    }

    /// Answers when everything so far is durable.
    pub fn once_durable(&self, responder: Responder, answer: Result<MetaReply, Errno>) {
        if let Err(refused) = self.waiting.send((responder, answer)) {
            let (responder, _) = refused.0;
            responder.reply::<MetaReply>(&Err(Errno(libc::ESHUTDOWN)));
        }
    }

    /// Answers them, and syncs every now and then while anything happens, so that what the mounts have to keep is bounded.
    pub fn run(&self, told: &Receiver<OnceDurable>, stop: &Receiver<()>) {
        let mut pending: Option<Instant> = None;
        loop {
            let first = match recv_either(stop, told, TICK) {
                Either::Second(Ok(first)) => first,
                Either::Neither => {
                    if self.order.executed() == self.order.durable() {
                        pending = None;
                        self.store.tidy();
                    } else if pending.get_or_insert_with(Instant::now).elapsed() >= SYNC_AFTER {
                        pending = None;
                        if let Err(error) = self.order.sync() {
                            tracing::error!("{error}");
                        }
                    }
                    continue;
                }
                Either::First(_) | Either::Second(Err(_)) => return,
            };
            self.answer(std::iter::once(first).chain(told.try_iter()).collect());
        }
    }

    /// Makes everything so far durable, and answers who waits for that.
    pub fn answer(&self, waiting: Vec<OnceDurable>) {
        let result = self.order.sync().map_err(|e| Refusal::Store(e).errno());
        for (responder, answer) in waiting {
            let answer = result.and(answer).map(|reply| match reply {
                MetaReply::Ordered { order, reply, .. } => self.ordered(order, *reply),
                reply => self.ordered(0, reply),
            });
            responder.reply(&answer);
        }
    }

    /// An answer with its place in the order of all.
    pub fn ordered(&self, order: u64, reply: MetaReply) -> MetaReply {
        MetaReply::Ordered {
            order,
            durable: self.order.durable(),
            reply: Box::new(reply),
        }
    }
}
