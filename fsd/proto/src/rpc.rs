//! Requests and answers over fabric messages, and the router that every role's endpoint uses.
//!
//! A request carries a number; its answer carries the same number and `Result<reply, errno>`. The router
//! hands requests and lease messages to the role's [`Service`] on the progress thread, and answers to
//! whoever waits for them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rdma_transport::{ConnId, Connection, Handler, TransportError};
use rt::sync::{Condvar, Mutex};
use rt::time::Instant;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use crate::errno::Errno;
use crate::wire::{self, FrameKind, FrameView, Hello};

/// Why a call has no reply.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RpcError {
    /// The peer answered with an error number.
    #[error("{0}")]
    Errno(Errno),
    /// The connection failed; whether the peer acted on the request is unknown.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The answer cannot be read.
    #[error(transparent)]
    Wire(#[from] wire::WireError),
}

impl RpcError {
    /// True where the same request may succeed on a new connection.
    #[must_use]
    pub fn is_transport(&self) -> bool {
        matches!(self, Self::Transport(_))
    }

    /// True where the peer says that it did not do what it was asked for; else it may have, or may do it yet.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Errno(_))
    }

    /// The error number to show an application.
    #[must_use]
    pub fn errno(&self) -> Errno {
        match self {
            Self::Errno(e) => *e,
            Self::Transport(TransportError::Timeout { .. }) => Errno(libc::ETIMEDOUT),
            Self::Transport(_) | Self::Wire(_) => Errno(libc::EIO),
        }
    }
}

type Answer = Result<Vec<u8>, TransportError>;
type OnAnswer = Box<dyn FnOnce(Answer) + Send>;

/// The calls of this endpoint that wait for an answer.
#[derive(Default)]
pub struct Calls {
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, (ConnId, OnAnswer)>>,
}

/// Where a blocking call's answer is put.
#[derive(Default)]
struct Slot {
    answer: Mutex<Option<Answer>>,
    filled: Condvar,
}

/// A request that was sent, and whose answer has not been looked at.
pub struct Pending<'a> {
    calls: &'a Calls,
    conn: Arc<dyn Connection>,
    number: u64,
    slot: Arc<Slot>,
}

impl Pending<'_> {
    /// Blocks until the answer is there or `timeout` has passed.
    ///
    /// # Errors
    /// [`RpcError`].
    pub fn wait<R: DeserializeOwned>(self, timeout: Duration) -> Result<R, RpcError> {
        let deadline = Instant::now() + timeout;
        let mut answer = self.slot.answer.lock();
        while answer.is_none() {
            if self.slot.filled.wait_until(&mut answer, deadline).timed_out() && answer.is_none() {
                drop(answer);
                self.calls.waiting.lock().remove(&self.number);
                let millis = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
                return Err(TransportError::Timeout {
                    addr: self.conn.peer_addr(),
                    millis,
                }
                .into());
            }
        }
        match answer.take() {
            Some(answer) => read_answer(&answer?),
            None => Err(lost(&self.conn).into()),
        }
    }
}

/// How a request is sent: [`Connection::send`], where its answer is waited for, or [`Connection::queue`].
type Sending = fn(&dyn Connection, &[u8]) -> Result<(), TransportError>;

