//! The metadata server's requests, one after the other on the progress thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rdma_transport::Connection;

use super::locks::{Outcome, Ticket};
use super::names::{self, Change};
use super::records::{Member, Txn, decode, encode, key};
use super::server::{House, Inner, State};
use super::sessions::Session;
use super::window::Window;
use super::{Refusal, no};
use crate::clock::{Skew, Verdict};
use crate::ino;
use crate::rpc::{Errno, Responder};
use crate::store::{StoreError, prefix_end};
use crate::wire::{
    Attr, AttrUpdate, Created, DirEntry, Hello, InoRange, JoinReply, LockSpec, MetaReply, MetaRequest,
    StatFs, StorageInfo, Time,
};

/// Bytes of directory entries in one answer.
const READDIR_BYTES: usize = 64 << 10;
/// Most inode numbers handed out at once.
const MAX_RESERVE: u32 = 1024;

type Answer = Result<MetaReply, Refusal>;

impl Inner {
    pub(super) fn request(self: &Arc<Self>, hello: &Hello, body: &[u8], responder: Responder) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let request = match crate::wire::decode::<MetaRequest>(body) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!("{} sent a request that cannot be read: {error}", hello.role);
                return responder.reply::<MetaReply>(&Err(Errno(libc::EPROTO)));
            }
        };
        if request == MetaRequest::Status {
            return self.status_later(responder);
        }
        if !Window::admits(&request)
            && let Some(window) = &mut self.state.lock().window
        {
            return window.park((request, responder));
        }
        self.serve(request, responder);
    }

    /// Answers a request, whether or not a window is open.
    pub(super) fn serve(&self, request: MetaRequest, responder: Responder) {
        if let MetaRequest::Replay { entries, last } = request {
            return self.replay(entries, last, responder);
        }
        let _serial = self.serial.lock();
        match request {
            MetaRequest::Sync => self.once_durable(responder, MetaReply::Done),
            MetaRequest::Settle => {
                // A server that stops closes the connection.
                let _ = self.freed.send(House::Settle(responder));
            }
            MetaRequest::ReserveInodes { count } => {
                match self.reserve(responder.conn(), count.min(MAX_RESERVE)) {
                    // A number that was used, and whose being given out was lost, would be given out again.
                    Ok(numbers) => self.once_durable(responder, numbers),
                    Err(refusal) => responder.reply::<MetaReply>(&Err(refusal.errno())),
                }
            }
            MetaRequest::SetLock { lock, wait } => self.set_lock(&lock, wait, responder),
            MetaRequest::CancelLock { lock } => {
                let (cancelled, served) = {
                    let mut state = self.state.lock();
                    state.locks.cancel(&lock)
                };
                self.answer_locks(cancelled.as_slice(), &Err(Errno(libc::EINTR)));
                self.answer_locks(&served, &Ok(MetaReply::Done));
                responder.reply(&Ok(MetaReply::Done));
            }
            MetaRequest::ReleaseLocks { ino, owner } => {
                let served = self.state.lock().locks.release(ino, owner);
                self.answer_locks(&served, &Ok(MetaReply::Done));
                responder.reply(&Ok(MetaReply::Done));
            }
            other => {
                let answer = self
                    .answer(responder.conn(), other)
                    .map_err(|refusal| refusal.errno());
                responder.reply(&answer);
            }
        }
    }

    /// Answers when everything so far is durable.
    fn once_durable(&self, responder: Responder, reply: MetaReply) {
        if let Err(refused) = self.sync.send((responder, reply)) {
            let (responder, _) = refused.0;
            responder.reply::<MetaReply>(&Err(Errno(libc::ESHUTDOWN)));
        }
    }

    fn answer(&self, conn: &Arc<dyn Connection>, request: MetaRequest) -> Answer {
        match request {
            MetaRequest::Clock => Ok(MetaReply::Clock(Time::now())),
            MetaRequest::Join {
                again,
                life,
                listen,
                name,
                skew,
                locks,
                durable,
            } => self.join(
                conn,
                (again, durable),
                Member {
                    incarnation: 0,
                    life,
                    name,
                    listen,
                },
                skew,
                &locks,
            ),
            MetaRequest::Tables { ids, stores, places } => {
                for (id, place) in (0..).zip(places) {
                    self.check_place(&format!("storage node {id}"), place)?;
                }
                self.check_stores(&stores)?;
                self.check_tables(&ids)?;
                Ok(MetaReply::Done)
            }
            MetaRequest::Leave => {
                let mut state = self.state.lock();
                let node = state
                    .sessions
                    .by_conn(conn.id())
                    .map_or_else(|| no(libc::ENOTCONN), Ok)?;
                self.forget(&mut state, node, true)?;
                let served = state.locks.release_node(node);
                drop(state);
                self.answer_locks(&served, &Ok(MetaReply::Done));
                tracing::info!("mount {node} has left");
                Ok(MetaReply::Done)
            }
            MetaRequest::Peer { node } => {
                let state = self.state.lock();
                let session = state
                    .sessions
                    .nodes
                    .get(&node)
                    .map_or_else(|| no(libc::ENOENT), Ok)?;
                Ok(MetaReply::Peer {
                    listen: session.member.listen.clone(),
                    state: session.state(),
                })
            }
            MetaRequest::Lookup { parent, name } => {
                let txn = self.txn();
                match txn.dirent(parent, &name)? {
                    Some(entry) => Ok(MetaReply::Found(Some((
                        entry.cookie,
                        self.attr(&txn, entry.ino)?,
                    )))),
                    None => {
                        txn.directory(parent)?;
                        Ok(MetaReply::Found(None))
                    }
                }
            }
            MetaRequest::GetAttr { ino } => Ok(MetaReply::Attr(self.attr(&self.txn(), ino)?)),
            MetaRequest::ReadDir { ino, after } => self.read_dir(ino, &after),
            MetaRequest::ReadLink { ino } => Ok(MetaReply::Target(self.txn().inode(ino)?.target)),
            MetaRequest::GetXattrs { ino } => {
                let pairs = self.txn().scan_stored(&key::xattr(ino, &[]), usize::MAX)?;
                Ok(MetaReply::Xattrs(
                    pairs
                        .into_iter()
                        .map(|(k, v)| (key::rest(&k).to_vec(), v))
                        .collect(),
                ))
            }
            MetaRequest::Namespace {
                seq,
                acknowledged,
                now,
                touched,
                op,
            } => {
                let mut state = self.state.lock();
                let node = state
                    .sessions
                    .by_conn(conn.id())
                    .map_or_else(|| no(libc::ENOTCONN), Ok)?;
                let (created, order) =
                    self.namespace(&mut state, node, (seq, acknowledged), now, &touched, &op, None)?;
                Ok(self.ordered(order, MetaReply::Changed(created)))
            }
            MetaRequest::Update { updates } => {
                let order = self.update(&updates, None)?;
                Ok(self.ordered(order, MetaReply::Done))
            }
            MetaRequest::Reap { ino } => {
                let order = self.reap(ino, None)?;
                Ok(self.ordered(order, MetaReply::Done))
            }
            MetaRequest::GetLock { lock } => Ok(MetaReply::Lock(self.state.lock().locks.test(&lock))),
            MetaRequest::StatFs => {
                let inodes = self.state.lock().inodes;
                Ok(MetaReply::StatFs(StatFs {
                    inodes,
                    free: ino::MAX_INDEX - inodes,
                }))
            }
            // Answered elsewhere.
            MetaRequest::Status => no(libc::EPROTO),
            MetaRequest::Cluster => Ok(MetaReply::Cluster {
                storage: self.storage_infos(),
                record_bytes: self.superblock.record_bytes,
            }),
            MetaRequest::Sync
            | MetaRequest::Settle
            | MetaRequest::ReserveInodes { .. }
            | MetaRequest::Replay { .. }
            | MetaRequest::SetLock { .. }
            | MetaRequest::CancelLock { .. }
            | MetaRequest::ReleaseLocks { .. } => no(libc::EINVAL),
        }
    }

    fn txn(&self) -> Txn<'_> {
        Txn::new(self.store.as_ref())
    }

    fn attr(&self, txn: &Txn<'_>, ino: u64) -> Result<Attr, Refusal> {
        let inode = txn.inode(ino)?;
        Ok(self.current(inode.attr, inode.era))
    }

    /// Versions of an older era are worth nothing.
    fn current(&self, mut attr: Attr, era: u32) -> Attr {
        if era != self.era() {
            attr.version = 0;
        }
        attr
    }

    fn storage_infos(&self) -> Vec<StorageInfo> {
        // Where they cannot be read nothing can, and whoever asks for more is told.
        let stores = self.known_stores().unwrap_or_default();
        self.config
            .storage
            .iter()
            .map(|s| StorageInfo {
                id: s.id,
                listen: s.listen.clone(),
                store: stores.get(usize::from(s.id)).cloned(),
                generation: self.copies.generation(s.id),
            })
            .collect()
    }

    fn join(
        &self,
        conn: &Arc<dyn Connection>,
        (again, durable): (Option<(u16, u8)>, u64),
        mut member: Member,
        skew: Skew,
        locks: &[LockSpec],
    ) -> Answer {
        let name = &member.name;
        self.check_place(&format!("mount {name}"), durable)?;
        match skew.verdict() {
            Verdict::Close => {}
            Verdict::Apart if again.is_none() => {
                tracing::warn!("mount {name} refused: its clock is {skew} this one; synchronise the clocks");
                return no(libc::ETIME);
            }
            // It holds leases and data that only it can give up: that it cannot is worse than wrong times of files.
            Verdict::Apart => {
                tracing::warn!("the clock of mount {name} is {skew} this one: synchronise the clocks");
            }
            // It may be right, and all that could be wrong are times of files, by little more than an exchange takes; a
            // mount that is refused because its host is busy serves nobody.
            Verdict::Unsure => {
                tracing::warn!(
                    "mount {name} answers too slowly to tell whether its clock is right: it is {skew} this one"
                );
            }
        }
        let layout = lockmgr::RecordLayout::new(self.superblock.record_bytes)
            .map_err(|_| Refusal::Errno(Errno(libc::EIO)))?;
        let mut state = self.state.lock();
        let (node, incarnation) = match again {
            // What it has cached this server's store has forgotten.
            Some(_) if self.copies.holds_up() || durable > self.order.executed() => return no(libc::ESTALE),
            Some((node, incarnation)) => {
                let known = state.sessions.nodes.get(&node);
                if !known.is_some_and(|s| s.member.life == member.life && !s.dead) {
                    return no(libc::ESTALE);
                }
                (node, incarnation)
            }
            // Mounts of a former life may come back, or hold leases that are released when they do not: until
            // that is known nobody new can be served.
            None if state.sessions.nobody_up() || state.window.is_some() || self.copies.holds_up() => {
                return no(libc::EAGAIN);
            }
            None => state
                .sessions
                .free_number(layout.max_nodes())
                .map_or_else(|| no(libc::EUSERS), Ok)?,
        };
        member.incarnation = incarnation;
        let mut txn = self.txn();
        txn.put(key::member(node), encode(&member));
        txn.commit()?;
        if again.is_none() {
            // A server that has lost its end must know whom to ask for it.
            self.order.sync()?;
        }
        tracing::info!(
            "mount {node} ({}) {}",
            member.name,
            if again.is_some() { "is back" } else { "has joined" }
        );
        state.sessions.incarnations.insert(node, incarnation);
        state.sessions.nodes.insert(
            node,
            Session {
                member,
                conn: Some(conn.id()),
                lost: None,
                gone: false,
                dead: false,
            },
        );
        let served = state.locks.forget_waiters(node);
        for lock in locks {
            state.locks.set(lock, None);
        }
        let awaited = state.window.as_ref().is_some_and(|w| w.awaits(node));
        drop(state);
        self.answer_locks(&served, &Ok(MetaReply::Done));
        Ok(MetaReply::Joined(JoinReply {
            node,
            incarnation,
            epoch: 0,
            record_bytes: self.superblock.record_bytes,
            storage: self.storage_infos(),
            executed: self.order.executed(),
            durable: self.order.durable(),
            awaited,
        }))
    }

    /// A mount is no more: its number, reservations and answers go.
    /// Numbers that one which `left` in order has not used nobody has heard of; of one that died that is not certain.
    pub(super) fn forget(&self, state: &mut State, node: u16, left: bool) -> Result<(), Refusal> {
        let Some(session) = state.sessions.nodes.remove(&node) else {
            return Ok(());
        };
        let mut txn = self.txn();
        let reserved = txn.scan_stored(&key::reserved(node, 0)[..9], usize::MAX)?;
        let unused = reserved.len();
        for (k, _) in reserved {
            let ino = key::second(&k);
            if left && ino::generation(ino) < ino::WORN {
                let unused = key::reusable(ino::shard(ino), ino::index(ino));
                txn.put(unused, encode(&ino::generation(ino)));
            } else {
                txn.recycle(ino);
            }
            txn.delete(k);
        }
        for (k, _) in txn.scan_stored(&key::answer(node, 0)[..9], usize::MAX)? {
            txn.delete(k);
        }
        txn.put(
            key::member(node),
            encode(&Member {
                life: 0,
                ..session.member
            }),
        );
        txn.commit()?;
        tracing::debug!("{unused} reserved inode numbers come back from mount {node}");
        state.answers.remove(&node);
        Ok(())
    }

    /// Numbers for new inodes, spread over the storage nodes; used ones first.
    fn reserve(&self, conn: &Arc<dyn Connection>, count: u32) -> Answer {
        let mut state = self.state.lock();
        let node = state
            .sessions
            .by_conn(conn.id())
            .map_or_else(|| no(libc::ENOTCONN), Ok)?;
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

    fn read_dir(&self, ino: u64, after: &[u8]) -> Answer {
        let txn = self.txn();
        txn.directory(ino)?;
        let mut from = key::dirent(ino, after);
        if !after.is_empty() {
            from.push(0);
        }
        let pairs = self.store.scan(&from, &prefix_end(&key::dirent(ino, &[])), 512)?;
        let full = pairs.len() == 512;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for (k, v) in pairs {
            let dirent: super::records::Dirent = decode(&v)?;
            let name = key::rest(&k).to_vec();
            bytes += name.len() + 120;
            let attr = self.attr(&txn, dirent.ino)?;
            entries.push((
                DirEntry {
                    name,
                    ino: dirent.ino,
                    kind: dirent.kind,
                    cookie: dirent.cookie,
                },
                attr,
            ));
            if bytes > READDIR_BYTES {
                return Ok(MetaReply::Entries(entries, false));
            }
        }
        Ok(MetaReply::Entries(entries, !full))
    }

    /// Applies a transaction, at the place it had before if it is carried out `again`; the place it has.
    fn commit(&self, txn: Txn<'_>, again: Option<u64>) -> Result<u64, StoreError> {
        match again {
            Some(place) => self.order.commit_again(txn, place).map(|()| place),
            None => self.order.commit(txn),
        }
    }

    /// Carries out a change of the namespace, unless it has been; its answer, and its place in the order.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn namespace(
        &self,
        state: &mut State,
        node: u16,
        (seq, acknowledged): (u64, u64),
        now: Time,
        touched: &[crate::wire::Touched],
        op: &crate::wire::NamespaceOp,
        again: Option<u64>,
    ) -> Result<(Created, u64), Refusal> {
        if let Some(bytes) = state.answers.get(&node).and_then(|a| a.get(&seq)) {
            return decode::<(Created, u64)>(bytes);
        }
        use crate::wire::NamespaceOp::{Create, Link, SetXattr};
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
    pub(super) fn update(&self, updates: &[AttrUpdate], again: Option<u64>) -> Result<u64, Refusal> {
        let mut txn = self.txn();
        for update in updates {
            names::update(&mut txn, self.era(), update)?;
        }
        Ok(self.commit(txn, again)?)
    }

    /// A reap that overtook the unlink it belongs to: nobody has the inode open any more.
    fn adjust(&self, state: &mut State, op: &crate::wire::NamespaceOp) -> crate::wire::NamespaceOp {
        use crate::wire::NamespaceOp::{Rename, Unlink};
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
    pub(super) fn reap(&self, ino: u64, again: Option<u64>) -> Result<u64, Refusal> {
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

    fn set_lock(&self, lock: &LockSpec, wait: bool, responder: Responder) {
        if lock.range.start > lock.range.end {
            return responder.reply::<MetaReply>(&Err(Errno(libc::EINVAL)));
        }
        let mut state = self.state.lock();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        let (outcome, served) = state.locks.set(lock, wait.then_some(ticket));
        let answer = match outcome {
            Outcome::Done => Ok(MetaReply::Done),
            Outcome::Conflict => Err(Errno(libc::EAGAIN)),
            Outcome::Deadlock => Err(Errno(libc::EDEADLK)),
            Outcome::Waiting => {
                state.lock_waiters.insert(ticket, responder);
                return;
            }
        };
        drop(state);
        responder.reply(&answer);
        self.answer_locks(&served, &Ok(MetaReply::Done));
    }

    pub(super) fn answer_locks(&self, tickets: &[Ticket], answer: &Result<MetaReply, Errno>) {
        for ticket in tickets {
            let waiter = self.state.lock().lock_waiters.remove(ticket);
            if let Some(responder) = waiter {
                responder.reply(answer);
            }
        }
    }

    pub(super) fn disconnected(&self, conn: &Arc<dyn Connection>, _hello: Option<&Hello>) {
        let lost = self.state.lock().sessions.lost(conn.id(), Instant::now());
        if let Some(node) = lost {
            tracing::warn!("connection to mount {node} lost");
        }
    }
}
