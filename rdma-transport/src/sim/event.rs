//! What is under way in a simulated network, and what is called when it arrives.

use std::sync::Arc;

use super::remote::{RemoteOp, RemoteResult};
use crate::common::ended;
use crate::{AsyncOp, BatchError, Completion, Connection, Handler, Outcome, TransportError};

pub type EndpointId = usize;
/// A connection as the net knows it: both its ends.
pub type PairId = u64;

/// One end of a connection: 0 connected, 1 listened.
pub type End = usize;

/// Something under way in a lane.
pub enum Parcel {
    /// One operation of a batch; its last one sends the results back.
    Op {
        op: RemoteOp,
        batch: u64,
        last: bool,
    },
    Message(Box<[u8]>),
    /// A message of the other end has been dealt with.
    Credit,
    /// Results of a batch, on their way back.
    Results {
        batch: u64,
        results: Result<Vec<RemoteResult>, TransportError>,
    },
    /// The other end has accepted us: its handler learns of the connection first of all.
    Connected,
    /// The end of everything in this lane.
    Down(TransportError),
}

pub enum What {
    /// A parcel of `pair` arrives that was sent by `from`.
    Arrive {
        pair: PairId,
        from: End,
        parcel: Parcel,
    },
    Call(Box<dyn FnOnce() + Send>),
}

/// A batch that an end waits for.
pub struct Batch {
    pub done: Completion,
    pub ops: Vec<AsyncOp>,
}

/// What an endpoint's thread is to call, and for which end of which connection.
pub type Inbox = rt::channel::Sender<((PairId, End), After)>;

/// What to do once the state is unlocked again.
pub enum After {
    Nothing,
    Message(Arc<dyn Handler>, Arc<dyn Connection>, Box<[u8]>),
    Connected(Arc<dyn Handler>, Arc<dyn Connection>),
    Done(Completion, Outcome),
    Disconnected(Arc<dyn Handler>, Arc<dyn Connection>, TransportError, Vec<Batch>),
    Call(Box<dyn FnOnce() + Send>),
    /// The endpoint's thread is to end.
    Stop,
}

impl After {
    pub fn run(self) {
        match self {
            Self::Nothing | Self::Stop => {}
            Self::Message(handler, conn, message) => {
                handler.message(&conn, &message);
            }
            Self::Connected(handler, conn) => handler.connected(&conn),
            Self::Done(done, result) => done(result),
            Self::Disconnected(handler, conn, why, batches) => {
                for batch in batches {
                    (batch.done)(Err(BatchError::unstarted(
                        ended(&conn.peer_addr(), &why),
                        batch.ops,
                    )));
                }
                handler.disconnected(&conn, &why);
            }
            Self::Call(call) => call(),
        }
    }
}
