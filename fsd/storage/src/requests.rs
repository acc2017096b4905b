//! The requests of mounts and of the metadata server.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use rdma_transport::{ConnId, Connection, RegionKey};
use rt::channel::Sender;

use super::blocks::Blocks;
use super::error::errno;
use super::keeping::Wanted;
use super::leases::SEGMENT_RECORDS;
use super::status::Counts;
use super::words::Words;
use super::work::{Funeral, Work};
use fsd_proto::rpc::{Errno, Responder, Service};
use fsd_proto::wire::{Attached, Hello, MOST_RANGES, Role, StorageReply, StorageRequest};

/// Most inodes in one answer.
const INODES: usize = 2048;

/// Answers requests.
pub struct Requests {
    /// Names the store.
    pub uuid: String,
    /// By which mounts reach the pool, and the counters of its slabs.
    pub keys: [RegionKey; 2],
    pub blocks: Arc<Blocks>,
    pub words: Arc<Words>,
    pub counts: Arc<Counts>,
    pub work: Sender<Work>,
    pub funerals: Sender<Funeral>,
}

impl Requests {
    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let request = match fsd_proto::wire::decode::<StorageRequest>(body) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!("{} sent a request that cannot be read: {error}", hello.role);
                return responder.reply::<StorageReply>(&Err(Errno(libc::EPROTO)));
            }
        };
        match request {
            // These wait for the disk or go through the whole table: not on the progress thread.
            StorageRequest::Flush { inos, parts, data } => {
                // Here, while the mount is known to be served: it is in memory before it is fenced, or never.
                if !data.is_empty()
                    && let Err(error) = self.blocks.flusher.take_in(&parts, &data)
                {
                    return responder.reply::<StorageReply>(&Err(error));
                }
                self.hand_off(Work::Flush(Wanted { inos, parts }, responder));
            }
            StorageRequest::Status => self.hand_off(Work::Status(responder)),
            StorageRequest::ResetLeases if hello.role == Role::Meta => self.hand_off(Work::Reset(responder)),
            StorageRequest::Cut { ends } if hello.role == Role::Meta => {
                self.hand_off(Work::Cut(ends, responder))
            }
            StorageRequest::Compare { .. } if hello.role == Role::Meta => {
                let answer = self.quick(responder.conn().id(), request);
                responder.reply(&answer);
            }
            StorageRequest::Fence { dead } if hello.role == Role::Meta => {
                self.bury(Funeral::Fence(dead, responder));
            }
            StorageRequest::Owned { dead, from } if hello.role == Role::Meta => {
                self.bury(Funeral::Owned(dead, from, responder));
            }
            StorageRequest::Recover { dead } if hello.role == Role::Meta => {
                self.bury(Funeral::Recover(dead, responder));
            }
            StorageRequest::Unused { inos } if hello.role == Role::Meta => {
                self.bury(Funeral::Unused(inos, responder));
            }
            StorageRequest::ResetLeases
            | StorageRequest::Cut { .. }
            | StorageRequest::Compare { .. }
            | StorageRequest::Fence { .. }
            | StorageRequest::Owned { .. }
            | StorageRequest::Unused { .. }
            | StorageRequest::Recover { .. } => {
                responder.reply::<StorageReply>(&Err(Errno(libc::EPERM)));
            }
            quick => {
                let answer = self.quick(responder.conn().id(), quick);
                responder.reply(&answer);
            }
        }
    }

    fn hand_off(&self, work: Work) {
        if let Err(refused) = self.work.send(work) {
            let (Work::Flush(_, r) | Work::Reset(r) | Work::Status(r) | Work::Cut(_, r)) = refused.0;
            r.reply::<StorageReply>(&Err(Errno(libc::ESHUTDOWN)));
        }
    }

    fn bury(&self, funeral: Funeral) {
        if let Err(refused) = self.funerals.send(funeral) {
            let responder = refused.0.responder();
            responder.reply::<StorageReply>(&Err(Errno(libc::ESHUTDOWN)));
        }
    }

    fn quick(&self, conn: ConnId, request: StorageRequest) -> Result<StorageReply, Errno> {
        match request {
            StorageRequest::Attach => Ok(StorageReply::Attached(Attached {
                pool_key: self.keys[0].0,
                dirty_key: self.keys[1].0,
                segment_records: SEGMENT_RECORDS,
                table: self.words.table.id,
                store: self.uuid.clone(),
                generation: self.blocks.media.generation.durable(),
                place: self.blocks.media.generation.place().map_err(|e| errno(&e))?,
            })),
            StorageRequest::Compare { place, accept } => {
                let generation = &self.blocks.media.generation;
                let known = generation.place().map_err(|e| errno(&e))?;
                generation.note_place(place, accept).map_err(|e| errno(&e))?;
                Ok(StorageReply::Compared {
                    generation: generation.durable(),
                    place: known,
                })
            }
            StorageRequest::LeaseSegment { segment } => Ok(StorageReply::Segment(self.words.key(segment)?.0)),
            StorageRequest::Reserve { needed, wanted } => Ok(StorageReply::Reserved(
                self.blocks.frames.reserve(conn, needed, wanted),
            )),
            StorageRequest::Unreserve { bytes } => {
                self.blocks.media.space.lock().use_reservation(conn, bytes);
                Ok(StorageReply::Done)
            }
            StorageRequest::Allocate { wants, reserved } => self
                .blocks
                .frames
                .allocate(conn, &wants, reserved)
                .map(StorageReply::Allocated),
            StorageRequest::Lookup { ino, first, count } => {
                Ok(StorageReply::Blocks(self.blocks.frames.lookup(ino, first, count)))
            }
            StorageRequest::Free { ranges } if ranges.len() > MOST_RANGES => Err(Errno(libc::EINVAL)),
            StorageRequest::Free { ranges } => {
                let freed = self.blocks.frames.free(&ranges);
                freed.map(StorageReply::Freed).map_err(|e| errno(&e))
            }
            StorageRequest::Space => Ok(StorageReply::Space(self.blocks.frames.figures())),
            StorageRequest::Inodes { after } => {
                let space = self.blocks.media.space.lock();
                Ok(StorageReply::Inodes(space.index.inodes(after, INODES)))
            }
            StorageRequest::Flush { .. }
            | StorageRequest::Fence { .. }
            | StorageRequest::Owned { .. }
            | StorageRequest::Recover { .. }
            | StorageRequest::Unused { .. }
            | StorageRequest::ResetLeases
            | StorageRequest::Status
            | StorageRequest::Cut { .. } => Err(Errno(libc::EINVAL)),
        }
    }
}

