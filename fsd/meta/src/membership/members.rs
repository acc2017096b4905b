//! Who takes part: joining, leaving, living, being declared dead.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{ConnId, Connection};
use rt::channel::Sender;
use rt::sync::Mutex;
use rt::time::Instant;

use super::copies::Copies;
use super::locks::FileLocks;
use super::pulse::Pulse;
use super::recovery::Recovery;
use super::sessions::{Session, Sessions};
use crate::error::{MetaError, Refusal, no};
use crate::journal::Journal;
use crate::journal::records::{Member, encode, key};
use crate::namespace::numbers;
use crate::namespace::transactions::Transactions;
use crate::nodes::stores::Stores;
use crate::rules::{Flaw, Rules};
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{DeadMount, JoinReply, LockSpec, MetaReply, NodeInfo, PeerState, Terms, View};

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
    pub pulse: Mutex<Pulse>,
    /// Told when a connection is lost.
    pub lost: Sender<()>,
    pub rules: Rules,
}

/// A mount that joins, or comes back.
pub struct Joining<'a> {
    /// Its connection.
    pub conn: &'a Arc<dyn Connection>,
    /// The number and the incarnation that it has.
    pub again: Option<(u16, u8)>,
    /// It knows that everything up to here is durable.
    pub durable: u64,
    /// What is stored of it.
    pub member: Member,
    /// What it has found out about the clocks.
    pub skew: Skew,
    /// The file locks that it holds.
    pub locks: &'a [LockSpec],
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

    /// Does a life take part?
    pub fn knows(&self, life: u64) -> bool {
        self.sessions.lock().by_life(life).is_some()
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

    /// The connection to a mount.
    pub fn conn(&self, node: u16) -> Result<Arc<dyn Connection>, Errno> {
        let sessions = self.sessions.lock();
        let session = sessions.nodes.get(&node).filter(|s| !s.dead);
        let conn = &session.ok_or(Errno(libc::ENOENT))?.conn;
        conn.clone().ok_or(Errno(libc::EHOSTUNREACH))
    }

    /// The number and the life of the mount whose connection this is.
    pub fn sender(&self, conn: ConnId) -> Result<(u16, u64), Errno> {
        let sessions = self.sessions.lock();
        let node = sessions.by_conn(conn).ok_or(Errno(libc::ESTALE))?;
        let session = sessions.nodes.get(&node).ok_or(Errno(libc::ESTALE))?;
        Ok((node, session.member.life))
    }

    /// A mount joins, or comes back.
    pub fn join(&self, joining: Joining<'_>) -> Result<MetaReply, Refusal> {
        let Joining {
            again,
            durable,
            mut member,
            ..
        } = joining;
        let who = format!("mount {}", member.name);
        self.copies.check_place(&who, durable)?;
        check_clock(&member.name, joining.skew, again.is_some())?;
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
        let before = sessions.nodes.get(&node).filter(|s| s.member.life == member.life);
        let leases = before.is_some_and(|s| s.leases);
        let mut session = Session::new(member, Some(Arc::clone(joining.conn)));
        session.leases = leases;
        sessions.nodes.insert(node, session);
        let (awaited, epoch) = (self.recovery.awaits(node), sessions.view.epoch);
        drop(sessions);
        self.locks.restore(node, joining.locks);
        Ok(MetaReply::Joined(JoinReply {
            node,
            incarnation,
            epoch,
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
        let known = sessions.by_life(life);
        match again {
            // What it has cached this server's store has forgotten.
            Some(_) if self.copies.holds_up() || durable > self.journal.order.executed() => no(libc::ESTALE),
            Some((node, incarnation)) if known.is_some_and(|(n, _)| n == node) => Ok((node, incarnation)),
            Some(_) => no(libc::ESTALE),
            None if sessions.nodes.values().any(|s| s.member.life == life && s.dead) => no(libc::ESTALE),
            // Nobody new while leases are taken back: it would not know whose.
            None if !sessions.view.dead.is_empty() || self.recovery.is_open() || self.copies.holds_up() => {
                no(libc::EAGAIN)
            }
            None => {
                // It has joined before, and has not got the answer.
                if let Some((node, session)) = known {
                    return Ok((node, session.member.incarnation));
                }
                let layout = lockmgr::RecordLayout::new(self.record_bytes).map_err(|_| Errno(libc::EIO))?;
                let free = sessions.free_number(layout.max_nodes());
                Ok(free.ok_or(Errno(libc::EUSERS))?)
            }
        }
    }

    /// A mount has got the answer to its `Join`.
    pub fn greeted(&self, conn: ConnId) {
        let mut sessions = self.sessions.lock();
        let node = sessions.by_conn(conn);
        if let Some(session) = node.and_then(|node| sessions.nodes.get_mut(&node)) {
            session.greeted = true;
        }
    }

    /// The mount whose connection this is leases in the tables of the era from now on, or does not yet.
    pub fn note_leases(&self, conn: ConnId, leases: bool) -> Result<(), Refusal> {
        let mut sessions = self.sessions.lock();
        let node = sessions.by_conn(conn);
        let session = node.and_then(|node| sessions.nodes.get_mut(&node));
        session.ok_or(Errno(libc::ENOTCONN))?.leases = leases;
        Ok(())
    }

    /// The mounts that lease in the tables of the era: how many there are, and the connections to those that are connected.
    pub fn leasing(&self) -> (usize, Vec<Arc<dyn Connection>>) {
        let sessions = self.sessions.lock();
        let all = || sessions.nodes.values().filter(|s| s.leases);
        let conns = all().filter(|s| s.greeted).filter_map(|s| s.conn.clone());
        (all().count(), conns.collect())
    }

    /// A mount says that it lives.
    pub fn heartbeat(&self, conn: ConnId) -> Result<MetaReply, Errno> {
        let mut sessions = self.sessions.lock();
        let node = sessions.by_conn(conn);
        let session = node.and_then(|node| sessions.nodes.get_mut(&node));
        session.ok_or(Errno(libc::ESTALE))?.heard = Instant::now();
        Ok(MetaReply::Done)
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
        let Some(session) = sessions.nodes.get(&node) else {
            return Ok(());
        };
        let mut txn = self.journal.txn();
        let unused = numbers::give_back(&mut txn, node, left)?;
        for (k, _) in txn.scan_stored(&key::answer(node, 0)[..9], usize::MAX)? {
            txn.delete(k);
        }
        txn.delete(key::carried(node));
        let member = Member {
            life: 0,
            ..session.member.clone()
        };
        txn.put(key::member(node), encode(&member));
        txn.commit()?;
        sessions.nodes.remove(&node);
        tracing::debug!("{unused} reserved inode numbers come back from mount {node}");
        self.transactions.forget(node);
        Ok(())
    }

    /// A connection has ended.
    pub fn disconnected(&self, conn: ConnId) {
        let lost = self.sessions.lock().lost(conn);
        if let Some(node) = lost {
            tracing::warn!("connection to mount {node} lost");
            let _ = self.lost.send(());
        }
    }

    /// How long a mount may be silent.
    fn patience(&self) -> Duration {
        if self.rules.lack(Flaw::DeclaredEarly) {
            return Duration::from_millis(self.terms.term_ms / 2);
        }
        Duration::from_millis(self.terms.term_ms + self.terms.margin_ms)
    }

    /// Declares dead who has been silent for too long, or has ended. Whoever calls this could have heard all that was said.
    pub fn judge(&self, now: Instant) {
        let pause = self.pulse.lock().beat(now);
        let mut sessions = self.sessions.lock();
        if let Some(pause) = pause.filter(|_| !self.rules.lack(Flaw::PauseBlamed)) {
            tracing::debug!("this server was stopped for {pause:?}: nobody is taken for silent for that");
            sessions.excuse(pause, now);
        }
        let expired = sessions.expired(now, self.patience());
        drop(sessions);
        if !expired.is_empty()
            && let Err(refusal) = self.declare(&expired, "it was not heard of any more")
        {
            tracing::error!("a mount cannot be declared dead yet: {}", refusal.errno());
        }
    }

    /// Declares mounts dead: durably, before anything else is done. Nothing of them is served from then on.
    pub fn declare(&self, nodes: &[u16], why: &str) -> Result<(), Refusal> {
        let mut sessions = self.sessions.lock();
        let view = sessions.view_without(nodes);
        let new = &view.dead[sessions.view.dead.len()..];
        if new.is_empty() {
            return Ok(());
        }
        let who: Vec<String> = new.iter().map(|d| name(&sessions, d)).collect();
        let dead: Vec<u16> = new.iter().map(|d| d.node).collect();
        let mut txn = self.journal.txn();
        txn.put(key::view(), encode(&view));
        txn.commit()?;
        self.journal.order.sync()?;
        let epoch = view.epoch;
        let conns = sessions.enter(view);
        drop(sessions);
        tracing::warn!("{} is dead ({why}): epoch {epoch}", who.join(", "));
        for conn in conns {
            conn.close();
        }
        for node in dead {
            self.recovery.give_up(node);
        }
        Ok(())
    }

    /// Is this mount there, and has it not been declared dead?
    pub fn check_alive(&self, node: u16) -> Result<u64, Errno> {
        let sessions = self.sessions.lock();
        let session = sessions.nodes.get(&node).ok_or(Errno(libc::ENOENT))?;
        if session.dead {
            return Err(Errno(libc::EALREADY));
        }
        Ok(session.member.life)
    }

    /// The view, and the mounts that live.
    pub fn view(&self) -> (View, BTreeSet<u16>) {
        let sessions = self.sessions.lock();
        (sessions.view.clone(), sessions.alive())
    }

    /// Whom to tell of views: those that live and are connected.
    pub fn listeners(&self) -> Vec<(u16, Arc<dyn Connection>)> {
        let sessions = self.sessions.lock();
        let alive = sessions.nodes.iter().filter(|(_, s)| !s.dead && s.greeted);
        alive
            .filter_map(|(&node, s)| Some((node, Arc::clone(s.conn.as_ref()?))))
            .collect()
    }

    /// What the mounts are to be told, of a view whose dead are shut out everywhere, or not yet.
    pub fn publish(&self, view: &View, fenced: bool) -> Option<View> {
        let mut sessions = self.sessions.lock();
        if fenced && sessions.view == *view {
            sessions.publish();
        }
        sessions.published()
    }

    /// Everything has been taken back from the dead of a view: they are forgotten, their numbers are free. False if others have
    /// died meanwhile.
    pub fn bury(&self, view: &View) -> Result<bool, MetaError> {
        let mut sessions = self.sessions.lock();
        if sessions.view != *view {
            return Ok(false);
        }
        for dead in &view.dead {
            let session = sessions.nodes.get(&dead.node);
            if session.is_some_and(|s| s.member.life == dead.life) {
                self.forget(&mut sessions, dead.node, false)?;
            }
        }
        let after = View {
            epoch: view.epoch,
            dead: Vec::new(),
        };
        let mut txn = self.journal.txn();
        txn.put(key::view(), encode(&after));
        txn.commit()?;
        self.journal.order.sync()?;
        sessions.view = after;
        sessions.publish();
        Ok(true)
    }

    /// One of the dead by name.
    pub fn name(&self, dead: &DeadMount) -> String {
        name(&self.sessions.lock(), dead)
    }

    /// What is shown of them.
    pub fn infos(&self) -> Vec<NodeInfo> {
        let (sessions, now) = (self.sessions.lock(), Instant::now());
        let late = Duration::from_millis(self.terms.term_ms / 3)
            .max(Duration::from_millis(self.terms.heartbeat_ms * 2));
        let info = |(&node, s): (&u16, &Session)| {
            let silent = now.saturating_duration_since(s.heard);
            let state = match s.state() {
                PeerState::Up if silent > late => PeerState::Late,
                state => state,
            };
            NodeInfo {
                node,
                incarnation: s.member.incarnation,
                name: s.member.name.clone(),
                listen: s.member.listen.clone(),
                state,
                locks: self.locks.count(node),
                silent_ms: u64::try_from(silent.as_millis()).unwrap_or(u64::MAX),
            }
        };
        sessions.nodes.iter().map(info).collect()
    }
}

fn name(sessions: &Sessions, dead: &DeadMount) -> String {
    let session = sessions.nodes.get(&dead.node);
    match session.filter(|s| s.member.life == dead.life) {
        Some(session) => format!("mount {} ({})", dead.node, session.member.name),
        None => format!("mount {}", dead.node),
    }
}
