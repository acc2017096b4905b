//! Keeping out mounts that have been declared dead. Such a mount may live, cut off or stopped; it must not write to frames that
//! are given to others because it is dead.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{ConnId, Connection};
use rt::sync::{Condvar, Mutex, RwLock, RwLockReadGuard};
use rt::time::Instant;

use super::error::StorageError;
use fsd_node::store::{Batch, Store};
use fsd_proto::wire::{Hello, Role};

/// Tag of the keys of the dead in the store.
const DEAD: u8 = b'd';
/// Longest time from a peer's being let in until its connection is there; the transport gives a handshake less.
const WELCOME: Duration = Duration::from_secs(6);

/// The mounts that are connected, and those that may not connect any more.
pub struct Fence {
    store: Arc<dyn Store>,
    /// Read while a request is carried out, so that none of a mount's is any more once its life is in here.
    dead: RwLock<HashSet<u64>>,
    lives: Mutex<Lives>,
    /// A connection has been made.
    made: Condvar,
}

#[derive(Default)]
struct Lives {
    /// Lives that have been let in, and whose connections are still to be made: until when they can be.
    coming: HashMap<u64, Vec<Instant>>,
    /// Connections, also those that have ended in the middle of an operation which is executed elsewhere.
    connected: HashMap<ConnId, (u64, Arc<dyn Connection>)>,
}

fn key(life: u64) -> Vec<u8> {
    let mut key = vec![DEAD];
    key.extend_from_slice(&life.to_be_bytes());
    key
}

impl Fence {
    /// As a store says. Of the connections to former processes by which mounts may still be changing memory, each is one of a life
    /// that may yet be declared dead.
    ///
    /// # Errors
    /// The store's; one that nobody can tell who it is cannot be shut out.
    pub fn load(store: Arc<dyn Store>, former: Vec<Arc<dyn Connection>>) -> Result<Self, StorageError> {
        let stored = store.scan(&[DEAD], &[DEAD + 1], usize::MAX)?;
        let dead = stored.iter().filter_map(|(k, _)| k.get(1..)?.try_into().ok());
        let mut lives = Lives::default();
        for conn in former {
            match Hello::decode(conn.peer_identity()) {
                Some(hello) if matches!(hello.role, Role::Client(_)) => {
                    lives.connected.insert(conn.id(), (hello.life, conn));
                }
                // A server, or a tool: nobody is going to be told that it is dead, nor takes over what it has.
                Some(_) => {}
                // Of another release, whose lives cannot be told apart.
                None => conn.expel()?,
            }
        }
        Ok(Self {
            dead: RwLock::new(dead.map(u64::from_be_bytes).collect()),
            store,
            lives: Mutex::new(lives),
            made: Condvar::new(),
        })
    }

    /// May this life of a mount connect?
    ///
    /// # Errors
    /// A sentence for it.
    pub fn admit(&self, life: u64) -> Result<(), String> {
        let dead = self.dead.read();
        if dead.contains(&life) {
            return Err("this mount was away for so long that it was taken for dead: mount again".into());
        }
        let now = Instant::now();
        let mut lives = self.lives.lock();
        lives.coming.retain(|_, until| {
            until.retain(|t| *t > now);
            !until.is_empty()
        });
        lives.coming.entry(life).or_default().push(now + WELCOME);
        Ok(())
    }

