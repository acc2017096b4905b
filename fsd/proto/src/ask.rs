//! Requests that know the type of their answer.
//!
//! On the wire a request is a variant of its server's enum of requests, and the answer one of its enum of answers. Here each
//! request is a type, with the fields of its variant, that says which answer belongs to it: an answer of another kind is an
//! error in one place ([`answer_to`]).

use std::sync::Arc;
use std::time::Duration;

use rdma_transport::Connection;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::errno::Errno;
use crate::rpc::{Calls, RpcError};

/// A request with the type of its answer.
pub trait Request {
    /// What goes over the wire.
    type Message: Serialize;
    /// What comes back.
    type Answer: DeserializeOwned;
    /// What is made of that.
    type Reply;

    /// As it goes over the wire.
    fn message(self) -> Self::Message;
    /// What an answer says; none: it is one to something else.
    fn reply(answer: Self::Answer) -> Option<Self::Reply>;
}

/// What an answer to a request says.
///
/// # Errors
/// `EPROTO`: it is one to something else.
pub fn answer_to<R: Request>(answer: R::Answer) -> Result<R::Reply, RpcError> {
    R::reply(answer).ok_or(RpcError::Errno(Errno(libc::EPROTO)))
}

/// Asks on a connection, and waits for the answer.
///
/// # Errors
/// The peer's refusal; no answer within the time; an answer to something else.
pub fn ask_on<R: Request>(
    calls: &Calls,
    conn: &Arc<dyn Connection>,
    request: R,
    patience: Duration,
) -> Result<R::Reply, RpcError> {
    answer_to::<R>(calls.call(conn, &request.message(), patience)?)
}

macro_rules! requests {
    ($message:ident, $answer:ident; $($name:ident { $($field:ident: $type:ty),* } -> $reply:ty, $pattern:pat => $value:expr;)*) => { $(
        #[doc = concat!("[`", stringify!($message), "::", stringify!($name), "`].")]
        #[derive(Debug, Clone, PartialEq, Eq)]
        pub struct $name {
            $(#[doc = concat!("As in [`", stringify!($message), "::", stringify!($name), "`].")]
            pub $field: $type,)*
        }

        impl super::Request for $name {
            type Message = $message;
            type Answer = $answer;
            type Reply = $reply;

            fn message(self) -> $message {
                let Self { $($field),* } = self;
                $message::$name { $($field),* }
            }

            fn reply(answer: $answer) -> Option<$reply> {
                match answer {
                    $pattern => Some($value),
                    _ => None,
                }
            }
        }
    )* };
}

/// Of the metadata server.
pub mod meta {
    use crate::clock::Skew;
    use crate::errno::Errno;
    use crate::wire::{
        Attr, AttrUpdate, Carried, Created, InoRange, JoinReply, LockOwner, LockSpec, Logged, Mark,
        MetaReply, MetaRequest, MetaStatus, NamespaceOp, Page, PeerState, StatFs as Figures, StorageInfo,
        Time, Touched, Written,
    };

    requests! { MetaRequest, MetaReply;
        Clock {} -> Time, MetaReply::Clock(time) => time;
        Join {
            again: Option<(u16, u8)>, life: u64, listen: String, name: String, skew: Skew, locks: Vec<LockSpec>, durable: u64
        } -> JoinReply, MetaReply::Joined(joined) => joined;
        Tables { ids: Vec<u64>, stores: Vec<String>, places: Vec<u64> } -> (), MetaReply::Done => ();
        Leave {} -> (), MetaReply::Done => ();
        Peer { node: u16 } -> (String, PeerState), MetaReply::Peer { listen, state } => (listen, state);
        ReserveInodes { count: u32 } -> InoRange, MetaReply::Inodes(range) => range;
        Lookup { parent: u64, name: Vec<u8> } -> Option<(u64, Attr)>, MetaReply::Found(found) => found;
        LookupAgain { parent: u64, name: Vec<u8>, since: Mark } -> (Option<(u64, Attr)>, Option<Vec<Vec<u8>>>),
            MetaReply::FoundAgain { found, changed } => (found, changed);
        GetAttr { ino: u64 } -> Attr, MetaReply::Attr(attr) => attr;
        ReadDir { ino: u64, after: Vec<u8>, most: u32, ahead: bool } -> Page, MetaReply::Entries(page) => page;
        ReadLink { ino: u64 } -> Vec<u8>, MetaReply::Target(target) => target;
        GetXattrs { ino: u64 } -> Vec<(Vec<u8>, Vec<u8>)>, MetaReply::Xattrs(pairs) => pairs;
        Namespace { seq: u64, acknowledged: u64, now: Time, touched: Vec<Touched>, op: NamespaceOp } -> Created,
            MetaReply::Changed(created) => created;
        WriteBack { first: u64, changes: Vec<Carried> } -> (u64, Vec<Result<Written, Errno>>, Option<Errno>, Mark),
            MetaReply::WrittenBack { durable, written, stopped, mark } => (durable, written, stopped, mark);
        Update { updates: Vec<AttrUpdate> } -> (), MetaReply::Done => ();
        Sync {} -> (), MetaReply::Done => ();
        Replay { entries: Vec<Logged>, last: bool } -> Vec<(u64, Errno)>, MetaReply::Replayed(failed) => failed;
        Settle {} -> u64, MetaReply::Settled { orphans } => orphans;
        Reap { ino: u64 } -> (), MetaReply::Done => ();
        GetLock { lock: LockSpec } -> Option<LockSpec>, MetaReply::Lock(found) => found;
        SetLock { lock: LockSpec, wait: bool } -> (), MetaReply::Done => ();
        CancelLock { lock: LockSpec } -> (), MetaReply::Done => ();
        ReleaseLocks { ino: u64, owner: LockOwner } -> (), MetaReply::Done => ();
        GiveLocks { from: u16, to: u16 } -> (), MetaReply::Done => ();
        StatFs {} -> Figures, MetaReply::StatFs(figures) => figures;
        Heartbeat {} -> (), MetaReply::Done => ();
        Evict { node: u16 } -> (), MetaReply::Done => ();
        Relay { to: u16, frame: Vec<u8> } -> (), MetaReply::Done => ();
        Status {} -> MetaStatus, MetaReply::Status(status) => status;
        Cluster {} -> (Vec<StorageInfo>, u32), MetaReply::Cluster { storage, record_bytes } => (storage, record_bytes);
    }
}

