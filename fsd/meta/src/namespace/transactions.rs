//! Changes of mounts, each one transaction: carried out once, and at its place in the order of all.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rt::sync::Mutex;

use super::change::{Change, Effects};
use super::freeing::Freeing;
use super::operations;
use super::recent::Recent;
use super::sharing::{self, Sharing};
use crate::error::{MetaError, Refusal, no};
use crate::journal::Journal;
use crate::journal::records::{Txn, decode, encode, key};
use fsd_node::store::{Store, StoreError, prefix_end};
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{
    AttrUpdate, Carried, Created, MetaReply, MetaRequest, NamespaceOp, Time, Touched, Written,
};

/// What is known besides the store.
struct State {
    /// What mounts were answered, by number, until they say that they know.
    answers: HashMap<u16, BTreeMap<u64, Vec<u8>>>,
    /// What mounts had carried out themselves.
    carried: HashMap<u16, Last>,
    /// Reaps that came before the unlink they belong to.
    early_reaps: Vec<u64>,
    inodes: u64,
    orphans: u64,
}

/// The last of the changes that a mount had carried out itself and that have been carried out here.
#[derive(Debug, Clone, Default)]
struct Last {
    number: u64,
    /// What came of those of its last request from this number on: it may be repeated, where the answer was lost.
    first: u64,
    written: Vec<Written>,
}

impl Last {
    /// As a store says. What it has is durable, wherever it lies.
    fn stored(number: u64) -> Self {
        Self {
            number,
            ..Self::default()
        }
    }

    /// What came of a change before, if it has been carried out; `executed` is the place of the last of all.
    fn of(&self, number: u64, executed: u64) -> Option<Written> {
        if number > self.number {
            return None;
        }
        let at = number.checked_sub(self.first).map(|at| at as usize);
        let known = at.and_then(|at| self.written.get(at)).copied();
        Some(known.unwrap_or(Written {
            place: executed,
            cookie: 0,
        }))
    }

    /// A change of the request that begins with `first` has been carried out.
    fn note(&mut self, number: u64, first: u64, done: Written) {
        if number <= self.number {
            return;
        }
        if self.first != first || self.first + self.written.len() as u64 != number {
            (self.first, self.written) = (number, Vec::new());
        }
        self.written.push(done);
        self.number = number;
    }
}

/// Changes of mounts.
pub struct Transactions {
    journal: Journal,
    freeing: Arc<Freeing>,
    /// What other mounts are not told yet.
    pub sharing: Sharing,
    /// Names that were changed lately.
    pub recent: Recent,
    state: Mutex<State>,
}

fn count(store: &dyn Store, tag: u8) -> Result<u64, MetaError> {
    let (mut from, mut n) = (vec![tag], 0);
    loop {
        let pairs = store.scan(&from, &[tag + 1], 4096)?;
        let Some((last, _)) = pairs.last() else {
            return Ok(n);
        };
        from.clone_from(last);
        from.push(0);
        n += pairs.len() as u64;
    }
}

impl Transactions {
    /// As a store says.
    pub fn load(journal: &Journal, freeing: &Arc<Freeing>) -> Result<Self, MetaError> {
        let store = journal.store.as_ref();
        let mut answers: HashMap<u16, BTreeMap<u64, Vec<u8>>> = HashMap::new();
        for (k, v) in store.scan(b"L", b"M", usize::MAX)? {
            let of = answers.entry(key::number(&k) as u16).or_default();
            of.insert(key::second(&k), v);
        }
        let mut carried: HashMap<u16, Last> = HashMap::new();
        for (k, v) in store.scan(b"J", b"K", usize::MAX)? {
            carried.insert(key::number(&k) as u16, Last::stored(decode(&v)?));
        }
        Ok(Self {
            journal: journal.clone(),
            freeing: Arc::clone(freeing),
            sharing: Sharing::default(),
            recent: Recent::default(),
            state: Mutex::new(State {
                answers,
                carried,
                early_reaps: Vec::new(),
                inodes: count(store, b'I')?,
                orphans: count(store, b'O')?,
            }),
        })
    }

    /// Inodes that there are.
    pub fn inodes(&self) -> u64 {
        self.state.lock().inodes
    }

    /// Inodes without a name.
    pub fn orphans(&self) -> u64 {
        self.state.lock().orphans
    }

