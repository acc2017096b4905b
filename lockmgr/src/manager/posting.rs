//! Posting batches of the state machines: one by one, or those of several records together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::{AsyncOp, Connection, OpResult, Outcome};

use super::driver::Driver;
use super::outgoing::{Posting, RecordBatch};
use crate::LeaseError;
use crate::fsm::{Event, WordOps};
use crate::lease::LeaseHandle;
use crate::wire;

/// Most operations that are posted together; less than a batch of the fabric may have, whichever it is.
const TOGETHER: usize = 32;

/// What is posted together: operations on records of one storage node.
struct Group {
    conn: Arc<dyn Connection>,
    /// As [`super::storage::Storage::connection`] has counted it.
    connection: u64,
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
        let mut groups: BTreeMap<u32, Group> = BTreeMap::new();
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
            let posted = wire::operations(&ops, at, self.cfg.layout, self.cfg.node);
            let group = match groups.remove(&shard) {
                Some(group) if group.ops.len() + posted.len() > TOGETHER || group.conn.id() != conn.id() => {
                    self.submit(group);
                    None
                }
                other => other,
            };
            let mut group = group.unwrap_or(Group {
                conn,
                connection,
                ops: Vec::new(),
                batches: Vec::new(),
            });
            group.ops.extend(posted);
            group.batches.push((lease, ops));
            groups.insert(shard, group);
        }
        groups.into_values().for_each(|group| self.submit(group));
    }

    fn submit(&self, group: Group) {
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        let (me, batches, connection) = (self.me.clone(), group.batches, group.connection);
        group.conn.submit(
            group.ops,
            Box::new(move |results: Outcome| {
                let Some(me) = me.upgrade() else { return };
                match results {
                    Ok(results) => {
                        let mut results = results.into_iter();
                        for (lease, ops) in &batches {
                            let own: Vec<OpResult> = results.by_ref().take(ops.iter().count()).collect();
                            me.batch_done(lease, *ops, &own);
                        }
                    }
                    Err(error) => {
                        let why = error.to_string();
                        for (lease, _) in &batches {
                            me.batch_failed(lease, connection, &why);
                        }
                    }
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
