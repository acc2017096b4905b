//! Membership: which mounts there are, and whether they are alive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{ConnId, Connection};
use rt::time::Instant;

use crate::error::MetaError;
use crate::journal::records::{Member, decode, key};
use fsd_node::store::Store;
use fsd_proto::wire::{DeadMount, PeerState, View};

/// A mount as the running server sees it.
#[derive(Clone)]
pub struct Session {
    /// What is stored of it.
    pub member: Member,
    /// Its connection while it is up.
    pub conn: Option<Arc<dyn Connection>>,
    /// The answer to its `Join` is on its way, so it may be told more.
    pub greeted: bool,
    /// When it last said that it lives.
    pub heard: Instant,
    /// Its process has ended, as its host says.
    pub gone: bool,
    /// It has been declared dead.
    pub dead: bool,
    /// It leases in the tables of the era.
    pub leases: bool,
}

impl Session {
    /// One that has just been heard of.
    pub fn new(member: Member, conn: Option<Arc<dyn Connection>>) -> Self {
        Self {
            member,
            conn,
            greeted: false,
            heard: Instant::now(),
            gone: false,
            dead: false,
            leases: false,
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

/// All mounts that have not left, and the epoch.
#[derive(Default)]
pub struct Sessions {
    /// By node number.
    pub nodes: BTreeMap<u16, Session>,
    /// Last incarnation of node numbers that are free.
    pub incarnations: BTreeMap<u16, u8>,
    /// The epoch, and the dead from which everything is still to be taken back. Stored before anything else is done.
    pub view: View,
    /// The epoch that the mounts are in, or on their way to: they are told of a death only when the dead are shut out everywhere.
    pub published: u64,
    /// The mounts were told of dead, and that all is taken back only later: they lease nothing new.
    pub paused: bool,
}

impl Sessions {
    /// Those of a store. They may still run and come back; until then they count as lost, and have their whole terms.
    pub fn load(store: &dyn Store) -> Result<Self, MetaError> {
        let view = store.get(&key::view())?;
        let view: View = view.map_or_else(|| Ok(View::default()), |bytes| decode(&bytes))?;
        let mut sessions = Self {
            // Whether the mounts have been told of its dead is not stored: they may have been, and those who have not need not be yet.
            published: view.epoch - u64::from(!view.dead.is_empty()).min(view.epoch),
            paused: !view.dead.is_empty(),
            view,
            ..Self::default()
        };
        for (k, v) in store.scan(b"C", b"D", usize::MAX)? {
            let node = key::number(&k) as u16;
            let member: Member = decode(&v)?;
            if member.life == 0 {
                sessions.incarnations.insert(node, member.incarnation);
            } else {
                let mut lost = Session::new(member, None);
                // Whether it has begun to is not stored.
                lost.leases = true;
                lost.dead = sessions.view.dead.iter().any(|d| d.life == lost.member.life);
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
        let mut nodes = self.nodes.iter();
        let theirs = |(_, s): &(&u16, &Session)| s.conn.as_ref().is_some_and(|c| c.id() == conn);
        nodes.find(theirs).map(|(&n, _)| n)
    }

    /// The session of a life, unless it has been declared dead.
    pub fn by_life(&self, life: u64) -> Option<(u16, &Session)> {
        let mut nodes = self.nodes.iter();
        let found = nodes.find(|(_, s)| s.member.life == life && !s.dead);
        found.map(|(&n, s)| (n, s))
    }

    /// The mounts that have not been declared dead.
    pub fn alive(&self) -> BTreeSet<u16> {
        let nodes = self.nodes.iter().filter(|(_, s)| !s.dead);
        nodes.map(|(&n, _)| n).collect()
    }

    /// A connection has ended; returns the node it belonged to.
    pub fn lost(&mut self, conn: ConnId) -> Option<u16> {
        let node = self.by_conn(conn)?;
        self.nodes.get_mut(&node)?.conn = None;
        Some(node)
    }

    /// This server has not been able to hear anybody for a while: nobody is silent for that.
    pub fn excuse(&mut self, pause: Duration, now: Instant) {
        for session in self.nodes.values_mut() {
            session.heard = now.min(session.heard + pause);
        }
    }

    /// Who is to be declared dead: silent for `patience`, or not there any more.
    pub fn expired(&self, now: Instant, patience: Duration) -> Vec<u16> {
        let over = |s: &Session| {
            let ended = s.gone && s.conn.is_none();
            !s.dead && (ended || now.saturating_duration_since(s.heard) >= patience)
        };
        let nodes = self.nodes.iter().filter(|(_, s)| over(s));
        nodes.map(|(&n, _)| n).collect()
    }

    /// The view once these have died as well.
    pub fn view_without(&self, dead: &[u16]) -> View {
        let mut view = self.view.clone();
        view.epoch += 1;
        let lives = dead
            .iter()
            .filter_map(|n| self.nodes.get(n).filter(|s| !s.dead).map(|s| (*n, s)));
        view.dead.extend(lives.map(|(node, s)| DeadMount {
            node,
            incarnation: s.member.incarnation,
            life: s.member.life,
        }));
        view
    }

    /// A view counts from now on: the connections of those that are newly dead, which are to be ended.
    pub fn enter(&mut self, view: View) -> Vec<Arc<dyn Connection>> {
        let mut conns = Vec::new();
        for dead in &view.dead {
            let session = self.nodes.get_mut(&dead.node);
            if let Some(session) = session.filter(|s| s.member.life == dead.life) {
                session.dead = true;
                conns.extend(session.conn.take());
            }
        }
        self.view = view;
        conns
    }

    /// The mounts are told of this view from now on. With dead in it, they lease nothing new until they are told of one without.
    pub fn publish(&mut self) {
        self.published = self.view.epoch;
        self.paused = !self.view.dead.is_empty();
    }

    /// What the mounts are to know; none while they wait for the end of an epoch that others have died in.
    pub fn published(&self) -> Option<View> {
        let current = self.published == self.view.epoch;
        match (current, self.paused) {
            (true, _) => Some(self.view.clone()),
            (false, true) => None,
            (false, false) => Some(View {
                epoch: self.published,
                dead: Vec::new(),
            }),
        }
    }

    /// Who is lost, and may have ended: node, life, and where it was reached.
    pub fn missed(&self) -> Vec<(u16, u64, String)> {
        let missed = self.nodes.iter();
        let missed = missed.filter(|(_, s)| s.conn.is_none() && !s.dead && !s.gone);
        missed
            .map(|(&node, s)| (node, s.member.life, s.member.listen.clone()))
            .collect()
    }

    /// The process of a mount has ended, unless the mount is back.
    pub fn ended(&mut self, node: u16, life: u64) {
        if let Some(session) = self.nodes.get_mut(&node).filter(|s| s.member.life == life) {
            session.gone = session.conn.is_none();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::fake_conn::FakeConn;

    const PATIENCE: Duration = Duration::from_secs(12);

    fn session(life: u64) -> Session {
        let member = Member {
            incarnation: 1,
            life,
            name: String::new(),
            listen: String::new(),
        };
        Session::new(member, Some(FakeConn::new(life)))
    }

    fn sessions() -> Sessions {
        let mut s = Sessions::default();
        s.nodes.insert(0, session(5));
        s.nodes.insert(1, session(6));
        s
    }

    #[test]
    fn a_mount_dies_when_it_has_been_silent_for_its_term_connected_or_not() {
        let mut s = sessions();
        let t = s.nodes[&1].heard;
        assert_eq!(s.lost(ConnId(5)), Some(0));
        assert!(s.expired(t + PATIENCE / 2, PATIENCE).is_empty());
        assert_eq!(s.expired(t + PATIENCE, PATIENCE), vec![0, 1]);
        s.nodes.get_mut(&1).unwrap().heard = t + PATIENCE / 2;
        assert_eq!(s.expired(t + PATIENCE, PATIENCE), vec![0]);
        let view = s.view_without(&[0]);
        assert!(s.enter(view).is_empty() && s.alive() == BTreeSet::from([1]));
        assert!(s.expired(t + PATIENCE, PATIENCE).is_empty(), "only once");
    }

    #[test]
    fn the_servers_own_pause_is_nobodys_silence() {
        let mut s = sessions();
        let t = s.nodes[&1].heard;
        let later = t + PATIENCE * 10;
        s.excuse(PATIENCE * 10, later);
        assert!(s.nodes.values().all(|n| n.heard <= later));
        assert!(s.expired(later + PATIENCE / 2, PATIENCE).is_empty());
        assert_eq!(s.expired(later + PATIENCE, PATIENCE).len(), 2);
    }

    #[test]
    fn one_whose_process_has_ended_is_not_waited_for() {
        let mut s = sessions();
        let t = Instant::now();
        s.ended(0, 5);
        assert!(s.missed().is_empty() && !s.nodes[&0].gone, "it is connected");
        s.lost(ConnId(5));
        s.lost(ConnId(6));
        assert_eq!(s.missed().len(), 2);
        s.ended(0, 5);
        s.ended(1, 7);
        assert_eq!(
            s.missed(),
            [(1, 6, String::new())],
            "the other was of another life"
        );
        assert_eq!(s.expired(t, PATIENCE), vec![0]);
    }

    #[test]
    fn a_death_moves_the_epoch_on_and_ends_the_connection() {
        let mut s = sessions();
        let view = s.view_without(&[1]);
        assert_eq!((view.epoch, view.dead.len(), view.dead[0].life), (1, 1, 6));
        let conns = s.enter(view);
        assert_eq!(conns.iter().map(|c| c.id()).collect::<Vec<_>>(), [ConnId(6)]);
        assert!(s.by_life(6).is_none() && s.by_life(5).is_some());
        let view = s.view_without(&[0, 1]);
        assert_eq!((view.epoch, view.dead.len()), (2, 2), "nobody dies twice");
    }

    /// Mounts are told of the dead behind the fence; until then they go on in their epoch, or wait for the end of the one they are in.
    #[test]
    fn a_death_is_published_when_it_may_be() {
        let view = |epoch, dead: &[u16]| View {
            epoch,
            dead: dead
                .iter()
                .map(|&node| DeadMount {
                    node,
                    incarnation: 1,
                    life: u64::from(node) + 5,
                })
                .collect(),
        };
        let mut s = sessions();
        s.nodes.insert(2, session(7));
        s.enter(s.view_without(&[1]));
        assert_eq!((s.published(), s.paused), (Some(view(0, &[])), false));
        s.publish();
        assert_eq!((s.published(), s.paused), (Some(view(1, &[1])), true));
        s.enter(s.view_without(&[0]));
        assert_eq!((s.published(), s.paused, s.published), (None, true, 1));
        s.publish();
        assert_eq!(s.published(), Some(view(2, &[1, 0])));
        s.enter(view(2, &[]));
        s.publish();
        assert_eq!((s.published(), s.paused), (Some(view(2, &[])), false));
    }

    #[test]
    fn numbers_come_back_with_the_next_incarnation() {
        let mut s = Sessions::default();
        assert_eq!(s.free_number(2), Some((0, 1)));
        s.nodes.insert(0, session(5));
        s.incarnations.insert(1, 255);
        assert_eq!(s.free_number(2), Some((1, 1)));
        s.nodes.insert(1, session(6));
        assert_eq!(s.free_number(2), None);
    }
}
