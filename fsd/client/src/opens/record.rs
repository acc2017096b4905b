//! The words of a lease record that say who has the file open.

use std::sync::Arc;

use lockmgr::RecordLayout;
use rdma_transport::Op;

use crate::cache::inode::Inode;
use crate::session::Session;
use crate::session::ctx::{Res, Stop};
use fsd_proto::rpc::Errno;

/// The bits of that number.
const PINS: u64 = 0xff_ffff << 8;
/// In word 1 of a lease record: unit of the number of mounts that pin the inode.
pub const ONE_PIN: u64 = 1 << 8;
/// Does a flags word say that somebody pins the inode?
#[must_use]
pub fn pinned(flags: u64) -> bool {
    flags & PINS != 0
}

pub use fsd_proto::layout::FLAG_UNLINKED;
/// In word 1 of a lease record: unit of the number of mounts that have the file open for writing.
pub const ONE_WRITER: u64 = 1 << 32;

/// What changes in the words of a lease record that say who has the file open, each by one or not at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecordChange {
    /// This mount's bit in the opens bitmap.
    pub open: i8,
    /// The number of mounts that have it open for writing.
    pub writers: i8,
    /// The number of mounts that pin it.
    pub pins: i8,
}

/// The words of a lease record that say who has the file open.
pub struct OpenRecords {
    pub(crate) session: Arc<Session>,
}

impl OpenRecords {
    /// Waits until the storage node that has an inode's record is there: one that is just being started again is no error yet. Not
    /// while `opens` is locked, nor on a thread that brings answers from the fabric.
    pub(crate) fn reach_record(&self, inode: &Inode) -> Res<()> {
        let (record, storage) = (inode.record(), &self.session.net.storage);
        if !storage.knows_record(record) {
            storage.find_record(record)?;
        }
        Ok(())
    }

    fn word(
        &self,
        inode: &Inode,
        offset: u64,
    ) -> Res<(Arc<dyn rdma_transport::Connection>, rdma_transport::RemoteAddr)> {
        let (conn, at) = self
            .session
            .net
            .storage
            .record(inode.record())
            .map_err(|e| Stop::Errno(crate::session::lease_errno(&e)))?;
        Ok((conn, at.plus(offset)))
    }

    /// Makes a change, then reads the flags word and the opens bitmap.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn change_record(&self, inode: &Inode, change: RecordChange) -> Res<(u64, Vec<u64>)> {
        let add = |unit: u64, n: i8| if n < 0 { unit.wrapping_neg() } else { unit };
        let layout = self.session.layout;
        let (conn, record) = self.word(inode, 0)?;
        let (offset, bit) = layout.open_bit(self.session.node);
        let words = layout.map_words() as usize;
        let (mut flags, mut bitmap) = ([0u8; 8], vec![0u8; words * 8]);
        let mut ops = Vec::with_capacity(5);
        if change.open != 0 {
            ops.push(Op::Faa {
                at: record.plus(offset),
                add: add(bit, change.open),
                old: 0,
            });
        }
        for (unit, n) in [(ONE_WRITER, change.writers), (ONE_PIN, change.pins)] {
            if n != 0 {
                ops.push(Op::Faa {
                    at: record.plus(RecordLayout::FLAGS),
                    add: add(unit, n),
                    old: 0,
                });
            }
        }
        ops.push(Op::Read {
            at: record.plus(RecordLayout::FLAGS),
            into: &mut flags,
        });
        ops.push(Op::Read {
            at: record.plus(layout.opens()),
            into: &mut bitmap,
        });
        conn.execute(&mut ops).map_err(|error| {
            tracing::error!("opens of {:#x}: {error}", inode.ino);
            Stop::Errno(Errno(libc::EIO))
        })?;
        let bitmap = bitmap
            .chunks_exact(8)
            .map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default()))
            .collect();
        Ok((u64::from_ne_bytes(flags), bitmap))
    }

    /// Sets or clears a flag; the number of writers beside it may change at any time.
    pub(crate) fn set_flag(&self, inode: &Inode, flag: u64, on: bool) -> Res<()> {
        let (conn, at) = self.word(inode, RecordLayout::FLAGS)?;
        let mut expect = if on { 0 } else { flag };
        loop {
            let new = if on { expect | flag } else { expect & !flag };
            let mut swap = [Op::Cas {
                at,
                expect,
                new,
                old: 0,
            }];
            conn.execute(&mut swap)
                .map_err(|_| Stop::Errno(Errno(libc::EIO)))?;
            match swap {
                [Op::Cas { old, .. }] if old != expect => expect = old,
                _ => return Ok(()),
            }
            if (expect & flag != 0) == on {
                return Ok(());
            }
        }
    }

    pub(crate) fn opened_elsewhere(&self, bitmap: &[u64]) -> bool {
        let set = self.session.layout.set(bitmap);
        set.iter().any(|n| n != self.session.node)
    }
}
