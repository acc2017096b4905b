//! What changes the store: numbers given out, and the mounts' transactions.

use super::names::{self, Change, Effects};
use super::records::{Txn, decode, encode, key};
use super::server::{Inner, State};
use super::service::Answer;
use super::{Refusal, no};
use fsd_node::store::StoreError;
use fsd_proto::ino;
use fsd_proto::wire::{AttrUpdate, Created, InoRange, MetaReply, MetaRequest, NamespaceOp, Time, Touched};

impl Inner {
    /// Numbers for new inodes, spread over the storage nodes; used ones first.
    pub(super) fn reserve(&self, node: Option<u16>, count: u32) -> Answer {
        let node = node.map_or_else(|| no(libc::ENOTCONN), Ok)?;
        let mut state = self.state.lock();
        let mut txn = self.txn();
        let shards = self.superblock.shards;
        let per_shard = (count as usize).div_ceil(usize::from(shards));
        let mut inos = Vec::with_capacity(count as usize);
        for step in 0..shards {
            let shard = (state.next_shard + step) % shards;
            let mut used = txn.scan_stored(&key::reusable(shard, 0)[..9], per_shard)?;
            let left = (ino::MAX_INDEX + 1).saturating_sub(state.next_index[usize::from(shard)]) as usize;
            if used.len() + left < per_shard {
                used.extend(txn.scan_stored(&key::worn(shard, 0)[..9], per_shard - used.len() - left)?);
            }
            for (k, v) in used.iter().take(count as usize - inos.len()) {
                inos.push(ino::compose(shard, decode(v)?, key::second(k)));
                txn.delete(k.clone());
            }
            let mut next = state.next_index[usize::from(shard)];
            for _ in used.len()..per_shard {
                if inos.len() < count as usize && next <= ino::MAX_INDEX {
                    inos.push(ino::compose(shard, 0, next));
                    next += 1;
                }
            }
            txn.put(key::next_index(shard), encode(&next));
            state.next_index[usize::from(shard)] = next;
        }
        state.next_shard = (state.next_shard + 1) % shards;
        if inos.is_empty() {
            return no(libc::ENOSPC);
        }
        for &ino in &inos {
            txn.put(key::reserved(node, ino), Vec::new());
        }
        txn.commit()?;
        Ok(MetaReply::Inodes(InoRange { inos }))
    }

    /// Carries out a mount's transaction: one that gets a place in the order of all, or, `again`, has got it before.
    /// The answer, and the place.
    pub(super) fn transaction(
        &self,
        node: Option<u16>,
        request: MetaRequest,
        again: Option<u64>,
    ) -> Result<(MetaReply, u64), Refusal> {
        match request {
            MetaRequest::Namespace {
                seq,
                acknowledged,
                now,
                touched,
                op,
            } => {
                let node = node.map_or_else(|| no(libc::ENOTCONN), Ok)?;
                let (created, place) =
                    self.namespace(node, (seq, acknowledged), now, &touched, &op, again)?;
                Ok((MetaReply::Changed(created), place))
            }
            MetaRequest::Update { updates } => Ok((MetaReply::Done, self.update(&updates, again)?)),
            MetaRequest::Reap { ino } => Ok((MetaReply::Done, self.reap(ino, again)?)),
            _ => no(libc::EPROTO),
        }
    }

    /// Applies a transaction, at the place it had before if it is carried out `again`; the place it has.
    fn commit(&self, txn: Txn<'_>, again: Option<u64>) -> Result<u64, StoreError> {
        match again {
            Some(place) => self.order.commit_again(txn, place).map(|()| place),
            None => self.order.commit(txn),
        }
    }

    /// Carries out a change of the namespace, unless it has been; its answer, and its place in the order.
    fn namespace(
        &self,
        node: u16,
        (seq, acknowledged): (u64, u64),
        now: Time,
        touched: &[Touched],
        op: &NamespaceOp,
        again: Option<u64>,
    ) -> Result<(Created, u64), Refusal> {
        let state = &mut *self.state.lock();
        if let Some(bytes) = state.answers.get(&node).and_then(|a| a.get(&seq)) {
            return decode::<(Created, u64)>(bytes);
        }
        use NamespaceOp::{Create, Link, SetXattr};
        if matches!(op, Create { .. } | Link { .. } | SetXattr { .. }) {
            self.store.room()?;
        }
        let op = &self.adjust(state, op);
        let result = Change::new(self.txn(), node, now, self.era(), touched).run(op);
        let (mut txn, created, effects) = result?;
        // The place it is about to get: requests come one after the other.
        let bytes = encode(&(&created, again.unwrap_or(self.order.executed() + 1)));
        txn.put(key::answer(node, seq), bytes.clone());
        let answers = state.answers.entry(node).or_default();
        let old: Vec<u64> = answers.range(..acknowledged).map(|(&s, _)| s).collect();
        for s in &old {
            answers.remove(s);
            txn.delete(key::answer(node, *s));
        }
        answers.insert(seq, bytes);
        let place = match self.commit(txn, again) {
            Ok(place) => place,
            Err(error) => {
                state.answers.entry(node).or_default().remove(&seq);
                return Err(error.into());
            }
        };
        self.settle(state, &effects);
        Ok((created, place))
    }

    /// Takes attributes in; the place of that in the order.
    fn update(&self, updates: &[AttrUpdate], again: Option<u64>) -> Result<u64, Refusal> {
        let mut txn = self.txn();
        for update in updates {
            names::update(&mut txn, self.era(), update)?;
        }
        Ok(self.commit(txn, again)?)
    }

    /// A reap that overtook the unlink it belongs to: nobody has the inode open any more.
    fn adjust(&self, state: &mut State, op: &NamespaceOp) -> NamespaceOp {
        use NamespaceOp::{Rename, Unlink};
        let mut op = op.clone();
        let (victim, keep) = match &mut op {
            Unlink { ino, keep, .. } => (Some(*ino), keep),
            Rename { replaced, keep, .. } => (*replaced, keep),
            _ => return op,
        };
        let before = state.early_reaps.len();
        state.early_reaps.retain(|&ino| Some(ino) != victim);
        if state.early_reaps.len() != before {
            *keep = false;
        }
        op
    }

    /// Removes an orphan; the place of that in the order.
    fn reap(&self, ino: u64, again: Option<u64>) -> Result<u64, Refusal> {
        let mut state = self.state.lock();
        let change = Change::new(self.txn(), 0, Time::now(), self.era(), &[]);
        match change.reap(ino)? {
            Some((txn, effects)) => {
                let place = self.commit(txn, again)?;
                self.settle(&mut state, &effects);
                Ok(place)
            }
            None => {
                if self.txn().inode(ino).is_ok() && !state.early_reaps.contains(&ino) {
                    state.early_reaps.push(ino);
                }
                Ok(0)
            }
        }
    }

    /// Books the effects of an applied transaction.
    pub(super) fn settle(&self, state: &mut State, effects: &Effects) {
        state.inodes = state.inodes.saturating_add_signed(effects.inodes);
        state.orphans = state.orphans.saturating_add_signed(effects.orphans);
        for &ino in &effects.freed {
            self.free_later(ino);
        }
    }
}
