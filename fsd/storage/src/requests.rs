//! The requests of mounts and of the metadata server.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::ConnId;

use super::error::errno;
use super::leases::SEGMENT_RECORDS;
use super::server::{Inner, Work};
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{Attached, Hello, Role, StorageReply, StorageRequest};

/// Most inodes in one answer.
const INODES: usize = 2048;

impl Inner {
    pub(super) fn request(self: &Arc<Self>, hello: &Hello, body: &[u8], responder: Responder) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let request = match fsd_proto::wire::decode::<StorageRequest>(body) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!("{} sent a request that cannot be read: {error}", hello.role);
                return responder.reply::<StorageReply>(&Err(Errno(libc::EPROTO)));
            }
        };
        match request {
            // These wait for the disk or go through the whole table: not on the progress thread.
            StorageRequest::Flush { inos } => self.hand_off(Work::Flush(inos, responder)),
            StorageRequest::Status => self.hand_off(Work::Status(responder)),
            StorageRequest::ResetLeases if hello.role == Role::Meta => self.hand_off(Work::Reset(responder)),
            StorageRequest::Cut { ends } if hello.role == Role::Meta => {
                self.hand_off(Work::Cut(ends, responder))
            }
            StorageRequest::Compare { .. } if hello.role == Role::Meta => {
                let answer = self.quick(responder.conn().id(), request);
                responder.reply(&answer);
            }
            StorageRequest::ResetLeases | StorageRequest::Cut { .. } | StorageRequest::Compare { .. } => {
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

    fn quick(&self, conn: ConnId, request: StorageRequest) -> Result<StorageReply, Errno> {
        match request {
            StorageRequest::Attach => Ok(StorageReply::Attached(Attached {
                pool_key: self.pool_key.0,
                dirty_key: self.dirty_key.0,
                segment_records: SEGMENT_RECORDS,
                table: self.leases.id,
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
            StorageRequest::LeaseSegment { segment } => {
                let fabric = self.fabric.lock().clone().ok_or(Errno(libc::ESHUTDOWN))?;
                let key = self.leases.key(fabric.as_ref(), segment)?;
                Ok(StorageReply::Segment(key.0))
            }
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
            StorageRequest::Free { ino, first, last } => {
                let freed = self.blocks.frames.free(ino, first, last);
                freed.map(StorageReply::Freed).map_err(|e| errno(&e))
            }
            StorageRequest::Space => Ok(StorageReply::Space(self.blocks.frames.figures())),
            StorageRequest::Inodes { after } => {
                let space = self.blocks.media.space.lock();
                Ok(StorageReply::Inodes(space.index.inodes(after, INODES)))
            }
            StorageRequest::Flush { .. }
            | StorageRequest::ResetLeases
            | StorageRequest::Status
            | StorageRequest::Cut { .. } => Err(Errno(libc::EINVAL)),
        }
    }
}