    /// Carries out a mount's transaction: one that gets a place in the order of all, or, `again`, has got it before.
    /// The answer, and the place.
    pub fn carry_out(
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
                let node = node.ok_or(Errno(libc::ENOTCONN))?;
                let (created, place) =
                    self.namespace(node, (seq, acknowledged), now, &touched, &op, again)?;
                Ok((MetaReply::Changed(created), place))
            }
            MetaRequest::WriteBack { first, changes } => {
                let node = node.ok_or(Errno(libc::ENOTCONN))?;
                let (written, stopped) = self.write_back(node, first, &changes, again);
                let failed = written.iter().find_map(|done| done.err()).or(stopped);
                if let Some(error) = failed.filter(|_| again.is_some()) {
                    return Err(error.into());
                }
                let durable = self.journal.order.durable();
                let reply = MetaReply::WrittenBack {
                    durable,
                    written,
                    stopped,
                    mark: self.recent.mark(),
                };
                Ok((reply, 0))
            }
            MetaRequest::Update { updates } => Ok((MetaReply::Done, self.update(&updates, again)?)),
            MetaRequest::Reap { ino } => Ok((MetaReply::Done, self.reap_one(ino, again)?)),
            _ => no(libc::EPROTO),
        }
    }

    /// Applies a transaction, at the place it had before if it is carried out `again`; the place it has.
    fn commit(&self, txn: Txn<'_>, again: Option<u64>) -> Result<u64, StoreError> {
        match again {
            Some(place) => self.journal.order.commit_again(txn, place).map(|()| place),
            None => self.journal.order.commit(txn),
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
            self.journal.store.room()?;
        }
        let op = adjust(state, op);
        let result = operations::run(self.change(node, now, touched), &op);
        let (mut txn, created, effects) = result?;
        // The place it is about to get: requests come one after the other.
        let bytes = encode(&(&created, again.unwrap_or(self.journal.order.executed() + 1)));
        txn.put(key::answer(node, seq), bytes.clone());
        let answers = state.answers.entry(node).or_default();
        let old: Vec<u64> = answers.range(..acknowledged).map(|(&s, _)| s).collect();
        for s in &old {
            answers.remove(s);
            txn.delete(key::answer(node, *s));
        }
        answers.insert(seq, bytes);
        match self.conclude(state, node, &op, (txn, effects), again) {
            Ok(place) => Ok((created, place)),
            Err(refusal) => {
                state.answers.entry(node).or_default().remove(&seq);
                Err(refusal)
            }
        }
    }

    /// Applies a change of the namespace; the place it has.
    fn conclude(
        &self,
        state: &mut State,
        node: u16,
        op: &NamespaceOp,
        (txn, effects): (Txn<'_>, Effects),
        again: Option<u64>,
    ) -> Result<u64, Refusal> {
        let place = self.commit(txn, again)?;
        self.sharing.note(node, op, place, self.journal.order.durable());
        for (dir, name) in sharing::names(op) {
            self.recent.note(dir, name);
        }
        self.settle(state, &effects);
        Ok(place)
    }

    /// Carries out what a mount has carried out itself, unless it has been; what came of each change. One that is refused, which
    /// is because one before it was lost, stops none of those behind it: what depends on it is refused, too. A store that takes nothing stops all.
    pub fn write_back(
        &self,
        node: u16,
        first: u64,
        changes: &[Carried],
        again: Option<u64>,
    ) -> (Vec<Result<Written, Errno>>, Option<Errno>) {
        let state = &mut *self.state.lock();
        let mut last = state.carried.get(&node).cloned().unwrap_or_default();
        let mut written = Vec::with_capacity(changes.len());
        for (number, change) in (first..).zip(changes) {
            let done = match last.of(number, self.journal.order.executed()) {
                Some(known) => Ok(known),
                None => match self.carry(state, node, number, change, again) {
                    // It was acknowledged: its mount keeps it until there is room.
                    Err(refusal @ Refusal::Store(_)) => {
                        state.carried.insert(node, last);
                        return (written, Some(refusal.errno()));
                    }
                    done => done.map_err(|refusal| refusal.errno()),
                },
            };
            if let Ok(done) = done {
                last.note(number, first, done);
            }
            written.push(done);
        }
        state.carried.insert(node, last);
        (written, None)
    }

    /// Carries out one of them.
    fn carry(
        &self,
        state: &mut State,
        node: u16,
        number: u64,
        carried: &Carried,
        again: Option<u64>,
    ) -> Result<Written, Refusal> {
        let op = adjust(state, &carried.op);
        let mut change = self.change(node, carried.now, &carried.touched);
        change.txn.foreseen(carried.cookie);
        let (mut txn, created, effects) = operations::run(change, &op)?;
        txn.put(key::carried(node), encode(&number));
        let place = self.conclude(state, node, &op, (txn, effects), again)?;
        let cookie = created.cookie;
        Ok(Written { place, cookie })
    }

    /// Takes attributes in; the place of that in the order.
    fn update(&self, updates: &[AttrUpdate], again: Option<u64>) -> Result<u64, Refusal> {
        let mut txn = self.journal.txn();
        for update in updates {
            operations::update(&mut txn, self.journal.eras.now(), update)?;
        }
        Ok(self.commit(txn, again)?)
    }

    /// Removes an orphan; the place of that in the order.
    fn reap_one(&self, ino: u64, again: Option<u64>) -> Result<u64, Refusal> {
        let mut state = self.state.lock();
        match self.reaped(ino)? {
            Some((txn, effects)) => {
                let place = self.commit(txn, again)?;
                self.settle(&mut state, &effects);
                Ok(place)
            }
            None => {
                if self.journal.txn().inode(ino).is_ok() && !state.early_reaps.contains(&ino) {
                    state.early_reaps.push(ino);
                }
                Ok(0)
            }
        }
    }

    /// The numbers of all orphans.
    pub fn orphan_numbers(&self) -> Result<Vec<u64>, Refusal> {
        let orphans = self.journal.store.scan(b"O", &prefix_end(b"O"), usize::MAX)?;
        Ok(orphans.iter().map(|(k, _)| key::number(k)).collect())
    }

    /// Removes those of all orphans that nobody has open.
    pub fn reap(&self, unused: impl Fn(u64) -> bool) -> Result<(), Refusal> {
        let mut state = self.state.lock();
        for number in self.orphan_numbers()?.into_iter().filter(|n| unused(*n)) {
            if let Some((txn, effects)) = self.reaped(number)? {
                txn.commit()?;
                self.settle(&mut state, &effects);
            }
        }
        Ok(())
    }

    /// The answers of a mount that is no more are of no use.
    pub fn forget(&self, node: u16) {
        let state = &mut *self.state.lock();
        state.answers.remove(&node);
        state.carried.remove(&node);
    }

    fn change(&self, node: u16, now: Time, touched: &[Touched]) -> Change<'_> {
        Change::new(self.journal.txn(), node, now, self.journal.eras.now(), touched)
    }

    fn reaped(&self, ino: u64) -> Result<Option<(Txn<'_>, Effects)>, Refusal> {
        operations::reap(self.change(0, Time::now(), &[]), ino)
    }

    /// Books the effects of an applied transaction.
    fn settle(&self, state: &mut State, effects: &Effects) {
        state.inodes = state.inodes.saturating_add_signed(effects.inodes);
        state.orphans = state.orphans.saturating_add_signed(effects.orphans);
        for &ino in &effects.freed {
            self.freeing.later(ino);
        }
    }
}

/// A reap that overtook the unlink it belongs to: nobody has the inode open any more.
fn adjust(state: &mut State, op: &NamespaceOp) -> NamespaceOp {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(place: u64) -> Written {
        Written { place, cookie: 3 }
    }

    #[test]
    fn a_request_that_is_repeated_is_answered_as_before() {
        let mut last = Last::default();
        assert_eq!(last.of(1, 0), None);
        for number in 1..=3 {
            last.note(number, 1, at(10 + number));
        }
        assert_eq!(
            [1, 2, 3, 4].map(|n| last.of(n, 20)),
            [Some(at(11)), Some(at(12)), Some(at(13)), None]
        );
        // The next one, of which the second was refused.
        last.note(4, 4, at(24));
        last.note(6, 4, at(25));
        assert_eq!((last.of(6, 30), last.of(7, 30)), (Some(at(25)), None));
        // What came before is certain to be carried out; it is not repeated while anybody cares for its place.
        assert_eq!(last.of(2, 30), Some(Written { place: 30, cookie: 0 }));
        assert_eq!(Last::stored(6).of(6, 30), Some(Written { place: 30, cookie: 0 }));
    }
}