    /// To be held while a request of this life is carried out; none if it is dead.
    pub fn serving(&self, life: u64) -> Option<RwLockReadGuard<'_, HashSet<u64>>> {
        Some(self.dead.read()).filter(|dead| !dead.contains(&life))
    }

    /// A mount has connected. One that was let in just before it was declared dead is not served.
    pub fn connected(&self, life: u64, conn: &Arc<dyn Connection>) {
        let mut lives = self.lives.lock();
        if let Some(until) = lives.coming.get_mut(&life) {
            until.pop();
            if until.is_empty() {
                lives.coming.remove(&life);
            }
        }
        lives.connected.retain(|_, (_, c)| !c.settled());
        lives.connected.insert(conn.id(), (life, Arc::clone(conn)));
        drop(lives);
        self.made.notify_all();
        if self.dead.read().contains(&life) {
            conn.close();
        }
    }

    /// A connection has ended.
    pub fn disconnected(&self, conn: ConnId) {
        let mut lives = self.lives.lock();
        if lives.connected.get(&conn).is_some_and(|(_, c)| c.settled()) {
            lives.connected.remove(&conn);
        }
    }

    /// These lives are dead, also for a node that is started again. When this returns nothing of them can change memory any more.
    ///
    /// # Errors
    /// The store's; an operation cannot be stopped.
    pub fn fence(&self, dead: &[u64]) -> Result<(), StorageError> {
        {
            let mut known = self.dead.write();
            let mut batch = Batch::default();
            for life in dead.iter().filter(|life| !known.contains(life)) {
                batch.put(key(*life), Vec::new());
            }
            if !batch.is_empty() {
                self.store.apply(batch)?;
                known.extend(dead);
            }
        }
        // Also of those that an earlier call could not make durable.
        self.store.sync()?;
        for (id, conn) in self.of(dead) {
            conn.expel()?;
            self.disconnected(id);
        }
        Ok(())
    }

    /// The connections of these lives, once all of them have been made that can be.
    fn of(&self, dead: &[u64]) -> Vec<(ConnId, Arc<dyn Connection>)> {
        let mut lives = self.lives.lock();
        loop {
            let coming = dead.iter().filter_map(|life| lives.coming.get(life));
            let last = coming.flatten().max().copied();
            match last.filter(|until| *until > Instant::now()) {
                Some(until) => {
                    let _late = self.made.wait_until(&mut lives, until);
                }
                None => break,
            }
        }
        let connected = lives.connected.iter();
        let theirs = connected.filter(|(_, (life, _))| dead.contains(life));
        theirs.map(|(id, (_, conn))| (*id, Arc::clone(conn))).collect()
    }

    /// All mounts are dead: those that are connected are not served any more, for ever. How many that were.
    ///
    /// # Errors
    /// As [`Fence::fence`].
    pub fn close(&self) -> Result<usize, StorageError> {
        let lives: HashSet<u64> = {
            let lives = self.lives.lock();
            let connected = lives.connected.values().filter(|(_, c)| !c.settled());
            connected.map(|(life, _)| *life).collect()
        };
        let dead: Vec<u64> = lives.into_iter().collect();
        if !dead.is_empty() {
            self.fence(&dead)?;
        }
        Ok(dead.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::fake_conn::FakeConn;
    use fsd_node::fake_disk::FakeStore;

    fn fence(store: &Arc<FakeStore>) -> Fence {
        Fence::load(Arc::clone(store) as Arc<dyn Store>, Vec::new()).unwrap()
    }

    fn conns(ids: std::ops::Range<u64>) -> Vec<Arc<dyn Connection>> {
        ids.map(|id| FakeConn::new(id) as Arc<dyn Connection>).collect()
    }

    #[test]
    fn who_is_declared_dead_is_kept_out() {
        let store = Arc::new(FakeStore::default());
        let (fence, conns) = (fence(&store), conns(1..4));
        fence.connected(10, &conns[0]);
        fence.connected(20, &conns[1]);
        conns[1].close();
        fence.disconnected(conns[1].id());
        assert_eq!(fence.close().unwrap(), 1);
        assert!(!conns[0].is_alive());
        assert!(fence.admit(10).is_err() && fence.admit(20).is_ok() && fence.admit(30).is_ok());
        assert!(fence.serving(10).is_none() && fence.serving(20).is_some());
        // It was on its way in.
        fence.connected(10, &conns[2]);
        assert!(!conns[2].is_alive());
        assert_eq!(fence.close().unwrap(), 0);
    }

    #[test]
    fn one_life_is_ended_and_no_other_also_after_a_restart() {
        let synced = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let watched = Arc::clone(&synced);
        let store = Arc::new(FakeStore::watched(Default::default(), move |seen| {
            let sync = matches!(seen, fsd_node::fake_disk::Seen::Sync);
            watched.store(sync, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        }));
        let (first, conns) = (fence(&store), conns(1..3));
        first.connected(10, &conns[0]);
        first.connected(20, &conns[1]);
        first.fence(&[10]).unwrap();
        assert!(!conns[0].is_alive() && conns[1].is_alive());
        assert!(
            synced.load(std::sync::atomic::Ordering::Relaxed),
            "it is to be durable before it is answered"
        );
        first.fence(&[10]).unwrap();
        drop(first);
        let second = fence(&store);
        assert!(second.admit(10).is_err() && second.serving(10).is_none());
        assert!(second.admit(20).is_ok());
    }

    /// A handshake that was let in before the death is waited for, because its connection would not be known.
    #[test]
    fn one_that_is_just_coming_in_is_waited_for() {
        let fence = Arc::new(fence(&Arc::new(FakeStore::default())));
        fence.admit(10).unwrap();
        let fencing = {
            let fence = Arc::clone(&fence);
            rt::thread::spawn(move || fence.fence(&[10]).unwrap())
        };
        rt::thread::sleep(Duration::from_millis(50));
        assert!(!fencing.is_finished());
        let conn = &conns(1..2)[0];
        fence.connected(10, conn);
        fencing.join().unwrap();
        assert!(!conn.is_alive());
    }
}
