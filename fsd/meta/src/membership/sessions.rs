//! Membership: which mounts there are, and whether they are alive.

use std::collections::BTreeMap;
use std::time::Duration;

use rdma_transport::ConnId;
use rt::time::Instant;

use crate::error::MetaError;
use crate::journal::records::{Member, decode, key};
use fsd_node::store::Store;
use fsd_proto::wire::PeerState;

/// A lost mount that does not come back within this time is dead.
pub const GRACE: Duration = Duration::from_secs(10);
/// As [`GRACE`], of one whose process is known to have ended: what it had sent arrives within this time.
pub const GONE_GRACE: Duration = Duration::from_secs(1);

/// A mount as the running server sees it.
#[derive(Debug, Clone)]
pub struct Session {
    /// What is stored of it.
    pub member: Member,
    /// Its connection while it is up.
    pub conn: Option<ConnId>,
    /// Since when it is lost.
    pub lost: Option<Instant>,
    /// Its process has ended, as its host says.
    pub gone: bool,
    /// It did not come back.
    pub dead: bool,
}

impl Session {
    /// One that has not died.
    pub fn new(member: Member, conn: Option<ConnId>, lost: Option<Instant>) -> Self {
        Self {
            member,
            conn,
            lost,
            gone: false,
            dead: false,
        }
    }

    /// Whether it is connected, may come back, or has been declared dead.
    pub fn state(&self) -> PeerState {
        match (self.dead, self.conn.is_some()) {
            (true, _) => PeerState::Dead,
            (false, true) => PeerState::Up,
            (false, false) => PeerState::Lost,
        }
    }
}

/// All mounts that have not left.
#[derive(Debug, Default)]
pub struct Sessions {
    /// By node number.
    pub nodes: BTreeMap<u16, Session>,
    /// Last incarnation of node numbers that are free.
    pub incarnations: BTreeMap<u16, u8>,
}

impl Sessions {
    /// Those of a store. They may still run and come back; until then they count as lost.
    pub fn load(store: &dyn Store) -> Result<Self, MetaError> {
        let mut sessions = Self::default();
        for (k, v) in store.scan(b"C", b"D", usize::MAX)? {
            let node = key::number(&k) as u16;
            let member: Member = decode(&v)?;
            if member.life == 0 {
                sessions.incarnations.insert(node, member.incarnation);
            } else {
                let lost = Session::new(member, None, Some(Instant::now()));
                sessions.nodes.insert(node, lost);
            }
        }
        Ok(sessions)
    }

    /// The lowest free node number below `limit`, and its next incarnation.
    pub fn free_number(&self, limit: u16) -> Option<(u16, u8)> {
        let node = (0..limit).find(|n| !self.nodes.contains_key(n))?;
        let last = self.incarnations.get(&node).copied().unwrap_or(0);
        Some((node, last.wrapping_add(1).max(1)))
    }

    /// The node whose connection this is.
    pub fn by_conn(&self, conn: ConnId) -> Option<u16> {
        self.nodes
            .iter()
            .find(|(_, s)| s.conn == Some(conn))
            .map(|(&n, _)| n)
    }

    /// A connection has ended; returns the node it belonged to.
    pub fn lost(&mut self, conn: ConnId, now: Instant) -> Option<u16> {
        let node = self.by_conn(conn)?;
        let session = self.nodes.get_mut(&node)?;
        session.conn = None;
        session.lost = Some(now);
        Some(node)
    }

    /// Declares dead who has been lost for too long; returns those newly dead.
    pub fn bury(&mut self, now: Instant) -> Vec<u16> {
        let mut dead = Vec::new();
        for (&node, session) in &mut self.nodes {
            let grace = if session.gone { GONE_GRACE } else { GRACE };
            if !session.dead && session.lost.is_some_and(|t| now.duration_since(t) >= grace) {
                session.dead = true;
                dead.push(node);
            }
        }
        dead
    }

    /// Who is lost, and may have ended: node, life, and where it was reached.
    pub fn missed(&self) -> Vec<(u16, u64, String)> {
        let missed = self.nodes.iter();
        let missed = missed.filter(|(_, s)| s.lost.is_some() && !s.dead && !s.gone);
        missed
            .map(|(&node, s)| (node, s.member.life, s.member.listen.clone()))
            .collect()
    }

    /// The process of a mount has ended, unless the mount is back.
    pub fn ended(&mut self, node: u16, life: u64) {
        if let Some(session) = self.nodes.get_mut(&node).filter(|s| s.member.life == life) {
            session.gone = session.lost.is_some();
        }
    }

    /// There are mounts, but none is connected.
    pub fn nobody_up(&self) -> bool {
        !self.nodes.is_empty() && self.nodes.values().all(|s| s.conn.is_none())
    }

    /// No mount is alive (up, or lost and perhaps coming back), but dead ones hold leases.
    pub fn only_dead(&self) -> bool {
        !self.nodes.is_empty() && self.nodes.values().all(|s| s.dead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(conn: Option<u64>) -> Session {
        let member = Member {
            incarnation: 1,
            life: 1,
            name: String::new(),
            listen: String::new(),
        };
        Session::new(member, conn.map(ConnId), None)
    }

    #[test]
    fn a_lost_mount_dies_only_after_its_grace() {
        let mut s = Sessions::default();
        s.nodes.insert(0, session(Some(5)));
        let t = Instant::now();
        assert_eq!(s.lost(ConnId(5), t), Some(0));
        assert!(s.bury(t + GRACE / 2).is_empty());
        assert!(!s.only_dead());
        assert_eq!(s.bury(t + GRACE), vec![0]);
        assert!(s.only_dead());
        assert!(s.bury(t + GRACE * 2).is_empty());
    }

    #[test]
    fn one_whose_process_has_ended_is_not_waited_for() {
        let mut s = Sessions::default();
        s.nodes.insert(0, session(Some(5)));
        s.nodes.insert(1, session(Some(6)));
        let t = Instant::now();
        s.ended(0, 1);
        assert!(s.missed().is_empty() && !s.nodes[&0].gone, "it is connected");
        s.lost(ConnId(5), t);
        s.lost(ConnId(6), t);
        assert_eq!(s.missed().len(), 2);
        s.ended(0, 1);
        s.ended(1, 2);
        assert_eq!(
            s.missed(),
            [(1, 1, String::new())],
            "the other was of another life"
        );
        assert!(s.bury(t).is_empty());
        assert_eq!(s.bury(t + GONE_GRACE), vec![0]);
        assert_eq!(s.bury(t + GRACE), vec![1]);
    }

    #[test]
    fn numbers_come_back_with_the_next_incarnation() {
        let mut s = Sessions::default();
        assert_eq!(s.free_number(2), Some((0, 1)));
        s.nodes.insert(0, session(None));
        s.incarnations.insert(1, 255);
        assert_eq!(s.free_number(2), Some((1, 1)));
        s.nodes.insert(1, session(None));
        assert_eq!(s.free_number(2), None);
    }
}
