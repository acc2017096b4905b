//! The words of a lease record that say who has the file open.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lockmgr::{Mode, NodeId, NodeSet, RecordLayout};
use rdma_transport::{Connection, Op, RemoteAddr};
use rt::time::Instant;

use crate::cache::inode::Inode;
use crate::cache::opens::{Opens, Telling, Usage, UsageBit};
use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop};
use fsd_proto::ino;
use fsd_proto::rpc::Errno;

/// Pause before something is done to a record again.
const RETRY: Duration = Duration::from_millis(50);
/// How often it is tried while the storage node is there.
const TRIES: u32 = 3;

/// What a lease record says of who uses the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordUse {
    /// This mount.
    node: NodeId,
    /// The mount that has the same open files ([`Twin`]).
    twin: Option<NodeId>,
    /// The inode has no name left, or is about to lose its last.
    pub unlinked: bool,
    /// Mounts that have it open.
    opens: NodeSet,
    /// Those of them that write, and mounts that pin it.
    uses: NodeSet,
}

impl RecordUse {
    /// Does another mount have the file open?
    #[must_use]
    pub fn opened_by_others(&self) -> bool {
        self.opens.iter().any(|n| self.is_other(n))
    }

    /// Does another mount have the file open for writing?
    #[must_use]
    pub fn written_by_others(&self) -> bool {
        let mut opens = self.opens.iter();
        opens.any(|n| self.is_other(n) && self.uses.contains(n))
    }

    fn is_other(&self, node: NodeId) -> bool {
        node != self.node && Some(node) != self.twin
    }

    /// Does only this mount use the file, not even a mount with the same open files, and is no name of it being removed?
    fn is_private(&self) -> bool {
        let mut users = self.opens.iter().chain(self.uses.iter());
        !self.unlinked && users.all(|node| node == self.node)
    }

    /// Does any mount, this one included, have the file open or pin it?
    #[must_use]
    pub fn in_use(&self) -> bool {
        !self.opens.is_empty() || !self.uses.is_empty()
    }

    /// The inode has no name left and nobody uses it: it is to be removed.
    #[must_use]
    pub fn is_orphan(&self) -> bool {
        self.unlinked && !self.in_use()
    }

    /// What it says of this mount.
    fn own(&self) -> Usage {
        Usage::from_bits(self.opens.contains(self.node), self.uses.contains(self.node))
    }
}

/// The record of one inode, and the connection to it.
struct Place {
    conn: Arc<dyn Connection>,
    record: RemoteAddr,
    layout: RecordLayout,
    /// What the flags are when the inode is unlinked.
    unlinked: u64,
    node: NodeId,
    twin: Option<NodeId>,
}

impl Place {
    /// Changes this mount's bits, then reads who uses the file.
    ///
    /// The opens are read before the uses: a mount whose pin outlasts its open sets its use bit first, so either bit is seen.
    fn change(&self, steps: impl Iterator<Item = (UsageBit, bool)>) -> Result<RecordUse, Stop> {
        let words = self.layout.map_words() as usize;
        let (mut flags, mut opens, mut uses) = ([0u8; 8], vec![0u8; words * 8], vec![0u8; words * 8]);
        let mut ops = Vec::with_capacity(5);
        for (bit, set) in steps {
            let (offset, unit) = match bit {
                UsageBit::Open => self.layout.open_bit(self.node),
                UsageBit::Use => self.layout.use_bit(self.node),
            };
            ops.push(Op::Faa {
                at: self.record.plus(offset),
                add: if set { unit } else { unit.wrapping_neg() },
                old: 0,
            });
        }
        for (offset, into) in [
            (RecordLayout::FLAGS, &mut flags[..]),
            (self.layout.opens(), &mut opens),
            (self.layout.uses(), &mut uses),
        ] {
            let at = self.record.plus(offset);
            ops.push(Op::Read { at, into });
        }
        self.conn.execute(&mut ops).map_err(|error| {
            tracing::error!("who uses the file of the record at {:?}: {error}", self.record);
            Stop::Errno(Errno(libc::EIO))
        })?;
        Ok(RecordUse {
            node: self.node,
            twin: self.twin,
            unlinked: u64::from_ne_bytes(flags) == self.unlinked,
            opens: self.set(&opens),
            uses: self.set(&uses),
        })
    }

