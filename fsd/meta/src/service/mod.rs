//! The metadata server's requests, one after the other on the progress thread.

mod status;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rdma_transport::{ConnId, Connection};
use rt::channel::Receiver;
use rt::sync::Mutex;
use rt::time::Instant;

use crate::error::{MetaError, Refusal, no};
use crate::journal::Journal;
use crate::journal::commits::OnceDurable;
use crate::journal::records::{Member, Superblock};
use crate::membership::members::Joining;
use crate::membership::{Membership, Woken};
use crate::namespace::Namespace;
use crate::namespace::freeing::Told;
use crate::namespace::sharing::Shown;
use crate::nodes::stores::Stores;
use crate::nodes::{Nodes, Reach};
use crate::rules::{Flaw, Rules};
use fsd_node::config::Config;
use fsd_node::store::Store;
use fsd_proto::ino;
use fsd_proto::rpc::{self, Errno, Responder};
use fsd_proto::wire::{Hello, Logged, MetaReply, MetaRequest, Role, StatFs, Time};
use status::Status;

/// Most inode numbers handed out at once.
const MAX_RESERVE: u32 = 4096;

/// Everything a metadata server consists of.
pub struct Service {
    /// What is kept.
    pub journal: Journal,
    /// The storage nodes.
    pub nodes: Nodes,
    /// Inodes and their names.
    pub namespace: Namespace,
    /// Who takes part.
    pub membership: Membership,
    /// What it keeps to.
    pub rules: Rules,
    status: Status,
    record_bytes: u32,
    /// One request after the other, whichever thread brings it.
    serial: Mutex<()>,
}

/// What the server's threads are told.
pub struct News {
    /// Who waits until everything is durable.
    pub commits: Receiver<OnceDurable>,
    /// For the one that keeps house.
    pub house: Receiver<Told>,
    /// For those that look after membership.
    pub membership: Woken,
}

impl Service {
    /// Goes on where a store ends. With `accept_older`, stores that are older copies are taken as they are; `reach` makes what
    /// asks the storage nodes.
    pub fn open(
        store: Arc<dyn Store>,
        config: &Config,
        superblock: &Superblock,
        (accept_older, rules): (bool, Rules),
        reach: impl FnOnce(&Arc<Stores>) -> Reach,
    ) -> Result<(Arc<Self>, News), MetaError> {
        let stores = Stores::load(Arc::clone(&store), &config.storage, accept_older)?;
        let stores = Arc::new(stores);
        let Reach { storage, mounts } = reach(&stores);
        let nodes = Nodes {
            stores,
            asks: storage,
            mounts,
        };
        let (journal, lost, commits) = Journal::open(store, superblock, &config.meta.memory_dir)?;
        let (namespace, house) = Namespace::load(&journal, superblock.shards, &nodes, rules)?;
        let of = (config, superblock);
        let (membership, woken) = Membership::load(&journal, of, &nodes, &namespace, (lost, rules))?;
        let status = Status {
            requests: Arc::new(AtomicU64::new(0)),
            journal: journal.clone(),
            nodes: nodes.clone(),
            namespace: namespace.clone(),
            members: Arc::clone(&membership.members),
            takeover: Arc::clone(&membership.takeover),
        };
        let service = Self {
            journal,
            nodes,
            namespace,
            membership,
            rules,
            status,
            record_bytes: superblock.record_bytes,
            serial: Mutex::default(),
        };
        let news = News {
            commits,
            house,
            membership: woken,
        };
        Ok((Arc::new(service), news))
    }

    /// Answers a request, whether or not a window is open.
    fn serve(&self, request: MetaRequest, responder: Responder) {
        if let MetaRequest::Replay { entries, last } = request {
            return self.replay(entries, last, responder);
        }
        let _serial = self.serial.lock();
        let conn = responder.conn().id();
        let (durable, answer) = match request {
            MetaRequest::Sync => (true, Ok(MetaReply::Done)),
            MetaRequest::Settle => return self.namespace.freeing.settle(responder),
            // A number that was used, and whose being given out was lost, would be given out again.
            MetaRequest::ReserveInodes { count } => {
                (!self.rules.lack(Flaw::NumbersEarly), self.reserve(conn, count))
            }
            // What it has done it keeps no longer than that.
            MetaRequest::Leave => (
                !self.rules.lack(Flaw::LeftEarly),
                self.membership.members.leave(conn),
            ),
            MetaRequest::SetLock { lock, wait } => {
                return self.membership.locks.set(&lock, wait, responder);
            }
            MetaRequest::GetLock { lock } => return self.membership.locks.test(&lock, responder),
            request @ MetaRequest::Join { .. } => return self.join(request, responder),
            other => {
                let shown = self.namespace.transactions.sharing.asked(&other);
                let answer = self.answer(conn, other);
                let shown = match &answer {
                    Ok(reply) => shown.and(reply),
                    Err(_) => shown,
                };
                (self.holds_back(conn, &shown), answer)
            }
        };
        let answer = answer.map_err(|refusal| refusal.errno());
        if durable {
            self.journal.commits.once_durable(responder, answer);
        } else {
            responder.reply(&answer);
        }
    }

