//! Who takes part: joining, leaving, losing the connection.

use std::sync::Arc;

use rdma_transport::ConnId;
use rt::sync::Mutex;
use rt::time::Instant;

use super::copies::Copies;
use super::locks::FileLocks;
use super::recovery::Recovery;
use super::sessions::{Session, Sessions};
use crate::error::{MetaError, Refusal, no};
use crate::journal::Journal;
use crate::journal::records::{Member, encode, key};
use crate::namespace::numbers;
use crate::namespace::transactions::Transactions;
use crate::nodes::stores::Stores;
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{JoinReply, LockSpec, MetaReply, NodeInfo, Terms};

/// The mounts.
pub struct Members {
    pub sessions: Mutex<Sessions>,
    pub record_bytes: u32,
    pub terms: Terms,
    pub journal: Journal,
    pub stores: Arc<Stores>,
    pub transactions: Arc<Transactions>,
    pub locks: Arc<FileLocks>,
    pub recovery: Arc<Recovery>,
    pub copies: Arc<Copies>,
}

/// Is the clock of a mount near enough to this one?
fn check_clock(name: &str, skew: Skew, back: bool) -> Result<(), Refusal> {
    match skew.verdict() {
        Verdict::Close => {}
        Verdict::Apart if !back => {
            tracing::warn!("mount {name} refused: its clock is {skew} this one; synchronise the clocks");
            return no(libc::ETIME);
        }
        // It holds leases and data that only it can give up: that it cannot is worse than wrong times of files.
        Verdict::Apart => {
            tracing::warn!("the clock of mount {name} is {skew} this one: synchronise the clocks");
        }
        // It may be right, and all that could be wrong are times of files, by little more than an exchange takes; a
        // mount that is refused because its host is busy serves nobody.
        Verdict::Unsure => {
            tracing::warn!(
                "mount {name} answers too slowly to tell whether its clock is right: it is {skew} this one"
            );
        }
    }
    Ok(())
}

impl Members {
    /// Whose connection this is.
    pub fn of(&self, conn: ConnId) -> Result<u16, Refusal> {
        let node = self.sessions.lock().by_conn(conn);
        Ok(node.ok_or(Errno(libc::ENOTCONN))?)
    }

    /// Where a mount is reached.
    pub fn peer(&self, node: u16) -> Result<MetaReply, Refusal> {
        let sessions = self.sessions.lock();
        let session = sessions.nodes.get(&node).ok_or(Errno(libc::ENOENT))?;
        Ok(MetaReply::Peer {
            listen: session.member.listen.clone(),
            state: session.state(),
        })
    }

    /// A mount joins, or comes back `again`; it knows that everything up to `durable` is.
    pub fn join(
        &self,
        conn: ConnId,
        (again, durable): (Option<(u16, u8)>, u64),
        mut member: Member,
        skew: Skew,
        locks: &[LockSpec],
    ) -> Result<MetaReply, Refusal> {
        self.copies
            .check_place(&format!("mount {}", member.name), durable)?;
        check_clock(&member.name, skew, again.is_some())?;
        let mut sessions = self.sessions.lock();
        let (node, incarnation) = self.number(&sessions, again, durable, member.life)?;
        member.incarnation = incarnation;
        let mut txn = self.journal.txn();
        txn.put(key::member(node), encode(&member));
        txn.commit()?;
        if again.is_none() {
            // A server that has lost its end must know whom to ask for it.
            self.journal.order.sync()?;
        }
        tracing::info!(
            "mount {node} ({}) {}",
            member.name,
            if again.is_some() { "is back" } else { "has joined" }
        );
        sessions.incarnations.insert(node, incarnation);
        sessions
            .nodes
            .insert(node, Session::new(member, Some(conn), None));
        let awaited = self.recovery.awaits(node);
        drop(sessions);
        self.locks.restore(node, locks);
        Ok(MetaReply::Joined(JoinReply {
            node,
            incarnation,
            epoch: 0,
            terms: self.terms,
            record_bytes: self.record_bytes,
            storage: self.stores.infos(),
            executed: self.journal.order.executed(),
            durable: self.journal.order.durable(),
            awaited,
        }))
    }