    fn set(&self, bytes: &[u8]) -> NodeSet {
        let words = bytes.chunks_exact(8);
        let words: Vec<u64> = words
            .map(|b| u64::from_ne_bytes(b.try_into().unwrap_or_default()))
            .collect();
        self.layout.set(&words)
    }

    /// Has the record say what a mount does with the file, whatever it has said before.
    ///
    /// A bit that was set twice would carry into the bit of another mount. So what the record says is never guessed: after a failure in
    /// the middle of a change it is read first.
    fn record(&self, opens: &mut Opens) -> Result<RecordUse, Stop> {
        const CHANGES: usize = 2;
        let wanted = opens.usage();
        for _ in 0..CHANGES {
            if opens.in_doubt {
                opens.recorded = self.change(std::iter::empty())?.own();
            }
            opens.in_doubt = true;
            let seen = self.change(opens.recorded.steps_to(wanted))?;
            opens.in_doubt = false;
            opens.recorded = seen.own();
            if opens.recorded == wanted {
                return Ok(seen);
            }
            tracing::warn!(
                "the record at {:?} says {:?} of this mount",
                self.record,
                opens.recorded
            );
        }
        Err(Stop::Errno(Errno(libc::EIO)))
    }
}

/// Another mount that has the open files of this one: its successor, or that whose successor it is. Both serve one kernel, one after the
/// other, so neither counts as somebody else who has a file open.
#[derive(Debug, Default)]
pub struct Twin(AtomicU32);

impl Twin {
    /// There is one, or there is none any more.
    pub fn set(&self, node: Option<u16>) {
        self.0
            .store(node.map_or(0, |n| u32::from(n) + 1), Ordering::SeqCst);
    }

    fn get(&self) -> Option<NodeId> {
        let number = self.0.load(Ordering::SeqCst).checked_sub(1)?;
        u16::try_from(number).ok().map(NodeId)
    }
}

/// The words of a lease record that say who has the file open.
pub struct OpenRecords {
    /// The mount that has the same open files.
    pub twin: Twin,
    pub(crate) session: Arc<Session>,
}

impl OpenRecords {
    /// Waits until the storage node that has an inode's record is there: one that is just being started again is no error yet. Not
    /// while `opens` is locked, nor on a thread that brings answers from the fabric.
    pub(crate) fn reach_record(&self, ctx: &Ctx<'_>, inode: &Inode) -> Res<()> {
        let (record, storage) = (inode.record(), &self.session.net.storage);
        if !storage.knows_record(record) {
            ctx.may_wait()?;
            storage.find_record(record)?;
        }
        Ok(())
    }

    /// Does something with an inode's record. A storage node that goes away meanwhile is waited for, as one that is away before is, and it
    /// is done once more. Not while `opens` is locked.
    pub(crate) fn patiently<T>(
        &self,
        ctx: &Ctx<'_>,
        inode: &Inode,
        mut act: impl FnMut() -> Res<T>,
    ) -> Res<T> {
        let net = &self.session.net;
        let (began, mut failed) = (Instant::now(), 0);
        loop {
            self.reach_record(ctx, inode)?;
            let stop = match act() {
                Err(stop @ Stop::Errno(Errno(libc::EIO))) => stop,
                done => return done,
            };
            // It is told a little later that the connection is lost.
            ctx.may_wait()?;
            rt::thread::sleep(RETRY);
            failed = if net.storage.knows_record(inode.record()) {
                failed + 1
            } else {
                0
            };
            let doomed = self.session.fate.doomed.load(Ordering::Relaxed);
            if failed >= TRIES || doomed || net.ways.patience.is_over(began) {
                return Err(stop);
            }
        }
    }

    fn place(&self, inode: &Inode) -> Res<Place> {
        let (conn, record) = self
            .session
            .net
            .storage
            .record(inode.record())
            .map_err(|e| Stop::Errno(crate::session::lease_errno(&e)))?;
        Ok(Place {
            conn,
            record,
            layout: self.session.layout,
            unlinked: ino::unlinked_flag(inode.ino),
            node: self.session.node,
            twin: self.twin.get(),
        })
    }

