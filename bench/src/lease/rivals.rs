//! What leases are compared with: a spin lock by compare-and-swap, and a lock server with messages.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use parking_lot::{Condvar, Mutex};
use rdma_transport::{Connection, Fabric, Handler, Op, RemoteAddr, TransportError};

use super::PATIENCE;
use super::contend::Lock;
use super::node::{Silent, Store};
use crate::transport::peer::{Hosts, endpoint};

/// A word that every node spins on.
pub struct CasLocks {
    store: Store,
    nodes: Vec<(Arc<dyn Fabric>, Arc<dyn Connection>)>,
}

impl CasLocks {
    /// Starts the nodes.
    ///
    /// # Errors
    /// The provider does not work here.
    pub fn start(provider: &str, hosts: &Hosts, nodes: usize, spin: Duration) -> anyhow::Result<Self> {
        let store = Store::open(provider, hosts, spin, Arc::new(Silent))?;
        let mut all = Vec::new();
        for n in 0..nodes {
            let fabric = endpoint(
                provider,
                hosts,
                (store.dir.path(), n + 1, &format!("node{n}")),
                spin,
                Arc::new(Silent),
            )?;
            let conn = fabric.connect(&store.fabric.local_addr())?;
            all.push((fabric, conn));
        }
        Ok(Self { store, nodes: all })
    }
}

impl Drop for CasLocks {
    fn drop(&mut self) {
        self.nodes.iter().for_each(|(f, _)| f.shutdown());
        self.store.fabric.shutdown();
    }
}

impl Lock for CasLocks {
    fn with(&self, node: usize, inside: &mut dyn FnMut()) -> anyhow::Result<()> {
        let conn = &self.nodes[node].1;
        let at = RemoteAddr {
            key: self.store.key,
            offset: 64,
        };
        let me = node as u64 + 1;
        let cas = |expect: u64, new: u64| -> Result<u64, TransportError> {
            let mut op = [Op::Cas {
                at,
                expect,
                new,
                old: 0,
            }];
            conn.execute(&mut op)?;
            let [Op::Cas { old, .. }] = op else { return Ok(0) };
            Ok(old)
        };
        let mut tries = 0u32;
        while cas(0, me)? != 0 {
            tries += 1;
            if tries.is_multiple_of(16) {
                std::thread::yield_now();
            }
        }
        inside();
        if cas(me, 0)? != me {
            bail!("the lock was taken away");
        }
        Ok(())
    }
}

/// Grants the lock in the order in which it was asked for.
#[derive(Default)]
struct Server(Mutex<(bool, VecDeque<Arc<dyn Connection>>)>);

const LOCK: &[u8] = b"lock";
const UNLOCK: &[u8] = b"unlock";
const GRANTED: &[u8] = b"granted";

impl Handler for Server {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Ok(())
    }
    fn connected(&self, _conn: &Arc<dyn Connection>) {}
    fn message(&self, conn: &Arc<dyn Connection>, message: &[u8]) {
        let mut state = self.0.lock();
        let next = if message == LOCK {
            if state.0 {
                state.1.push_back(Arc::clone(conn));
                None
            } else {
                state.0 = true;
                Some(Arc::clone(conn))
            }
        } else {
            let next = state.1.pop_front();
            state.0 = next.is_some();
            next
        };
        drop(state);
        if let Some(conn) = next {
            let _ = conn.send(GRANTED);
        }
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {}
}

#[derive(Default)]
struct Client {
    granted: Mutex<bool>,
    changed: Condvar,
}

impl Handler for Client {
    fn admit(&self, _identity: &[u8]) -> Result<(), String> {
        Err("nobody connects to a client".into())
    }
    fn connected(&self, _conn: &Arc<dyn Connection>) {}
    fn message(&self, _conn: &Arc<dyn Connection>, _message: &[u8]) {
        *self.granted.lock() = true;
        self.changed.notify_one();
    }
    fn disconnected(&self, _conn: &Arc<dyn Connection>, _why: &TransportError) {}
}

struct RpcNode {
    fabric: Arc<dyn Fabric>,
    conn: Arc<dyn Connection>,
    client: Arc<Client>,
}

/// A lock server and its clients.
pub struct RpcLocks {
    store: Store,
    nodes: Vec<RpcNode>,
}

impl RpcLocks {
    /// Starts them.
    ///
    /// # Errors
    /// The provider does not work here.
    pub fn start(provider: &str, hosts: &Hosts, nodes: usize, spin: Duration) -> anyhow::Result<Self> {
        let store = Store::open(provider, hosts, spin, Arc::new(Server::default()))?;
        let mut all = Vec::new();
        for n in 0..nodes {
            let client = Arc::new(Client::default());
            let fabric = endpoint(
                provider,
                hosts,
                (store.dir.path(), n + 1, &format!("node{n}")),
                spin,
                Arc::clone(&client) as _,
            )?;
            let conn = fabric.connect(&store.fabric.local_addr())?;
            all.push(RpcNode { fabric, conn, client });
        }
        Ok(Self { store, nodes: all })
    }
}

impl Drop for RpcLocks {
    fn drop(&mut self) {
        self.nodes.iter().for_each(|n| n.fabric.shutdown());
        self.store.fabric.shutdown();
    }
}

impl Lock for RpcLocks {
    fn with(&self, node: usize, inside: &mut dyn FnMut()) -> anyhow::Result<()> {
        let RpcNode { conn, client, .. } = &self.nodes[node];
        conn.send(LOCK)?;
        let mut granted = client.granted.lock();
        while !*granted {
            if client.changed.wait_for(&mut granted, PATIENCE).timed_out() && !*granted {
                bail!("the lock server does not answer");
            }
        }
        *granted = false;
        drop(granted);
        inside();
        conn.send(UNLOCK)?;
        Ok(())
    }
}
