//! What an enter costs while the lease is held, and what taking and giving back a lease costs without the
//! fabric.
//!
//! ```text
//! cargo run --release -p lockmgr --example uncontended
//! ```
#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use common::{Conn, Memory, Submit, layout};
use lockmgr::{
    Directory, LeaseError, LeaseManager, LeaseUser, ManagerConfig, Mode, NodeId, RecordId, Relinquish,
};
use rdma_transport::{AsyncOp, Completion, Connection, RemoteAddr};

struct Link(Memory);

impl Submit for Link {
    fn submit(&self, batch: Vec<AsyncOp>, done: Completion) {
        done(Ok(batch.iter().map(|op| self.0.run(op)).collect()));
    }
}

struct Alone(Arc<Conn<Link>>, OnceLock<Weak<LeaseManager>>);

impl Directory for Alone {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        Ok((Arc::clone(&self.0) as _, Memory::at(id)))
    }
    fn send(&self, _: NodeId, _: &[u8]) -> Result<(), LeaseError> {
        Ok(())
    }
}

impl LeaseUser for Alone {
    fn revoke(&self, id: RecordId, _: Mode, _: Option<Mode>) {
        let manager = self.1.get().and_then(Weak::upgrade).unwrap();
        manager.close_gate(id, Box::new(|| ()));
        manager.relinquished(id, Relinquish::default()).unwrap();
    }
    fn granted(&self, _: RecordId, _: Mode, _: u64, _: Option<&[u8]>) {}
    fn confirm(&self, _: RecordId, _: u64) {}
}

fn time(what: &str, n: u32, mut f: impl FnMut(u32)) {
    (0..n / 10).for_each(&mut f);
    let start = Instant::now();
    (0..n).for_each(&mut f);
    println!(
        "{what}: {:.1} ns",
        start.elapsed().as_secs_f64() * 1e9 / f64::from(n)
    );
}

fn main() {
    const RECORDS: u64 = 10_000;
    let user = Arc::new(Alone(Arc::new(Conn(Link(Memory::new(RECORDS)))), OnceLock::new()));
    let cfg = ManagerConfig::new(NodeId(1), 1, layout());
    let manager = LeaseManager::new(cfg, Arc::clone(&user) as _, Arc::clone(&user) as _).unwrap();
    user.1.set(Arc::downgrade(&manager)).unwrap();
    let patience = Duration::from_secs(1);
    for i in 0..RECORDS {
        drop(
            manager
                .enter(RecordId::new(0, i), Mode::Shared, patience)
                .unwrap(),
        );
    }
    let one = RecordId::new(0, 77);
    let handle = manager.handle(one).unwrap();
    time("try_enter by handle", 10_000_000, |_| {
        drop(handle.try_enter(Mode::Shared).unwrap())
    });
    time("try_enter, one record", 10_000_000, |_| {
        drop(manager.try_enter(one, Mode::Shared).unwrap())
    });
    time("try_enter, 10000 records", 10_000_000, |i| {
        let id = RecordId::new(0, u64::from(i.wrapping_mul(7919)) % RECORDS);
        drop(manager.try_enter(id, Mode::Shared).unwrap());
    });
    for mode in [Mode::Shared, Mode::Exclusive] {
        manager.release(one);
        time(
            &format!("acquire {mode} and release, fabric at no cost"),
            500_000,
            |_| {
                drop(manager.enter(one, mode, patience).unwrap());
                manager.release(one);
            },
        );
    }
    println!("{:?}", manager.stats());
}