    /// What the lease record would say if it had to say what this mount does, and nobody else did anything.
    fn alone(&self, opens: &Opens) -> RecordUse {
        let has = |bit| {
            let mut set = NodeSet::new();
            if opens.usage().has(bit) {
                set.insert(self.session.node);
            }
            set
        };
        RecordUse {
            node: self.session.node,
            twin: self.twin.get(),
            unlinked: false,
            opens: has(UsageBit::Open),
            uses: has(UsageBit::Use),
        }
    }

    /// Has the lease record say what this mount does with the file ([`Opens::usage`]), and returns what it then says of all. Nothing is
    /// asked or changed while it has to say nothing ([`Telling::Nothing`]).
    ///
    /// # Errors
    /// The storage node cannot be reached. What the record says is in doubt then, until the next call that succeeds.
    pub fn record(&self, inode: &Inode, opens: &mut Opens) -> Res<RecordUse> {
        if opens.telling == Telling::Nothing {
            return Ok(self.alone(opens));
        }
        self.place(inode)?.record(opens)
    }

    /// As [`OpenRecords::record`], of a file whose lease is held, which has just been opened here: from then on the record may have to say
    /// less ([`Telling`]). Who opens for writing holds the exclusive lease.
    ///
    /// # Errors
    /// As [`OpenRecords::record`].
    pub(super) fn record_held(&self, inode: &Inode, opens: &mut Opens) -> Res<RecordUse> {
        if opens.telling == Telling::Writing && opens.only_reads_unsaid() {
            return Ok(self.alone(opens));
        }
        if opens.telling != Telling::Nothing && opens.only_reads_unsaid() && !opens.met_others() {
            let seen = self.place(inode)?.change(std::iter::empty())?;
            if !seen.unlinked && !seen.written_by_others() {
                opens.telling = self.least(inode, &seen);
                return Ok(seen);
            }
        }
        let seen = self.record(inode, opens)?;
        if opens.telling != Telling::Nothing {
            opens.telling = match self.least(inode, &seen) {
                // It says more already.
                Telling::Writing => Telling::All,
                least => least,
            };
        }
        Ok(seen)
    }

    /// The least that the record has to say of this mount from now on, as long as its lease is held and it only reads.
    fn least(&self, inode: &Inode, seen: &RecordUse) -> Telling {
        match self.session.leases.held(inode.record()) {
            Some((Mode::Exclusive, _)) if seen.is_private() => Telling::Nothing,
            Some(_) => Telling::Writing,
            None => Telling::All,
        }
    }

    /// Has the lease record say all that this mount does with a file; under a shared lease, if it is to be kept, what it then has to.
    ///
    /// # Errors
    /// As [`OpenRecords::record`].
    pub(super) fn publish(&self, inode: &Inode, opens: &mut Opens, to: Option<Mode>) -> Res<()> {
        if to.is_some() && opens.lower() {
            return Ok(());
        }
        opens.telling = Telling::All;
        if !opens.is_published() {
            self.record(inode, opens)?;
        }
        Ok(())
    }

    /// Who uses the file.
    ///
    /// # Errors
    /// The storage node cannot be reached.
    pub fn look(&self, inode: &Inode, opens: &Opens) -> Res<RecordUse> {
        if opens.telling == Telling::Nothing {
            return Ok(self.alone(opens));
        }
        let mut seen = self.place(inode)?.change(std::iter::empty())?;
        if opens.telling == Telling::Writing && opens.usage().has(UsageBit::Open) {
            seen.opens.insert(self.session.node);
        }
        Ok(seen)
    }

    /// Sets or clears the unlinked flag. That of an earlier inode of the record says nothing of this one.
    pub(crate) fn set_unlinked(&self, inode: &Inode, on: bool) -> Res<()> {
        let place = self.place(inode)?;
        let flag = place.unlinked;
        let (mut expect, new) = if on { (0, flag) } else { (flag, 0) };
        loop {
            let mut swap = [Op::Cas {
                at: place.record.plus(RecordLayout::FLAGS),
                expect,
                new,
                old: 0,
            }];
            place
                .conn
                .execute(&mut swap)
                .map_err(|_| Stop::Errno(Errno(libc::EIO)))?;
            match swap {
                [Op::Cas { old, .. }] if old != expect => expect = old,
                _ => return Ok(()),
            }
            if (expect == flag) == on {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
#[path = "record_tests.rs"]
mod tests;