    /// The number that a mount gets, or has.
    fn number(
        &self,
        sessions: &Sessions,
        again: Option<(u16, u8)>,
        durable: u64,
        life: u64,
    ) -> Result<(u16, u8), Refusal> {
        match again {
            // What it has cached this server's store has forgotten.
            Some(_) if self.copies.holds_up() || durable > self.journal.order.executed() => no(libc::ESTALE),
            Some((node, incarnation)) => {
                let known = sessions.nodes.get(&node);
                if !known.is_some_and(|s| s.member.life == life && !s.dead) {
                    return no(libc::ESTALE);
                }
                Ok((node, incarnation))
            }
            // Mounts of a former life may come back, or hold leases that are released when they do not: until
            // that is known nobody new can be served.
            None if sessions.nobody_up() || self.recovery.is_open() || self.copies.holds_up() => {
                no(libc::EAGAIN)
            }
            None => {
                let layout = lockmgr::RecordLayout::new(self.record_bytes).map_err(|_| Errno(libc::EIO))?;
                let free = sessions.free_number(layout.max_nodes());
                Ok(free.ok_or(Errno(libc::EUSERS))?)
            }
        }
    }

    /// A mount leaves in order.
    pub fn leave(&self, conn: ConnId) -> Result<MetaReply, Refusal> {
        let mut sessions = self.sessions.lock();
        let node = sessions.by_conn(conn).ok_or(Errno(libc::ENOTCONN))?;
        self.forget(&mut sessions, node, true)?;
        drop(sessions);
        self.locks.release_node(node);
        tracing::info!("mount {node} has left");
        Ok(MetaReply::Done)
    }

    /// A mount is no more: its number, reservations and answers go.
    fn forget(&self, sessions: &mut Sessions, node: u16, left: bool) -> Result<(), Refusal> {
        let Some(session) = sessions.nodes.remove(&node) else {
            return Ok(());
        };
        let mut txn = self.journal.txn();
        let unused = numbers::give_back(&mut txn, node, left)?;
        for (k, _) in txn.scan_stored(&key::answer(node, 0)[..9], usize::MAX)? {
            txn.delete(k);
        }
        let member = Member {
            life: 0,
            ..session.member
        };
        txn.put(key::member(node), encode(&member));
        txn.commit()?;
        tracing::debug!("{unused} reserved inode numbers come back from mount {node}");
        self.transactions.forget(node);
        Ok(())
    }

    /// A connection has ended.
    pub fn disconnected(&self, conn: ConnId) {
        let lost = self.sessions.lock().lost(conn, Instant::now());
        if let Some(node) = lost {
            tracing::warn!("connection to mount {node} lost");
        }
    }

    /// Mounts that have not come back are dead.
    pub fn bury(&self) {
        let dead = self.sessions.lock().bury(Instant::now());
        for node in dead {
            tracing::warn!(
                "mount {node} is dead: it did not come back; files it had leased stay blocked until it is recovered"
            );
            self.locks.release_node(node);
            self.recovery.give_up(node);
        }
    }

    /// Is no mount alive, but dead ones hold leases?
    pub fn only_dead(&self) -> bool {
        self.sessions.lock().only_dead()
    }

    /// Forgets the dead, and what they had open, if there are no others; whether that is so.
    pub fn forget_dead(&self) -> Result<bool, MetaError> {
        let mut sessions = self.sessions.lock();
        if !sessions.only_dead() {
            return Ok(false);
        }
        self.transactions.reap_all()?;
        let nodes: Vec<u16> = sessions.nodes.keys().copied().collect();
        for node in nodes {
            self.forget(&mut sessions, node, false)?;
        }
        Ok(true)
    }

    /// What is shown of them.
    pub fn infos(&self) -> Vec<NodeInfo> {
        let sessions = self.sessions.lock();
        let info = |(&node, s): (&u16, &Session)| NodeInfo {
            node,
            incarnation: s.member.incarnation,
            name: s.member.name.clone(),
            listen: s.member.listen.clone(),
            state: s.state(),
            locks: self.locks.count(node),
        };
        sessions.nodes.iter().map(info).collect()
    }
}
