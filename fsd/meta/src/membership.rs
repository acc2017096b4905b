//! Who takes part: joining, leaving, losing the connection.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::{ConnId, Connection};
use rt::time::Instant;

use super::records::{Member, Superblock, encode, key};
use super::server::{Inner, State};
use super::service::Answer;
use super::sessions::Session;
use super::stores::known_stores;
use super::{Refusal, no};
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::ino;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{Hello, JoinReply, LockSpec, MetaReply, StorageInfo};

impl Inner {
    pub(super) fn storage_infos(&self) -> Vec<StorageInfo> {
        // Where they cannot be read nothing can, and whoever asks for more is told.
        let stores = known_stores(self.store.as_ref()).unwrap_or_default();
        self.config
            .storage
            .iter()
            .map(|s| StorageInfo {
                id: s.id,
                listen: s.listen.clone(),
                store: stores.get(usize::from(s.id)).cloned(),
                generation: self.copies.generation(s.id),
            })
            .collect()
    }

    pub(super) fn join(
        &self,
        conn: ConnId,
        (again, durable): (Option<(u16, u8)>, u64),
        mut member: Member,
        skew: Skew,
        locks: &[LockSpec],
    ) -> Answer {
        let name = &member.name;
        self.check_place(&format!("mount {name}"), durable)?;
        match skew.verdict() {
            Verdict::Close => {}
            Verdict::Apart if again.is_none() => {
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
        let layout = lockmgr::RecordLayout::new(self.superblock.record_bytes)
            .map_err(|_| Refusal::Errno(Errno(libc::EIO)))?;
        let mut state = self.state.lock();
        let (node, incarnation) = match again {
            // What it has cached this server's store has forgotten.
            Some(_) if self.copies.holds_up() || durable > self.order.executed() => return no(libc::ESTALE),
            Some((node, incarnation)) => {
                let known = state.sessions.nodes.get(&node);
                if !known.is_some_and(|s| s.member.life == member.life && !s.dead) {
                    return no(libc::ESTALE);
                }
                (node, incarnation)
            }
            // Mounts of a former life may come back, or hold leases that are released when they do not: until
            // that is known nobody new can be served.
            None if state.sessions.nobody_up() || state.window.is_some() || self.copies.holds_up() => {
                return no(libc::EAGAIN);
            }
            None => state
                .sessions
                .free_number(layout.max_nodes())
                .map_or_else(|| no(libc::EUSERS), Ok)?,
        };
        member.incarnation = incarnation;
        let mut txn = self.txn();
        txn.put(key::member(node), encode(&member));
        txn.commit()?;
        if again.is_none() {
            // A server that has lost its end must know whom to ask for it.
            self.order.sync()?;
        }
        tracing::info!(
            "mount {node} ({}) {}",
            member.name,
            if again.is_some() { "is back" } else { "has joined" }
        );
        state.sessions.incarnations.insert(node, incarnation);
        state.sessions.nodes.insert(
            node,
            Session {
                member,
                conn: Some(conn),
                lost: None,
                gone: false,
                dead: false,
            },
        );
        let served = state.locks.forget_waiters(node);
        for lock in locks {
            state.locks.set(lock, None);
        }
        let awaited = state.window.as_ref().is_some_and(|w| w.awaits(node));
        drop(state);
        self.answer_locks(&served, &Ok(MetaReply::Done));
        Ok(MetaReply::Joined(JoinReply {
            node,
            incarnation,
            epoch: 0,
            record_bytes: self.superblock.record_bytes,
            storage: self.storage_infos(),
            executed: self.order.executed(),
            durable: self.order.durable(),
            awaited,
        }))
    }

    /// A mount leaves in order.
    pub(super) fn leave(&self, conn: ConnId) -> Answer {
        let mut state = self.state.lock();
        let node = state
            .sessions
            .by_conn(conn)
            .map_or_else(|| no(libc::ENOTCONN), Ok)?;
        self.forget(&mut state, node, true)?;
        let served = state.locks.release_node(node);
        drop(state);
        self.answer_locks(&served, &Ok(MetaReply::Done));
        tracing::info!("mount {node} has left");
        Ok(MetaReply::Done)
    }

    /// A mount is no more: its number, reservations and answers go.
    /// Numbers that one which `left` in order has not used nobody has heard of; of one that died that is not certain.
    pub(super) fn forget(&self, state: &mut State, node: u16, left: bool) -> Result<(), Refusal> {
        let Some(session) = state.sessions.nodes.remove(&node) else {
            return Ok(());
        };
        let mut txn = self.txn();
        let reserved = txn.scan_stored(&key::reserved(node, 0)[..9], usize::MAX)?;
        let unused = reserved.len();
        for (k, _) in reserved {
            let ino = key::second(&k);
            if left && ino::generation(ino) < ino::WORN {
                let unused = key::reusable(ino::shard(ino), ino::index(ino));
                txn.put(unused, encode(&ino::generation(ino)));
            } else {
                txn.recycle(ino);
            }
            txn.delete(k);
        }
        for (k, _) in txn.scan_stored(&key::answer(node, 0)[..9], usize::MAX)? {
            txn.delete(k);
        }
        txn.put(
            key::member(node),
            encode(&Member {
                life: 0,
                ..session.member
            }),
        );
        txn.commit()?;
        tracing::debug!("{unused} reserved inode numbers come back from mount {node}");
        state.answers.remove(&node);
        Ok(())
    }

    pub(super) fn disconnected(&self, conn: &Arc<dyn Connection>, _hello: Option<&Hello>) {
        let lost = self.state.lock().sessions.lost(conn.id(), Instant::now());
        if let Some(node) = lost {
            tracing::warn!("connection to mount {node} lost");
        }
    }

    /// A mount tells which lease tables it has found. New ones begin with version zero: a new era, or the
    /// attributes pushed under the new versions would be taken for old.
    pub(super) fn check_tables(&self, tables: &[u64]) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        if state.tables == tables {
            return Ok(());
        }
        let era = self.era() + 1;
        let superblock = Superblock {
            era,
            tables: tables.to_vec(),
            ..self.superblock.clone()
        };
        let mut txn = self.txn();
        txn.put(key::superblock(), encode(&superblock));
        txn.commit()?;
        self.store.sync()?;
        tracing::info!("lease tables are new: era {era}");
        state.tables = tables.to_vec();
        self.era.store(era, Ordering::Release);
        Ok(())
    }
}
