//! Keeping out mounts that have been taken for dead. Such a mount may live, cut off from the metadata server only; it must not
//! write to frames that are given to others because it is dead.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use rdma_transport::{ConnId, Connection};
use rt::sync::Mutex;

/// The mounts that are connected, and those that may not connect any more.
#[derive(Default)]
pub(super) struct Fence(Mutex<Lives>);

#[derive(Default)]
struct Lives {
    connected: HashMap<ConnId, (u64, Arc<dyn Connection>)>,
    dead: HashSet<u64>,
}

impl Fence {
    /// May this life of a process connect?
    ///
    /// # Errors
    /// A sentence for it.
    pub fn admit(&self, life: u64) -> Result<(), String> {
        if self.0.lock().dead.contains(&life) {
            return Err("this mount was away for so long that it was taken for dead: mount again".into());
        }
        Ok(())
    }

    /// A mount has connected. One that was let in just before it was taken for dead is not served.
    pub fn connected(&self, life: u64, conn: &Arc<dyn Connection>) {
        let mut lives = self.0.lock();
        if lives.dead.contains(&life) {
            drop(lives);
            return conn.close();
        }
        lives.connected.insert(conn.id(), (life, Arc::clone(conn)));
    }

    /// A connection has ended.
    pub fn disconnected(&self, conn: ConnId) {
        self.0.lock().connected.remove(&conn);
    }

    /// All mounts are dead: those that are connected are not served any more, for ever. How many that were.
    pub fn close(&self) -> usize {
        let connected: Vec<(u64, Arc<dyn Connection>)> = {
            let mut lives = self.0.lock();
            let connected: Vec<_> = lives.connected.drain().map(|(_, c)| c).collect();
            lives.dead.extend(connected.iter().map(|(life, _)| *life));
            connected
        };
        for (_, conn) in &connected {
            conn.close();
        }
        connected.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_node::fake_conn::FakeConn;

    #[test]
    fn who_is_taken_for_dead_is_kept_out() {
        let fence = Fence::default();
        let conns: Vec<Arc<dyn Connection>> = (1..4)
            .map(|id| FakeConn::new(id) as Arc<dyn Connection>)
            .collect();
        fence.connected(10, &conns[0]);
        fence.connected(20, &conns[1]);
        fence.disconnected(conns[1].id());
        assert_eq!(fence.close(), 1);
        assert!(!conns[0].is_alive() && conns[1].is_alive());
        assert!(fence.admit(10).is_err() && fence.admit(20).is_ok() && fence.admit(30).is_ok());
        // It was on its way in.
        fence.connected(10, &conns[2]);
        assert!(!conns[2].is_alive());
        assert_eq!(fence.close(), 0);
    }
}
