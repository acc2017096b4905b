//! Posting batches of the state machines: one by one, or those of several records together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::{AsyncOp, Connection, OpResult, Outcome};

use super::driver::Driver;
use crate::LeaseError;
use crate::fsm::{Event, WordOps};
use crate::lease::LeaseHandle;
use crate::wire;

/// Most operations that are posted together; less than a batch of the fabric may have, whichever it is.
const TOGETHER: usize = 32;

/// The batch of a record.
type RecordBatch = (Arc<LeaseHandle>, WordOps);

/// When batches are posted.
pub(super) enum Posting<'a> {
    /// At once.
    AtOnce,
    /// By [`Driver::post_together`].
    Together(&'a mut Vec<RecordBatch>),
}

/// What is posted together: operations on records of one storage node.
#[derive(Default)]
struct Group {
    ops: Vec<AsyncOp>,
    batches: Vec<RecordBatch>,
}

impl Driver {
    pub(super) fn post(&self, lease: &Arc<LeaseHandle>, ops: WordOps, posting: &mut Posting<'_>) {
        if let Posting::Together(batches) = posting {
            return batches.push((Arc::clone(lease), ops));
        }
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        let connection = self.storage.connection(lease.id().shard());
        let (conn, at) = match self.dir.record(lease.id()) {
            Ok(found) => found,
            Err(error) => return self.batch_lost(lease, connection, error),
        };
        let (me, lease) = (self.me.clone(), Arc::clone(lease));
        conn.submit(
            wire::operations(&ops, at, self.cfg.layout, self.cfg.node),
            Box::new(move |results: Outcome| {
                // Without a manager there is nobody left to tell.
                let Some(me) = me.upgrade() else { return };
                match results {
                    Ok(results) => me.batch_done(&lease, ops, &results),
                    Err(error) => me.batch_failed(&lease, connection, &error.to_string()),
                }
            }),
        );
    }

    /// Posts batches of several records, those at one storage node in as few batches of the fabric as may be.
    pub(super) fn post_together(&self, batches: Vec<RecordBatch>) {
        let mut groups: BTreeMap<u32, (Option<Arc<dyn Connection>>, u64, Group)> = BTreeMap::new();
        for (lease, ops) in batches {
            let shard = lease.id().shard();
            let connection = self.storage.connection(shard);
            let (conn, at) = match self.dir.record(lease.id()) {
                Ok(found) => found,
                Err(error) => {
                    self.batch_lost(&lease, connection, error);
                    continue;
                }
            };
            let (former, number, group) = groups.entry(shard).or_default();
            let replaced = former.as_ref().is_some_and(|former| former.id() != conn.id());
            if let Some(former) = former
                .as_ref()
                .filter(|_| replaced || group.ops.len() + 2 > TOGETHER)
            {
                self.submit(former.as_ref(), *number, std::mem::take(group));
            }
            group
                .ops
                .extend(wire::operations(&ops, at, self.cfg.layout, self.cfg.node));
            group.batches.push((lease, ops));
            (*former, *number) = (Some(conn), connection);
        }
        for (conn, number, group) in groups.into_values() {
            if let Some(conn) = conn {
                self.submit(conn.as_ref(), number, group);
            }
        }
    }

    /// `connection`: as [`super::storage::Storage::connection`] has counted it.
    fn submit(&self, conn: &dyn Connection, connection: u64, group: Group) {
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        let (me, batches) = (self.me.clone(), group.batches);
        conn.submit(
            group.ops,
            Box::new(move |results: Outcome| {
                let Some(me) = me.upgrade() else { return };
                let mut results = match results {
                    Ok(results) => results,
                    Err(error) => {
                        let why = error.to_string();
                        let lost = |(lease, _): &RecordBatch| me.batch_failed(lease, connection, &why);
                        return batches.iter().for_each(lost);
                    }
                };
                for (lease, ops) in &batches {
                    let own: Vec<OpResult> = results.drain(..ops.iter().count().min(results.len())).collect();
                    me.batch_done(lease, *ops, &own);
                }
            }),
        );
    }

    fn batch_done(&self, lease: &Arc<LeaseHandle>, ops: WordOps, results: &[OpResult]) {
        // Results that do not fit fail in the state machine as an outcome that lacks them.
        let outcome = wire::outcome(&ops, results, self.cfg.layout, self.cfg.node);
        self.drive(lease, Some(Event::BatchDone(outcome.unwrap_or_default())));
    }

    fn batch_failed(&self, lease: &Arc<LeaseHandle>, connection: u64, why: &str) {
        let error = LeaseError::StorageLost {
            shard: lease.id().shard(),
            why: why.to_owned(),
        };
        self.batch_lost(lease, connection, error);
    }

    fn batch_lost(&self, lease: &Arc<LeaseHandle>, connection: u64, error: LeaseError) {
        tracing::warn!(record = %lease.id(), %error, "outcome of a lease operation unknown");
        lease.record.lock().trouble = Some(error);
        self.drive(lease, Some(Event::BatchLost));
        // If the connection was replaced in the meantime nobody else will say so.
        if self.storage.connection(lease.id().shard()) != connection {
            self.drive(lease, Some(Event::Reconnected));
        }
    }
}
