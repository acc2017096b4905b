//! What the fabric itself takes, between endpoints of the same hosts as the leases': the floors that they are compared with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::{Condvar, Mutex};
use rdma_transport::{Connection, Fabric, Handler, Op, RemoteAddr, TransportError};

use super::node::Store;
use crate::progress::check;
use crate::stats::Latency;
use crate::transport::peer::{Hosts, endpoint};

/// Messages are as long as most of those about leases.
const MESSAGE: [u8; 48] = [7; 48];

/// Sends every message back, as long as there are some left to play.
#[derive(Default)]
struct Player {
    left: Mutex<u64>,
    over: Condvar,
}

impl Handler for Player {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, _conn: &Arc<dyn Connection>) {}
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let mut left = self.left.lock();
        *left = left.saturating_sub(1);
        if *left == 0 || conn.send(message).is_err() {
            self.over.notify_all();
        }
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {
        self.over.notify_all();
    }
}

/// A node that plays with the storage endpoint.
pub struct Floor {
    player: Arc<Player>,
    fabric: Arc<dyn Fabric>,
    conn: Arc<dyn Connection>,
    store: Store,
}

impl Floor {
    /// Opens the two endpoints.
    ///
    /// # Errors
    /// The provider does not work here.
    pub fn open(provider: &str, hosts: &Hosts, spin: Duration) -> anyhow::Result<Self> {
        let echo = Arc::new(Player::default());
        *echo.left.lock() = u64::MAX;
        let store = Store::open(provider, hosts, spin, echo)?;
        let player = Arc::new(Player::default());
        let fabric = endpoint(
            provider,
            hosts,
            (store.dir.path(), 1, "player"),
            spin,
            Arc::clone(&player) as _,
        )?;
        let conn = fabric.connect(&store.fabric.local_addr()).context("storage")?;
        Ok(Self {
            player,
            fabric,
            conn,
            store,
        })
    }

    /// One atomic at a time, each waited for.
    ///
    /// # Errors
    /// The connection broke.
    pub fn atomic(&self, n: u64) -> anyhow::Result<Latency> {
        let at = RemoteAddr {
            key: self.store.key,
            offset: 0,
        };
        let mut latency = Latency::new()?;
        for _ in 0..n {
            let start = Instant::now();
            self.conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }])?;
            latency.add(start.elapsed());
        }
        check()?;
        Ok(latency)
    }

    /// Half a round trip of messages, ns: the mean, as one follows the other by itself.
    ///
    /// # Errors
    /// The other side does not answer.
    pub fn message(&self, n: u64) -> anyhow::Result<f64> {
        let start = Instant::now();
        *self.player.left.lock() = n;
        self.conn.send(&MESSAGE)?;
        let mut left = self.player.left.lock();
        while *left > 0 {
            let late = self.player.over.wait_for(&mut left, Duration::from_secs(30));
            if late.timed_out() || !self.conn.is_alive() {
                bail!("the other side does not answer");
            }
        }
        Ok(start.elapsed().as_secs_f64() * 1e9 / n as f64 / 2.0)
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.fabric.shutdown();
        self.store.fabric.shutdown();
    }
}
