//! The fabric contract: what every provider offers and every conformance test checks.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::buffer::Buffer;
use crate::error::TransportError;
use crate::kind::FabricKind;
use crate::mem::SharedMem;
use crate::ops::{Access, AsyncOp, Completion, Op, RegionKey};
use crate::stats::FabricStats;

/// Limits of an endpoint; requests beyond them return [`TransportError::Invalid`].
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Longest message, bytes (at least 128 KiB on every provider).
    pub max_message: usize,
    /// Most operations in one batch (at least 64).
    pub max_batch: usize,
    /// Longest single read or write, bytes (at least 16 MiB).
    pub max_transfer: usize,
    /// Most bytes that the reads and writes of one batch move together (at least 64 MiB).
    pub max_batch_bytes: usize,
}

/// Identifies a connection within its endpoint for ever (never reused).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnId(pub u64);

/// How an endpoint is set up.
#[derive(Debug, Clone)]
pub struct FabricConfig {
    /// Where to listen: a Unix socket path for `shm`, `host:port` (port 0: any) for `tcp` and `verbs`, a name for `sim`.
    pub listen: String,
    /// The cluster key, at least 16 bytes; proved by challenge and response, never sent.
    pub key: Vec<u8>,
    /// What the peer's application is told about this side (opaque here, at most 1 KiB, covered by the MAC).
    pub identity: Vec<u8>,
    /// How long the progress thread spins for new work before it sleeps in the kernel.
    pub spin: Duration,
    /// Longest time for setting up a connection, and for a blocking operation.
    pub timeout: Duration,
    /// How the names of files begin, in a memory file system, by which a later process of this endpoint learns who may still be
    /// executing operations on memory that outlives this one: see [`Fabric::left_behind`]. Only where peers execute their
    /// operations themselves (`shm`); others do not look at it.
    pub keep: Option<PathBuf>,
}

/// The application's side of an endpoint. Called from progress threads: must not block on the fabric.
pub trait Handler: Send + Sync {
    /// May a peer with this identity connect? An `Err` is told to the peer ([`TransportError::Refused`]).
    ///
    /// # Errors
    /// The sentence the peer gets to read.
    fn admit(&self, identity: &[u8]) -> Result<(), String>;
    /// A peer has connected to us. Not called for connections made with [`Fabric::connect`].
    fn connected(&self, conn: &Arc<dyn Connection>);
    /// A message has arrived.
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]);
    /// The connection has ended (either kind); called exactly once, after its last message.
    fn disconnected(&self, conn: &Arc<dyn Connection>, why: &TransportError);
}

/// An endpoint: registered memory, a listener, connections, and the threads that make progress.
pub trait Fabric: Send + Sync {
    /// The provider.
    fn kind(&self) -> FabricKind;
    /// The address others connect to (with the real port if port 0 was asked for).
    fn local_addr(&self) -> String;
    /// The limits.
    fn limits(&self) -> Limits;
    /// Changes the identity shown on connections made from now on.
    fn set_identity(&self, identity: Vec<u8>);
    /// Makes `mem` accessible to peers.
    ///
    /// # Errors
    /// [`TransportError::Os`] where the system refuses, [`TransportError::Shutdown`].
    fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError>;
    /// Ends remote access; operations that come later fail with [`TransportError::RemoteAccess`].
    ///
    /// # Errors
    /// [`TransportError::Invalid`] if the key is not registered.
    fn deregister(&self, key: RegionKey) -> Result<(), TransportError>;
    /// Memory of `len` bytes, with whatever contents, that the adapter of this endpoint, if it has one, reads and writes
    /// in place; up to [`Limits::max_transfer`].
    ///
    /// # Errors
    /// [`TransportError::Invalid`] if it is too long, [`TransportError::Os`] where the system refuses.
    fn buffer(&self, len: usize) -> Result<Buffer, TransportError>;
    /// Connects to a peer (or to this endpoint itself) and runs the key handshake. Blocks.
    ///
    /// # Errors
    /// Unreachable, WrongKey, VersionMismatch, Refused, Protocol, Timeout.
    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError>;
    /// Connections to former processes of this endpoint by which a peer may still be executing operations on memory that has
    /// outlived them ([`FabricConfig::keep`]). They are not alive; [`Connection::expel`] is what they are for. Each is returned
    /// once. By all others of former processes nothing can take effect any more.
    fn left_behind(&self) -> Vec<Arc<dyn Connection>> {
        Vec::new()
    }
    /// What the endpoint has done so far, all its connections (ended ones, too) included.
    fn stats(&self) -> FabricStats {
        FabricStats::default()
    }
    /// Is it certain that no process has an endpoint at this address any more? As [`crate::is_deserted`].
    fn is_deserted(&self, addr: &str) -> bool {
        crate::is_deserted(self.kind(), addr)
    }
    /// Closes everything and joins the progress threads. Idempotent.
    fn shutdown(&self);
}

