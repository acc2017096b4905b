//! The metadata server's requests, one after the other on the progress thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_transport::{ConnId, Connection};

use super::records::{Member, Txn, decode, key};
use super::server::{Flaw, House, Inner};
use super::window::Window;
use super::{Refusal, no};
use fsd_node::store::prefix_end;
use fsd_proto::ino;
use fsd_proto::rpc::{Errno, Responder};
use fsd_proto::wire::{Attr, DirEntry, Hello, MetaReply, MetaRequest, StatFs, Time};

/// Bytes of directory entries in one answer.
const READDIR_BYTES: usize = 64 << 10;
/// Most inode numbers handed out at once.
const MAX_RESERVE: u32 = 1024;

pub(super) type Answer = Result<MetaReply, Refusal>;

impl Inner {
    pub(super) fn request(self: &Arc<Self>, hello: &Hello, body: &[u8], responder: Responder) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let request = match fsd_proto::wire::decode::<MetaRequest>(body) {
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
                match self.reserve(self.member(responder.conn().id()), count.min(MAX_RESERVE)) {
                    Ok(numbers) if self.flawed(Flaw::NumbersEarly) => responder.reply(&Ok(numbers)),
                    // A number that was used, and whose being given out was lost, would be given out again.
                    Ok(numbers) => self.once_durable(responder, numbers),
                    Err(refusal) => responder.reply::<MetaReply>(&Err(refusal.errno())),
                }
            }
            MetaRequest::Leave => match self.leave(responder.conn().id()) {
                // What it has done it keeps no longer than that.
                Ok(left) if self.flawed(Flaw::LeftEarly) => responder.reply(&Ok(left)),
                Ok(left) => self.once_durable(responder, left),
                Err(refusal) => responder.reply::<MetaReply>(&Err(refusal.errno())),
            },
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
                conn.id(),
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
            request @ (MetaRequest::Namespace { .. }
            | MetaRequest::Update { .. }
            | MetaRequest::Reap { .. }) => {
                let (reply, place) = self.transaction(self.member(conn.id()), request, None)?;
                Ok(self.ordered(place, reply))
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
            | MetaRequest::Leave
            | MetaRequest::ReserveInodes { .. }
            | MetaRequest::Replay { .. }
            | MetaRequest::SetLock { .. }
            | MetaRequest::CancelLock { .. }
            | MetaRequest::ReleaseLocks { .. } => no(libc::EINVAL),
        }
    }

    /// Whose connection this is.
    pub(super) fn member(&self, conn: ConnId) -> Option<u16> {
        self.state.lock().sessions.by_conn(conn)
    }

    pub(super) fn txn(&self) -> Txn<'_> {
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
}
