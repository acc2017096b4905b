//! Telling the metadata server what this mount has carried out of the namespace itself.

use std::sync::atomic::Ordering;
use std::time::Duration;

use rt::time::Instant;

use super::meta::MetaLink;
use super::outbox::{Concern, InVain};
use fsd_proto::ask;
use fsd_proto::rpc::{Errno, RpcError};
use fsd_proto::wire::{Carried, Mark, MetaRequest, Written};

/// Pause before changes are told again that the server could not store.
const FULL: Duration = Duration::from_millis(200);

impl MetaLink {
    /// Takes a change in, which is thereby carried out: the server is told by and by. It comes back where nothing is told any more.
    ///
    /// # Errors
    /// The change.
    pub fn carry(&self, change: Carried) -> Result<(), Box<Carried>> {
        self.outbox.push(change)
    }

    /// Waits until there is room for another change.
    ///
    /// # Errors
    /// The server is away for longer than programs wait.
    pub fn make_room(&self) -> Result<(), RpcError> {
        let began = Instant::now();
        let waited = self.outbox.make_room(|| self.waits_in_vain(began));
        waited.map_err(|InVain(error)| RpcError::Errno(error))
    }

    /// Does the server know all changes of an inode?
    #[must_use]
    pub fn knows(&self, ino: u64) -> bool {
        self.outbox.is_settled(|| Concern::Inodes(vec![ino]))
    }

    /// Waits until the server knows all changes of an inode.
    ///
    /// # Errors
    /// It is away for longer than programs wait.
    pub fn tell(&self, ino: u64) -> Result<(), RpcError> {
        self.settle(|| Concern::Inodes(vec![ino]))
    }

    /// Waits until the server knows what a request concerns.
    pub(super) fn settle(&self, concern: impl FnOnce() -> Concern) -> Result<(), RpcError> {
        let began = Instant::now();
        let settled = self.outbox.settle(concern, || self.waits_in_vain(began));
        settled.map_err(|InVain(error)| RpcError::Errno(error))
    }

    /// Behind all changes that the server has said to be carried out; names that others change later are told by it.
    #[must_use]
    pub fn mark(&self) -> Option<Mark> {
        self.log.mark()
    }

    fn waits_in_vain(&self, began: Instant) -> bool {
        self.ways.patience.is_over(began) || self.ways.stopping.load(Ordering::Acquire)
    }

    /// Tells the server of changes as they come, until [`MetaLink::end_changes`].
    pub fn tell_changes(&self) {
        while let Some((first, changes)) = self.outbox.next() {
            let request = MetaRequest::WriteBack { first, changes };
            let answer = self.ask_while(&request, || !self.outbox.is_ended());
            let MetaRequest::WriteBack { changes, .. } = request else {
                return;
            };
            let (mut count, mut why) = (changes.len(), None);
            match answer.and_then(ask::answer_to::<ask::meta::WriteBack>) {
                Ok((durable, written, stopped, mark)) => {
                    self.log.heard_mark(mark);
                    count = written.len().min(count);
                    why = stopped;
                    for ((number, change), written) in (first..).zip(changes).zip(written) {
                        self.told(number, change, written, durable);
                    }
                }
                Err(error) if error.is_transport() => break,
                Err(error) => {
                    for (number, change) in (first..).zip(changes) {
                        self.told(number, change, Err(error.errno()), 0);
                    }
                    if error.errno() == Errno(libc::ESTALE) {
                        // This life of the mount is over.
                        self.outbox.end();
                    }
                }
            }
            self.outbox.done(count);
            self.stopped(why);
        }
        let lost = self.outbox.end();
        if lost > 0 {
            tracing::error!(
                "{lost} changes of names that were acknowledged are lost: the metadata server was not told of them"
            );
        }
    }

    /// The server takes no more just now, for this reason; or does.
    fn stopped(&self, why: Option<Errno>) {
        self.outbox.trouble(why);
        if let Some(error) = why {
            tracing::warn!("changes of names are kept, which the metadata server cannot store: {error}");
            rt::thread::sleep(FULL);
        }
    }

    /// The server has carried a change out, or has refused it.
    fn told(&self, number: u64, change: Carried, written: Result<Written, Errno>, durable: u64) {
        let owner = self.ways.owner();
        if let (Ok(written), Some(owner)) = (&written, &owner) {
            owner.carried_out(&change, written.place);
        }
        let foreseen = change.cookie;
        let request = MetaRequest::WriteBack {
            first: number,
            changes: vec![change],
        };
        let error = match written {
            Ok(Written { place, cookie }) => {
                self.log.note(place, durable, &request);
                if cookie == 0 || cookie == foreseen {
                    return;
                }
                tracing::error!("change {number} made an entry {cookie}, and {foreseen} was foreseen");
                Errno(libc::EIO)
            }
            Err(error) => error,
        };
        if let Some(owner) = owner {
            owner.transaction_lost(&request, error);
        }
    }

    /// No more is told: the mount has left, or ends.
    pub fn end_changes(&self) {
        self.outbox.end();
    }
}