impl Calls {
    fn start<Q: Serialize>(
        &self,
        conn: &Arc<dyn Connection>,
        request: &Q,
        done: OnAnswer,
        send: Sending,
    ) -> Result<u64, RpcError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let frame = wire::numbered(FrameKind::Request, number, request)?;
        self.waiting.lock().insert(number, (conn.id(), done));
        if let Err(error) = send(&**conn, &frame) {
            // The disconnect may have taken it out first; then `done` has been called.
            self.waiting.lock().remove(&number);
            return Err(error.into());
        }
        // The connection may have broken between the check in `send` and the insertion.
        if !conn.is_alive() {
            self.fail(conn.id(), &lost(conn));
        }
        Ok(number)
    }

    /// Calls and blocks until the answer is there or `timeout` has passed.
    ///
    /// # Errors
    /// [`RpcError`].
    pub fn call<Q: Serialize, R: DeserializeOwned>(
        &self,
        conn: &Arc<dyn Connection>,
        request: &Q,
        timeout: Duration,
    ) -> Result<R, RpcError> {
        self.begin(conn, request)?.wait(timeout)
    }

    /// Sends a request, whose answer is to be waited for: for who asks several servers at once.
    ///
    /// # Errors
    /// The connection failed at once.
    pub fn begin<Q: Serialize>(
        &self,
        conn: &Arc<dyn Connection>,
        request: &Q,
    ) -> Result<Pending<'_>, RpcError> {
        self.begin_by(conn, request, |conn, frame| conn.send(frame))
    }

    /// As [`Calls::begin`], but never waits for room at the peer: for who is in the middle of something else, and bounds what is under way.
    ///
    /// # Errors
    /// As [`Calls::begin`].
    pub fn begin_queued<Q: Serialize>(
        &self,
        conn: &Arc<dyn Connection>,
        request: &Q,
    ) -> Result<Pending<'_>, RpcError> {
        self.begin_by(conn, request, |conn, frame| conn.queue(frame))
    }

    fn begin_by<Q: Serialize>(
        &self,
        conn: &Arc<dyn Connection>,
        request: &Q,
        send: Sending,
    ) -> Result<Pending<'_>, RpcError> {
        let slot = Arc::new(Slot::default());
        let filler = Arc::clone(&slot);
        let number = self.start(
            conn,
            request,
            Box::new(move |answer| {
                *filler.answer.lock() = Some(answer);
                filler.filled.notify_one();
            }),
            send,
        )?;
        Ok(Pending {
            calls: self,
            conn: Arc::clone(conn),
            number,
            slot,
        })
    }

    /// Calls; `done` gets the answer on the progress thread (or here, if the connection is gone). Never waits, so it may be called
    /// with locks held that `done` takes, too; who calls bounds how much is under way.
    pub fn call_async<Q: Serialize, R: DeserializeOwned + 'static>(
        &self,
        conn: &Arc<dyn Connection>,
        request: &Q,
        done: impl FnOnce(Result<R, RpcError>) + Send + 'static,
    ) {
        let done = Arc::new(Mutex::new(Some(done)));
        let on_answer = Arc::clone(&done);
        let started = self.start(
            conn,
            request,
            Box::new(move |answer| {
                let done = on_answer.lock().take();
                if let Some(done) = done {
                    done(answer.map_err(RpcError::from).and_then(|body| read_answer(&body)));
                }
            }),
            |conn, frame| conn.queue(frame),
        );
        if let Err(error) = started {
            let done = done.lock().take();
            if let Some(done) = done {
                done(Err(error));
            }
        }
    }

    fn answered(&self, number: u64, body: &[u8]) {
        let waiting = self.waiting.lock().remove(&number);
        if let Some((_, done)) = waiting {
            done(Ok(body.to_vec()));
        }
    }

    fn fail(&self, conn: ConnId, why: &TransportError) {
        let failed: Vec<OnAnswer> = {
            let mut waiting = self.waiting.lock();
            let numbers: Vec<u64> = waiting
                .iter()
                .filter(|(_, (c, _))| *c == conn)
                .map(|(number, _)| *number)
                .collect();
            numbers
                .iter()
                .filter_map(|n| waiting.remove(n))
                .map(|(_, done)| done)
                .collect()
        };
        for done in failed {
            done(Err(why.clone()));
        }
    }
}

fn lost(conn: &Arc<dyn Connection>) -> TransportError {
    TransportError::Disconnected {
        addr: conn.peer_addr(),
        reason: "the connection ended".into(),
    }
}

fn read_answer<R: DeserializeOwned>(body: &[u8]) -> Result<R, RpcError> {
    wire::decode::<Result<R, Errno>>(body)?.map_err(RpcError::Errno)
}

/// Where the answer to a request goes; may be kept and used later from any thread.
pub struct Responder {
    conn: Arc<dyn Connection>,
    number: u64,
}

impl Responder {
    /// For the request of this number on a connection.
    #[must_use]
    pub fn new(conn: Arc<dyn Connection>, number: u64) -> Self {
        Self { conn, number }
    }

