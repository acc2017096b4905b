//! The connection to the metadata server.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use rdma_transport::Connection;
use rt::time::Instant;

use super::{Net, RETRY};
use fsd_proto::ask;
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{JoinReply, MetaReply, MetaRequest, Time};

/// Most exchanges of a newcomer to find out about the clocks, where the first ones took too long to tell.
pub(super) const EXCHANGES: usize = 5;
/// No further one after this: on a link that is slow for good it would tell no more.
const EXCHANGES_FOR: Duration = Duration::from_secs(8);

/// A request to the metadata server.
pub trait AskMeta: ask::Request<Message = MetaRequest, Answer = MetaReply> {}

impl<R: ask::Request<Message = MetaRequest, Answer = MetaReply>> AskMeta for R {}

impl Net {
    /// Connects to the metadata server, trying until the deadline: it may just be starting again.
    pub(super) fn connect_meta(&self, deadline: Instant) -> Result<Arc<dyn Connection>, RpcError> {
        loop {
            match self.fabric.connect(&self.meta_addr) {
                Ok(conn) => return Ok(conn),
                Err(error) => self.pause(deadline, error)?,
            }
        }
    }

    /// Finds out how far the metadata server's clock is ahead of this host's. A busy host can take longer over an exchange than the
    /// clocks may be apart, so that is repeated until it tells, at most so many times.
    pub(super) fn compare_clocks(
        &self,
        conn: &Arc<dyn Connection>,
        exchanges: usize,
    ) -> Result<Skew, RpcError> {
        let begun = Instant::now();
        let mut skew = Skew::UNKNOWN;
        for exchange in 0..exchanges {
            if exchange > 0 {
                rt::thread::sleep(RETRY);
            }
            // The one that measures first: what happens between the two makes the bounds wider, not wrong.
            let start = Instant::now();
            let sent = Time::now();
            let theirs = ask::ask_on(&self.calls, conn, ask::meta::Clock {}, self.timeout())?;
            skew = skew.and(Skew::of_exchange(sent, theirs, start.elapsed()));
            if skew.verdict() != Verdict::Unsure || begun.elapsed() > EXCHANGES_FOR {
                break;
            }
        }
        tracing::debug!("the clock of this host is {skew} the metadata server's");
        self.clock.set(skew);
        Ok(skew)
    }

    pub(super) fn join_on(
        &self,
        conn: &Arc<dyn Connection>,
        again: Option<(u16, u8)>,
        skew: Skew,
    ) -> Result<JoinReply, RpcError> {
        let locks = self.owner().map(|o| o.held_locks()).unwrap_or_default();
        let request = ask::meta::Join {
            again,
            life: self.life,
            listen: self.fabric.local_addr(),
            name: self.name.clone(),
            skew,
            locks,
            durable: self.log.durable(),
        };
        ask::ask_on(&self.calls, conn, request, self.timeout())
    }

    pub(super) fn meta_conn(&self, deadline: Instant) -> Result<Arc<dyn Connection>, RpcError> {
        if let Some(conn) = self.meta.read().as_ref().filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let _one = self.meta_connecting.lock();
        if let Some(conn) = self.meta.read().as_ref().filter(|c| c.is_alive()) {
            return Ok(Arc::clone(conn));
        }
        let joined = self.joined.get().ok_or(RpcError::Errno(Errno(libc::ENOTCONN)))?;
        let conn = self.connect_meta(deadline)?;
        // It is let in whatever that says, and had better not be late for that.
        let skew = self.compare_clocks(&conn, 1)?;
        let back = self.join_on(&conn, Some((joined.node, joined.incarnation)), skew)?;
        self.tell_again(&conn, &back)?;
        tracing::info!("connected to the metadata server again");
        *self.meta.write() = Some(Arc::clone(&conn));
        Ok(conn)
    }

    /// Asks the metadata server; repeats the request on a new connection where the old one broke.
    ///
    /// # Errors
    /// Its refusal, or no answer within the time limit.
    pub fn meta<R: AskMeta>(&self, request: R) -> Result<R::Reply, RpcError> {
        ask::answer_to::<R>(self.meta_message(&request.message())?)
    }

    /// As [`Net::meta`], with what goes over the wire.
    fn meta_message(&self, request: &MetaRequest) -> Result<MetaReply, RpcError> {
        let patience = self.patience();
        let deadline = Instant::now() + patience;
        loop {
            let conn = self.meta_conn(deadline)?;
            match self.calls.call(&conn, request, patience) {
                Err(RpcError::Transport(error)) => self.pause(deadline, error)?,
                other => return other.map(|reply| self.taken(request, reply)),
            }
        }
    }

    /// As [`Net::meta`], for what must not get lost: it is asked again until the server answers or the mount stops.
    ///
    /// # Errors
    /// Its refusal; the mount stops.
    fn meta_hard(&self, request: &MetaRequest) -> Result<MetaReply, RpcError> {
        loop {
            match self.meta_message(request) {
                Err(error) if error.is_transport() && !self.stopping.load(Ordering::Acquire) => {
                    tracing::warn!("the metadata server cannot be reached, and is asked again: {error}");
                    rt::thread::sleep(RETRY);
                }
                other => return other,
            }
        }
    }

    /// Sends a request to the metadata server; `done` gets the answer on some thread. A connection that
    /// breaks meanwhile makes it a background request, which waits for the server as long as the mount lives.
    pub fn meta_async<R: AskMeta>(
        &self,
        request: R,
        done: impl FnOnce(Result<R::Reply, RpcError>) + Send + 'static,
    ) {
        let request = request.message();
        let done = move |result: Result<MetaReply, RpcError>| done(result.and_then(ask::answer_to::<R>));
        let conn = self.meta.read().as_ref().filter(|c| c.is_alive()).cloned();
        let (me, workers) = (Weak::clone(&self.me), self.workers.clone());
        let later = move |request: MetaRequest, done: Box<dyn FnOnce(Result<MetaReply, RpcError>) + Send>| {
            workers.run(move || {
                if let Some(net) = me.upgrade() {
                    done(net.meta_hard(&request));
                }
            });
        };
        let done: Box<dyn FnOnce(Result<MetaReply, RpcError>) + Send> = Box::new(done);
        match conn {
            None => later(request, done),
            Some(conn) => {
                let again = request.clone();
                let net = Weak::clone(&self.me);
                self.calls
                    .call_async(&conn, &request, move |result| match (result, net.upgrade()) {
                        (Err(RpcError::Transport(_)), _) => later(again, done),
                        (Ok(reply), Some(net)) => done(Ok(net.taken(&again, reply))),
                        (Ok(MetaReply::Ordered { reply, .. }), None) => done(Ok(*reply)),
                        (other, _) => done(other),
                    });
            }
        }
    }

    /// Is there a connection to the metadata server, as far as is known?
    #[must_use]
    pub fn has_meta(&self) -> bool {
        self.meta.read().as_ref().is_some_and(|c| c.is_alive())
    }

    /// A request whose answer may take for ever (waiting for a file lock).
    ///
    /// # Errors
    /// The connection failed at once.
    pub fn meta_slow<R: AskMeta>(
        &self,
        request: R,
        done: impl FnOnce(Result<R::Reply, RpcError>) + Send + 'static,
    ) -> Result<(), RpcError> {
        let conn = self.meta_conn(Instant::now() + self.timeout())?;
        self.calls.call_async(
            &conn,
            &request.message(),
            move |result: Result<MetaReply, RpcError>| {
                done(result.and_then(ask::answer_to::<R>));
            },
        );
        Ok(())
    }
}
