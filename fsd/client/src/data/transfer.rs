//! Moving data between a mount and the pools of the storage nodes, by one-sided operations.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{AsyncOp, Op, OpResult, TransportError, gather_then};
use rt::time::Instant;

use crate::session::Session;
use crate::session::ctx::{Ctx, Res, Stop, fail};
use crate::session::net::StorageSession;
use fsd_proto::layout::BLOCK;
use fsd_proto::rpc::Errno;

/// Transfers in one batch; with the counter of a slab for each it stays below any fabric's limit.
const BATCH: usize = 32;
/// Pause between two attempts.
const RETRY: Duration = Duration::from_millis(10);

/// A one-sided operation on a storage node's pool.
#[derive(Debug)]
pub enum PoolOp<'a> {
    /// From the pool into memory of the caller.
    Read {
        /// Offset in the pool.
        offset: u64,
        /// Destination.
        into: &'a mut [u8],
    },
    /// From memory of the caller into the pool.
    Write {
        /// Offset in the pool.
        offset: u64,
        /// Source.
        from: &'a [u8],
    },
}

/// Operations on the pools of several storage nodes.
#[derive(Debug, Default)]
pub struct Transfers<'a>(BTreeMap<u16, Vec<PoolOp<'a>>>);

impl<'a> Transfers<'a> {
    /// One more, on storage node `node`.
    pub fn add(&mut self, node: u16, op: PoolOp<'a>) {
        self.0.entry(node).or_default().push(op);
    }
}

