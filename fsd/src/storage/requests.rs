//! The requests of mounts and of the metadata server.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::ConnId;

use super::StorageError;
use super::alloc::{CLASSES, class_for};
use super::flush::errno;
use super::index::Entry;
use super::leases::SEGMENT_RECORDS;
use super::server::{Inner, Work};
use crate::rpc::{Errno, Responder};
use crate::wire::{Attached, BlockWant, Frame, Hello, Role, StorageReply, StorageRequest};

impl Inner {
    pub(super) fn request(self: &Arc<Self>, hello: &Hello, body: &[u8], responder: Responder) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let request = match crate::wire::decode::<StorageRequest>(body) {
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
            StorageRequest::ResetLeases => responder.reply::<StorageReply>(&Err(Errno(libc::EPERM))),
            quick => {
                let answer = self.quick(responder.conn().id(), quick);
                responder.reply(&answer);
            }
        }
    }

    fn hand_off(&self, work: Work) {
        if let Err(refused) = self.work.send(work) {
            let (Work::Flush(_, r) | Work::Reset(r) | Work::Status(r)) = refused.0;
            r.reply::<StorageReply>(&Err(Errno(libc::ESHUTDOWN)));
        }
    }

    fn quick(&self, conn: ConnId, request: StorageRequest) -> Result<StorageReply, Errno> {
        match request {
            StorageRequest::Attach => Ok(StorageReply::Attached(Attached {
                pool_key: self.pool_key.0,
                pool_len: self.pool.mem.len() as u64,
                dirty_key: self.dirty_key.0,
                segment_records: SEGMENT_RECORDS,
                table: self.leases.id,
            })),
            StorageRequest::LeaseSegment { segment } => {
                let fabric = self.fabric.lock().clone().ok_or(Errno(libc::ESHUTDOWN))?;
                if u64::from(segment) * u64::from(SEGMENT_RECORDS) > crate::ino::MAX_INDEX {
                    return Err(Errno(libc::EINVAL));
                }
                let key = self.leases.key(fabric.as_ref(), segment).map_err(|e| errno(&e))?;
                Ok(StorageReply::Segment(key.0))
            }
            StorageRequest::Reserve { needed, wanted } => {
                let mut space = self.space.lock();
                let granted = space.alloc.reserve(needed, wanted);
                *space.reserved.entry(conn).or_default() += granted;
                Ok(StorageReply::Reserved(granted))
            }
            StorageRequest::Unreserve { bytes } => {
                self.space.lock().use_reservation(conn, bytes);
                Ok(StorageReply::Done)
            }
            StorageRequest::Allocate { wants, reserved } => self.allocate(conn, &wants, reserved),
            StorageRequest::Lookup { ino, first, count } => Ok(StorageReply::Blocks(
                self.space
                    .lock()
                    .index
                    .lookup(ino, first, count.min(4096) as usize),
            )),
            StorageRequest::Free { ino, first, last } => {
                let frames = self
                    .space
                    .lock()
                    .index
                    .remove(ino, first, last)
                    .map_err(|e| errno(&e.into()))?;
                let bytes = frames.iter().map(|f| u64::from(f.size)).sum();
                for frame in frames {
                    self.release(frame);
                }
                Ok(StorageReply::Freed(bytes))
            }
            StorageRequest::Space => Ok(StorageReply::Space(self.space.lock().figures())),
            StorageRequest::Flush { .. } | StorageRequest::ResetLeases | StorageRequest::Status => {
                Err(Errno(libc::EINVAL))
            }
        }
    }

    /// Hands a frame to the cleaner, which zeroes it before it can be used again.
    fn release(&self, frame: Frame) {
        self.cleaning.fetch_add(1, Ordering::AcqRel);
        if self.clean.send(frame).is_err() {
            self.cleaning.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn allocate(&self, conn: ConnId, wants: &[BlockWant], reserved: u64) -> Result<StorageReply, Errno> {
        let mut space = self.space.lock();
        let has = |w: &BlockWant| {
            let entry = space.index.get(w.ino, w.block);
            entry.is_some_and(|e| e.frame.size >= w.size)
        };
        if !wants.iter().all(has) {
            space.index.room().map_err(|e| errno(&e.into()))?;
        }
        let reserved = space.use_reservation(conn, reserved);
        let mut covered = reserved;
        let mut frames = Vec::with_capacity(wants.len());
        let mut fresh: Vec<(u64, u64, Entry)> = Vec::new();
        let mut replaced: Vec<(Frame, Frame)> = Vec::new();
        for want in wants {
            let old = space.index.get(want.ino, want.block).map(|e| e.frame);
            if let Some(frame) = old.filter(|f| f.size >= want.size) {
                frames.push(frame);
                continue;
            }
            let taken = class_for(want.size).and_then(|class| {
                let size = u64::from(CLASSES[class]);
                let (is_covered, rest) = (covered >= size, covered.saturating_sub(size));
                covered = rest;
                space.alloc.allocate(class, is_covered).map(|offset| Frame {
                    offset,
                    size: CLASSES[class],
                })
            });
            let Some(frame) = taken else {
                for (_, _, entry) in &fresh {
                    space.give_back(entry.frame);
                }
                // What was reserved stays so.
                space.alloc.restore(reserved);
                *space.reserved.entry(conn).or_default() += reserved;
                return Err(Errno(libc::ENOSPC));
            };
            if let Some(old) = old {
                replaced.push((old, frame));
            }
            fresh.push((want.ino, want.block, Entry { frame, stored: false }));
            frames.push(frame);
        }
        let moved = replaced.iter().try_for_each(|(old, new)| {
            self.pool
                .mem
                .copy_within(old.offset as usize, new.offset as usize, old.size as usize)
        });
        let noted = match moved {
            Ok(()) if fresh.is_empty() => Ok(()),
            Ok(()) => space.index.set(&fresh).map_err(StorageError::from),
            Err(error) => Err(error.into()),
        };
        drop(space);
        if let Err(error) = noted {
            for (_, _, entry) in fresh {
                // Something may have been copied into it.
                self.release(entry.frame);
            }
            return Err(errno(&error));
        }
        for (old, _) in replaced {
            self.release(old);
        }
        Ok(StorageReply::Allocated(frames))
    }
}