/// The role's service before the regions are registered (the fabric must exist first).
#[derive(Default)]
pub struct Front(pub OnceLock<Requests>);

impl Service for Front {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        if let (Some(node), Role::Client(_)) = (self.0.get(), hello.role) {
            node.words.fence.admit(hello.life)?;
        }
        match hello.role {
            Role::Storage(_) | Role::Client(_) | Role::Tool | Role::Meta if self.0.get().is_none() => {
                Err(fsd_proto::rpc::not_yet("the storage node is still starting"))
            }
            _ => Ok(()),
        }
    }

    fn connected(&self, hello: &Hello, conn: &Arc<dyn Connection>) {
        if let Some(node) = self.0.get() {
            node.counts.connections.fetch_add(1, Ordering::Relaxed);
            if let Role::Client(_) = hello.role {
                node.words.fence.connected(hello.life, conn);
            }
        }
    }

    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        match self.0.get() {
            Some(node) => match node.words.fence.serving(hello.life) {
                Some(_alive) => node.request(hello, body, responder),
                None => responder.reply::<StorageReply>(&Err(Errno(libc::ESTALE))),
            },
            None => responder.reply::<StorageReply>(&Err(Errno(libc::EAGAIN))),
        }
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, hello: Option<&Hello>) {
        if let Some(node) = self.0.get() {
            node.blocks.frames.disconnected(conn.id());
            node.words.fence.disconnected(conn.id());
            if hello.is_some() {
                node.counts.connections.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}