    /// Would an answer show what another mount has changed and a crash could undo?
    fn holds_back(&self, conn: ConnId, shown: &Shown) -> bool {
        let (sharing, durable) = (&self.namespace.transactions.sharing, self.journal.order.durable());
        let node = || self.membership.members.of(conn).ok();
        !self.rules.lack(Flaw::SharedEarly) && sharing.holds_back(node, shown, durable)
    }

    fn reserve(&self, conn: ConnId, count: u32) -> Result<MetaReply, Refusal> {
        let node = self.membership.members.of(conn)?;
        // Whoever makes something of them does not ask again whether there is room.
        self.journal.store.room()?;
        let numbers = self.namespace.numbers.reserve(node, count.min(MAX_RESERVE))?;
        Ok(MetaReply::Inodes(numbers))
    }

    /// Answers what needs nothing but this server, and at once.
    fn answer(&self, conn: ConnId, request: MetaRequest) -> Result<MetaReply, Refusal> {
        let (members, locks) = (&self.membership.members, &self.membership.locks);
        let lookups = &self.namespace.lookups;
        match request {
            MetaRequest::Clock => Ok(MetaReply::Clock(Time::now())),
            MetaRequest::Tables { ids, stores, places } => {
                for (id, place) in (0..).zip(places) {
                    let who = format!("storage node {id}");
                    self.membership.copies.check_place(&who, place)?;
                }
                self.nodes.stores.check(&stores)?;
                self.membership.takeover.found_tables(conn, &ids)?;
                Ok(MetaReply::Done)
            }
            MetaRequest::Peer { node } => members.peer(node),
            MetaRequest::Lookup { parent, name } => Ok(MetaReply::Found(lookups.find(parent, &name)?)),
            MetaRequest::LookupAgain { parent, name, since } => {
                let found = lookups.find(parent, &name)?;
                let mut changed = self.namespace.transactions.recent.since(parent, since);
                if self.rules.lack(Flaw::ChangesUntold) {
                    changed = Some(Vec::new());
                }
                Ok(MetaReply::FoundAgain { found, changed })
            }
            MetaRequest::GetAttr { ino } => lookups.attr(ino),
            MetaRequest::ReadDir {
                ino,
                after,
                most,
                ahead,
            } => {
                let mut page = lookups.entries(ino, &after, most)?;
                if ahead && !self.rules.lack(Flaw::ReadEarly) {
                    let durable = self.journal.order.durable();
                    let sharing = &self.namespace.transactions.sharing;
                    sharing.leave_out(|| members.of(conn).ok(), (ino, &mut page), durable);
                }
                Ok(MetaReply::Entries(page))
            }
            MetaRequest::ReadLink { ino } => lookups.target(ino),
            MetaRequest::GetXattrs { ino } => lookups.xattrs(ino),
            request @ MetaRequest::WriteBack { .. } => {
                let transactions = &self.namespace.transactions;
                Ok(transactions.carry_out(members.of(conn).ok(), request, None)?.0)
            }
            request @ (MetaRequest::Namespace { .. }
            | MetaRequest::Update { .. }
            | MetaRequest::Reap { .. }) => {
                let transactions = &self.namespace.transactions;
                let (reply, place) = transactions.carry_out(members.of(conn).ok(), request, None)?;
                Ok(self.journal.commits.ordered(place, reply))
            }
            MetaRequest::CancelLock { lock } => {
                locks.cancel(&lock);
                Ok(MetaReply::Done)
            }
            MetaRequest::ReleaseLocks { ino, owner } => {
                locks.release(ino, owner);
                Ok(MetaReply::Done)
            }
            MetaRequest::GiveLocks { from, to } => {
                let sender = members.of(conn)?;
                if ![from, to].contains(&sender) {
                    return no(libc::EPERM);
                }
                // Who is dead, or has never been, would keep them for good.
                members.conn(to)?;
                locks.give(from, to);
                Ok(MetaReply::Done)
            }
            MetaRequest::StatFs => {
                let inodes = self.namespace.transactions.inodes();
                Ok(MetaReply::StatFs(StatFs {
                    inodes,
                    free: ino::MAX_INDEX - inodes,
                }))
            }
            MetaRequest::Cluster => Ok(MetaReply::Cluster {
                storage: self.nodes.stores.infos(),
                record_bytes: self.record_bytes,
            }),
            // Answered elsewhere.
            MetaRequest::Status
            | MetaRequest::Sync
            | MetaRequest::Settle
            | MetaRequest::Leave
            | MetaRequest::ReserveInodes { .. }
            | MetaRequest::Replay { .. }
            | MetaRequest::Join { .. }
            | MetaRequest::GetLock { .. }
            | MetaRequest::SetLock { .. }
            | MetaRequest::Heartbeat
            | MetaRequest::Evict { .. }
            | MetaRequest::Relay { .. } => no(libc::EPROTO),
        }
    }