/// A reliable-connected pair with one peer.
pub trait Connection: Send + Sync {
    /// Its name within the endpoint.
    fn id(&self) -> ConnId;
    /// What the peer said it is, proved by the key.
    fn peer_identity(&self) -> &[u8];
    /// The peer's address, for messages to humans.
    fn peer_addr(&self) -> String;
    /// False once the connection is in error or closed.
    fn is_alive(&self) -> bool;
    /// Runs a batch in order and blocks until all of it has taken effect.
    /// Must not be called from a [`Handler`] callback or a [`Completion`].
    ///
    /// # Errors
    /// The first failure; the connection is then in error (except for [`TransportError::Invalid`], where
    /// nothing was done).
    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError>;
    /// Starts a batch with one doorbell; `done` gets the results. Never blocks on the peer, however much is under way:
    /// who submits bounds it. A peer that says nothing is given up when the connection is (see [`crate::gather`]).
    fn submit(&self, batch: Vec<AsyncOp>, done: Completion);
    /// Calls `start`, which may submit batches on this connection, and then looks for their completions on this thread
    /// until `done` says that enough has come or it is better to sleep; their completions may be called here meanwhile.
    /// For callers that would wait anyway: it saves waking the progress thread, and being woken by it. Whatever has
    /// not come when this returns comes as always. Attending to several connections is one call within the other. Must not be called from a [`Handler`] callback or a [`Completion`].
    fn attend(&self, start: &mut dyn FnMut(), done: &dyn Fn() -> bool) {
        let _already = done;
        start();
    }
    /// Sends a message. Returns when it is queued in order; may block briefly while the peer's queue is full,
    /// but never when called from a progress thread (there it is queued without bound).
    ///
    /// # Errors
    /// Invalid (too long), Disconnected.
    fn send(&self, message: &[u8]) -> Result<(), TransportError>;
    /// As [`Connection::send`], but never waits: what the peer has no room for is queued here, without bound, so whoever queues
    /// bounds it. For whoever may hold a lock that a [`Handler`] callback takes, too: room is made by the progress thread, which
    /// would wait for the lock.
    ///
    /// # Errors
    /// Invalid (too long), Disconnected.
    fn queue(&self, message: &[u8]) -> Result<(), TransportError>;
    /// What the connection has done so far.
    fn stats(&self) -> FabricStats {
        FabricStats::default()
    }
    /// Ends the connection; both sides get [`Handler::disconnected`].
    fn close(&self);
    /// As [`Connection::close`], for a peer that must change nothing any more: when this returns, none of its operations can take
    /// effect, whatever has become of it. A peer that executes its operations itself, as over shared memory, and is stopped in the
    /// middle of one has its process ended. Must not be called from a [`Handler`] callback.
    ///
    /// # Errors
    /// That cannot be brought about.
    fn expel(&self) -> Result<(), TransportError> {
        self.close();
        Ok(())
    }
    /// Has it ended, and is it certain that none of the peer's operations takes effect any more? Where it is not,
    /// [`Connection::expel`] sees to that.
    fn settled(&self) -> bool {
        !self.is_alive()
    }
}