/// The slabs that operations write to. After the writes the counter of each is moved, so that the flusher never takes a slab for clean
/// too early.
fn slabs_written(ops: &[PoolOp<'_>]) -> Vec<u64> {
    let mut slabs: Vec<u64> = Vec::new();
    for op in ops {
        if let PoolOp::Write { offset, .. } = op
            && !slabs.contains(&(*offset / BLOCK))
        {
            slabs.push(*offset / BLOCK);
        }
    }
    slabs
}

/// The way to the pools.
pub struct Transfer {
    pub(crate) session: Arc<Session>,
}

impl Transfer {
    /// Runs operations against the pools of storage nodes: of several of them at once.
    ///
    /// # Errors
    /// Park; a node is away for longer than programs wait.
    pub fn all(&self, ctx: &Ctx<'_>, mut transfers: Transfers<'_>) -> Res<()> {
        if !self.session.local_memory() && transfers.0.len() > 1 {
            ctx.may_wait()?;
            self.at_once(&mut transfers, || ());
        }
        for (node, mut ops) in transfers.0 {
            self.one_by_one(ctx, node, &mut ops)?;
        }
        Ok(())
    }

    /// Runs operations once, at storage nodes that are connected. False: not all is done, nobody is waited for, and it is to be done again.
    #[must_use]
    pub fn once(&self, mut transfers: Transfers<'_>) -> bool {
        if !self.session.local_memory() {
            return self.once_with(transfers, || ());
        }
        transfers.0.iter_mut().all(|(&node, ops)| {
            let session = self.session.net.storage.session_now(node);
            let mut parts = ops.chunks_mut(BATCH);
            session.is_some_and(|session| parts.all(|part| execute(&session, part).is_ok()))
        })
    }

    /// As [`Transfer::once`], between hosts; `beside` runs while the operations are on their way.
    pub fn once_with(&self, mut transfers: Transfers<'_>, beside: impl FnOnce()) -> bool {
        self.at_once(&mut transfers, beside);
        transfers.0.is_empty()
    }

    /// As [`Transfer::all`]. `then` runs when all operations are on their way: a message that it sends to one of the nodes arrives when
    /// those have taken effect there. None: some had to be repeated, so that may not be so.
    ///
    /// # Errors
    /// As [`Transfer::all`].
    pub fn all_then<T>(
        &self,
        ctx: &Ctx<'_>,
        mut transfers: Transfers<'_>,
        then: impl FnOnce() -> T,
    ) -> Res<Option<T>> {
        if self.session.local_memory() {
            self.all(ctx, transfers)?;
            return Ok(Some(then()));
        }
        ctx.may_wait()?;
        let sent = self.at_once(&mut transfers, then);
        let in_order = transfers.0.is_empty();
        self.all(ctx, transfers)?;
        Ok(sent.filter(|_| in_order))
    }

    /// Runs the operations against each node that is connected at the same time, and takes out those that are done. `then` runs when
    /// they are on their way.
    fn at_once<T>(&self, transfers: &mut Transfers<'_>, then: impl FnOnce() -> T) -> Option<T> {
        let mut asked: Vec<(u16, usize)> = Vec::new();
        let mut batches = Vec::new();
        for (&node, ops) in &transfers.0 {
            let Some(session) = self.session.net.storage.session_now(node) else {
                continue;
            };
            for part in ops.chunks(BATCH) {
                let Ok(batch) = self.batch_of(&session, part) else {
                    break;
                };
                asked.push((node, part.len()));
                batches.push((Arc::clone(&session.conn), batch));
            }
        }
        let (mut then, mut sent) = (Some(then), None);
        let mut behind = || sent = then.take().map(|then| then());
        let outcomes = gather_then(batches, &mut behind, self.session.net.ways.patience.for_answer());
        let mut failed: Vec<u16> = Vec::new();
        let mut begun: BTreeMap<u16, usize> = BTreeMap::new();
        for ((node, len), outcome) in asked.into_iter().zip(outcomes) {
            let from = begun.entry(node).or_default();
            let ops = transfers.0.get_mut(&node);
            match (outcome, ops) {
                (Ok(results), Some(ops)) => take_in(&mut ops[*from..*from + len], results),
                _ => failed.push(node),
            }
            *from += len;
        }
        transfers
            .0
            .retain(|node, ops| failed.contains(node) || begun.get(node) != Some(&ops.len()));
        sent
    }

    /// Operations as the fabric carries them out by itself, with memory of its own.
    fn batch_of(&self, session: &StorageSession, ops: &[PoolOp<'_>]) -> Result<Vec<AsyncOp>, TransportError> {
        let mut batch = Vec::with_capacity(ops.len() + 8);
        for op in ops {
            batch.push(match op {
                PoolOp::Read { offset, into } => AsyncOp::Read {
                    at: session.pool(*offset),
                    into: self.session.net.ways.buffer(into.len())?,
                },
                PoolOp::Write { offset, from } => {
                    let mut buffer = self.session.net.ways.buffer(from.len())?;
                    buffer.copy_from_slice(from);
                    AsyncOp::Write {
                        at: session.pool(*offset),
                        from: buffer,
                    }
                }
            });
        }
        batch.extend(slabs_written(ops).into_iter().map(|slab| AsyncOp::Faa {
            at: session.dirty(slab * BLOCK),
            add: 1,
        }));
        Ok(batch)
    }

    /// Runs operations against one node's pool; repeats them on a new connection where
    /// the old one broke (reads and writes of file data may be done twice).
    fn one_by_one(&self, ctx: &Ctx<'_>, node: u16, ops: &mut [PoolOp<'_>]) -> Res<()> {
        if !self.session.local_memory() {
            ctx.may_wait()?;
        }
        let began = Instant::now();
        loop {
            let session = match self.session.net.storage.session_now(node) {
                Some(session) => session,
                None => {
                    ctx.may_wait()?;
                    self.session.net.storage.session(node)?
                }
            };
            let mut parts = ops.chunks_mut(BATCH);
            match parts.try_for_each(|part| execute(&session, part)) {
                Ok(()) => return Ok(()),
                Err(error @ TransportError::Invalid(_)) => {
                    tracing::error!("storage node {node}: {error}");
                    return fail(libc::EIO);
                }
                Err(error) => {
                    tracing::debug!("storage node {node}: {error}");
                    if self.session.net.ways.patience.is_over(began) {
                        return Err(Stop::Errno(Errno(libc::EIO)));
                    }
                    ctx.may_wait()?;
                    rt::thread::sleep(RETRY);
                }
            }
        }
    }
}

/// Runs a batch in the caller's memory.
fn execute(session: &StorageSession, ops: &mut [PoolOp<'_>]) -> Result<(), TransportError> {
    let slabs = slabs_written(ops);
    let mut batch: Vec<Op<'_>> = Vec::with_capacity(ops.len() + slabs.len());
    for op in ops {
        batch.push(match op {
            PoolOp::Read { offset, into } => Op::Read {
                at: session.pool(*offset),
                into,
            },
            PoolOp::Write { offset, from } => Op::Write {
                at: session.pool(*offset),
                from,
            },
        });
    }
    batch.extend(slabs.into_iter().map(|slab| Op::Faa {
        at: session.dirty(slab * BLOCK),
        add: 1,
        old: 0,
    }));
    session.conn.execute(&mut batch)
}

/// What reads have brought.
fn take_in(ops: &mut [PoolOp<'_>], results: Vec<OpResult>) {
    for (op, result) in ops.iter_mut().zip(results) {
        if let (PoolOp::Read { into, .. }, OpResult::Read(buffer)) = (op, result) {
            into.copy_from_slice(&buffer);
        }
    }
}