/// Of a storage node.
pub mod storage {
    use crate::wire::{
        Attached, BlockFrame, BlockRange, BlockWant, DeadMount, Frame, Part, PoolSpace, Records,
        StorageReply, StorageRequest, StorageStatus,
    };

    requests! { StorageRequest, StorageReply;
        Attach {} -> Attached, StorageReply::Attached(attached) => attached;
        LeaseSegment { segment: u32 } -> u64, StorageReply::Segment(key) => key;
        Reserve { needed: u64, wanted: u64 } -> u64, StorageReply::Reserved(bytes) => bytes;
        Unreserve { bytes: u64 } -> (), StorageReply::Done => ();
        Allocate { wants: Vec<BlockWant>, reserved: u64 } -> Vec<Frame>, StorageReply::Allocated(frames) => frames;
        Lookup { ino: u64, first: u64, count: u32 } -> Vec<BlockFrame>, StorageReply::Blocks(blocks) => blocks;
        Free { ranges: Vec<BlockRange> } -> u64, StorageReply::Freed(bytes) => bytes;
        Flush { inos: Vec<u64>, parts: Vec<Part>, data: Vec<u8> } -> (), StorageReply::Done => ();
        ResetLeases {} -> (), StorageReply::Done => ();
        Fence { dead: DeadMount } -> (), StorageReply::Done => ();
        Owned { dead: Vec<DeadMount>, from: u64 } -> Records, StorageReply::Records(records) => records;
        Recover { dead: Vec<DeadMount> } -> (), StorageReply::Done => ();
        Unused { inos: Vec<u64> } -> Vec<u64>, StorageReply::Inodes(inos) => inos;
        Compare { place: u64, accept: bool } -> (u64, u64), StorageReply::Compared { generation, place } => (generation, place);
        Space {} -> PoolSpace, StorageReply::Space(space) => space;
        Status {} -> StorageStatus, StorageReply::Status(status) => status;
        Inodes { after: u64 } -> Vec<u64>, StorageReply::Inodes(inos) => inos;
        Cut { ends: Vec<(u64, Option<u64>)> } -> u64, StorageReply::Freed(bytes) => bytes;
    }
}

/// Of a mount: each request has answers of its own kind.
pub mod mount {
    use crate::wire::{Act, MountRequest, MountStatus, View as Members, Visited};

    /// [`MountRequest::Status`].
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct Status {}

    impl super::Request for Status {
        type Message = MountRequest;
        type Answer = MountStatus;
        type Reply = MountStatus;

        fn message(self) -> MountRequest {
            MountRequest::Status
        }

        fn reply(answer: MountStatus) -> Option<MountStatus> {
            Some(answer)
        }
    }

    /// [`MountRequest::Visit`].
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct Visit {
        /// As in [`MountRequest::Visit`].
        pub ino: u64,
        /// As in [`MountRequest::Visit`].
        pub offset: u64,
        /// As in [`MountRequest::Visit`].
        pub act: Act,
    }

    impl super::Request for Visit {
        type Message = MountRequest;
        type Answer = Visited;
        type Reply = Visited;

        fn message(self) -> MountRequest {
            let Self { ino, offset, act } = self;
            MountRequest::Visit { ino, offset, act }
        }

        fn reply(answer: Visited) -> Option<Visited> {
            Some(answer)
        }
    }

    /// [`MountRequest::View`].
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub struct View {
        /// As in [`MountRequest::View`].
        pub view: Members,
    }

    impl super::Request for View {
        type Message = MountRequest;
        type Answer = ();
        type Reply = ();

        fn message(self) -> MountRequest {
            MountRequest::View(self.view)
        }

        fn reply((): ()) -> Option<()> {
            Some(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{MetaReply, MetaRequest};

    #[test]
    fn an_answer_to_something_else_is_an_error_of_the_protocol() {
        assert_eq!(meta::Settle {}.message(), MetaRequest::Settle);
        let message = meta::GetAttr { ino: 5 }.message();
        assert_eq!(message, MetaRequest::GetAttr { ino: 5 });
        let orphans = answer_to::<meta::Settle>(MetaReply::Settled { orphans: 3 });
        assert_eq!(orphans.ok(), Some(3));
        let wrong = answer_to::<meta::Settle>(MetaReply::Done);
        assert_eq!(wrong.err().map(|e| e.errno()), Some(Errno(libc::EPROTO)));
    }
}