    /// A mount joins, or comes back.
    fn join(&self, request: MetaRequest, responder: Responder) {
        let MetaRequest::Join {
            again,
            life,
            listen,
            name,
            skew,
            locks,
            durable,
        } = request
        else {
            return responder.reply::<MetaReply>(&Err(Errno(libc::EPROTO)));
        };
        let conn = Arc::clone(responder.conn());
        let member = Member {
            incarnation: 0,
            life,
            name,
            listen,
        };
        let joined = self.membership.members.join(Joining {
            conn: &conn,
            again,
            durable,
            member,
            skew,
            locks: &locks,
        });
        let welcome = joined.is_ok();
        responder.reply(&joined.map_err(|refusal| refusal.errno()));
        if welcome {
            // It is told of the dead behind the answer.
            self.membership.members.greeted(conn.id());
            self.membership.takeover.wake();
        }
    }

    /// A mount has a frame of lease messages for another one that it cannot reach.
    fn relay(&self, to: u16, frame: Vec<u8>, responder: Responder) {
        let members = &self.membership.members;
        let found = members
            .sender(responder.conn().id())
            .and_then(|from| Ok((from, members.conn(to)?)));
        match found {
            Ok((from, conn)) => {
                let done = Box::new(move |answer: Result<(), rpc::RpcError>| {
                    let answer = answer.map(|()| MetaReply::Done).map_err(|error| match error {
                        rpc::RpcError::Errno(errno) => errno,
                        _ => Errno(libc::EHOSTUNREACH),
                    });
                    responder.reply(&answer);
                });
                self.nodes.mounts.relay(&conn, from, frame, done);
            }
            Err(errno) => responder.reply::<MetaReply>(&Err(errno)),
        }
    }

    /// Answers what must not wait for anything else that is asked; what it is not is given back.
    fn at_once(
        &self,
        hello: &Hello,
        request: MetaRequest,
        responder: Responder,
    ) -> Option<(MetaRequest, Responder)> {
        let (members, conn) = (&self.membership.members, responder.conn().id());
        let anybodys = matches!(
            request,
            MetaRequest::Clock | MetaRequest::Join { .. } | MetaRequest::Cluster | MetaRequest::Status
        );
        if let Role::Client(_) = hello.role
            && !anybodys
            && !members.knows(hello.life)
        {
            // It has been declared dead, or has left.
            responder.reply::<MetaReply>(&Err(Errno(libc::ESTALE)));
            return None;
        }
        match request {
            MetaRequest::Status => self.status.later(responder),
            MetaRequest::Heartbeat => responder.reply(&members.heartbeat(conn)),
            MetaRequest::Relay { to, frame } => self.relay(to, frame, responder),
            MetaRequest::Evict { node } if hello.role == Role::Tool => {
                self.membership.takeover.evict(node, responder);
            }
            MetaRequest::Evict { .. } => responder.reply::<MetaReply>(&Err(Errno(libc::EPERM))),
            other => return Some((other, responder)),
        }
        None
    }

    /// Looks who has been silent for too long.
    pub fn judge(&self) {
        // What keeps the thread busy that hears the mounts is this server's own pause, too.
        drop(self.serial.lock());
        self.membership.members.judge(Instant::now());
        self.end_window();
        if !self.membership.members.view().0.dead.is_empty() {
            self.membership.takeover.wake();
        }
    }

    /// A mount tells what it was answered and this server may not have.
    fn replay(&self, entries: Vec<Logged>, last: bool, responder: Responder) {
        let recovery = &self.membership.recovery;
        let node = match self.membership.members.of(responder.conn().id()) {
            Ok(node) => node,
            Err(refusal) => return responder.reply::<MetaReply>(&Err(refusal.errno())),
        };
        match recovery.hear(node, entries, last, responder) {
            Some((entries, responder)) => {
                let _serial = self.serial.lock();
                responder.reply(&Ok(recovery.carry_out_late(node, entries)));
            }
            None if last => self.end_window(),
            None => {}
        }
    }

    /// Ends the window if nobody is waited for any more: everything told is carried out again, then what was asked meanwhile.
    pub fn end_window(&self) {
        let recovery = &self.membership.recovery;
        let told = {
            let _serial = self.serial.lock();
            recovery.finish()
        };
        let Some(told) = told else { return };
        for (responder, reply) in told {
            responder.reply(&Ok(reply));
        }
        loop {
            let parked = recovery.take_parked();
            if parked.is_empty() {
                return;
            }
            for (request, responder) in parked {
                self.serve(request, responder);
            }
        }
    }
}

impl rpc::Service for Service {
    fn admit(&self, _hello: &Hello) -> Result<(), String> {
        Ok(())
    }

    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        self.status.requests.fetch_add(1, Ordering::Relaxed);
        let request = match fsd_proto::wire::decode::<MetaRequest>(body) {
            Ok(request) => request,
            Err(error) => {
                tracing::warn!("{} sent a request that cannot be read: {error}", hello.role);
                return responder.reply::<MetaReply>(&Err(Errno(libc::EPROTO)));
            }
        };
        let Some((request, responder)) = self.at_once(hello, request, responder) else {
            return;
        };
        if let Some((request, responder)) = self.membership.recovery.admit(request, responder) {
            self.serve(request, responder);
        }
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, _hello: Option<&Hello>) {
        self.membership.members.disconnected(conn.id());
    }
}