    /// Sends the answer, without waiting for the peer to take it. A connection that has ended swallows it: the caller sees the
    /// disconnect.
    pub fn reply<R: Serialize>(self, answer: &Result<R, Errno>) {
        match wire::numbered(FrameKind::Response, self.number, answer) {
            Ok(frame) => {
                if let Err(error) = self.conn.queue(&frame) {
                    tracing::debug!("answer not delivered: {error}");
                }
            }
            Err(error) => tracing::error!("answer cannot be encoded: {error}"),
        }
    }

    /// The connection the request came on.
    #[must_use]
    pub fn conn(&self) -> &Arc<dyn Connection> {
        &self.conn
    }
}

/// How the sentence begins with which a node refuses connections that it is going to take soon: who is refused so tries again.
const NOT_YET: &str = "not yet: ";

/// The refusal of a node that is not ready.
#[must_use]
pub fn not_yet(why: &str) -> String {
    format!("{NOT_YET}{why}")
}

/// Is it worth trying again?
#[must_use]
pub fn is_not_yet(refusal: &str) -> bool {
    refusal.starts_with(NOT_YET)
}

/// What a role does with what arrives. Called on the progress thread: must not block on the fabric.
pub trait Service: Send + Sync {
    /// May this peer connect?
    ///
    /// # Errors
    /// A sentence for the peer; [`not_yet`] for one that shall come again.
    fn admit(&self, hello: &Hello) -> Result<(), String>;
    /// A request.
    fn request(&self, hello: &Hello, body: &[u8], responder: Responder);
    /// Lease messages.
    fn lease(&self, _hello: &Hello, _conn: &Arc<dyn Connection>, _frame: &[u8]) {}
    /// A peer has connected.
    fn connected(&self, _hello: &Hello, _conn: &Arc<dyn Connection>) {}
    /// A connection (either direction) has ended.
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _hello: Option<&Hello>) {}
}

/// Connects an endpoint's callbacks to the calls that wait and to the role's service.
pub struct Router {
    cluster: String,
    calls: Arc<Calls>,
    service: Arc<dyn Service>,
    hellos: Mutex<HashMap<ConnId, Arc<Hello>>>,
}

impl Router {
    /// A router for one endpoint.
    #[must_use]
    pub fn new(cluster: &str, calls: Arc<Calls>, service: Arc<dyn Service>) -> Arc<Self> {
        Arc::new(Self {
            cluster: cluster.to_owned(),
            calls,
            service,
            hellos: Mutex::default(),
        })
    }

    fn hello(&self, conn: &Arc<dyn Connection>) -> Option<Arc<Hello>> {
        if let Some(hello) = self.hellos.lock().get(&conn.id()) {
            return Some(Arc::clone(hello));
        }
        let hello = Arc::new(Hello::check(conn.peer_identity(), &self.cluster).ok()?);
        self.hellos.lock().insert(conn.id(), Arc::clone(&hello));
        Some(hello)
    }
}

impl Handler for Router {
    fn admit(&self, identity: &[u8]) -> Result<(), String> {
        self.service.admit(&Hello::check(identity, &self.cluster)?)
    }

    fn connected(&self, conn: &Arc<dyn Connection>) {
        if let Some(hello) = self.hello(conn) {
            self.service.connected(&hello, conn);
        }
    }

    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        match wire::parse(message) {
            Ok(FrameView::Response(number, body)) => self.calls.answered(number, body),
            Ok(FrameView::Request(number, body)) => {
                if let Some(hello) = self.hello(conn) {
                    let responder = Responder {
                        conn: Arc::clone(conn),
                        number,
                    };
                    self.service.request(&hello, body, responder);
                }
            }
            Ok(FrameView::Lease(body)) => {
                if let Some(hello) = self.hello(conn) {
                    self.service.lease(&hello, conn, body);
                }
            }
            Err(error) => {
                tracing::warn!("{} sent {error}; connection closed", conn.peer_addr());
                conn.close();
            }
        }
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, why: &TransportError) {
        let hello = self.hellos.lock().remove(&conn.id());
        self.calls.fail(conn.id(), why);
        self.service.disconnected(conn, hello.as_deref());
    }
}
