//! The connections to the storage nodes, and where their regions are.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use lockmgr::{LeaseError, RecordId};
use rdma_transport::{Connection, RegionKey, RemoteAddr, TransportError};
use rt::sync::{Mutex, RwLock};
use rt::time::Instant;

use super::meta::MetaLink;
use super::ways::Ways;
use fsd_proto::rpc::{Errno, Pending, RpcError};
use fsd_proto::stores::{older_store, other_store};
use fsd_proto::wire::{Attached, StorageInfo, StorageReply, StorageRequest};
use fsd_proto::{ask, ino};

/// A connection to a storage node, with the keys of its regions.
pub struct StorageSession {
    /// The connection.
    pub conn: Arc<dyn Connection>,
    /// Pool and dirty counters.
    pub attached: Attached,
    segments: RwLock<HashMap<u32, RegionKey>>,
}

impl StorageSession {
    /// Address in the pool.
    #[must_use]
    pub fn pool(&self, offset: u64) -> RemoteAddr {
        RemoteAddr {
            key: RegionKey(self.attached.pool_key),
            offset,
        }
    }

    /// Address of the dirty counter of the slab that holds `offset`.
    #[must_use]
    pub fn dirty(&self, offset: u64) -> RemoteAddr {
        RemoteAddr {
            key: RegionKey(self.attached.dirty_key),
            offset: offset / fsd_proto::layout::BLOCK * 8,
        }
    }
}

pub(super) struct StorageLink {
    pub(super) id: u16,
    addr: String,
    /// Number of its store: another one has none of the cluster's blocks.
    store: OnceLock<String>,
    /// Its generation is at least this: one that is less is an older copy.
    generation: AtomicU64,
    pub(super) session: RwLock<Option<Arc<StorageSession>>>,
    connecting: Mutex<()>,
    /// Why it was refused the last time.
    refused: Mutex<String>,
}

impl StorageLink {
    pub(super) fn new(info: &StorageInfo) -> Self {
        Self {
            id: info.id,
            addr: info.listen.clone(),
            store: info.store.clone().map_or_else(OnceLock::new, OnceLock::from),
            generation: AtomicU64::new(info.generation),
            session: RwLock::new(None),
            connecting: Mutex::new(()),
            refused: Mutex::default(),
        }
    }
}

impl StorageLink {
    /// Does not talk to a store that is not the right one; says why, but not at every attempt.
    fn refuse(&self, conn: &Arc<dyn Connection>, what: String) -> RpcError {
        conn.close();
        let mut told = self.refused.lock();
        if *told != what {
            tracing::error!("{what}");
            told.clone_from(&what);
        }
        TransportError::Invalid(what).into()
    }

    /// Where the node is.
    pub(super) fn addr(&self) -> &str {
        &self.addr
    }
}

/// Requests to storage nodes that are on their way.
pub struct Begun<'a, R> {
    links: &'a StorageLinks,
    requests: &'a [(u16, R)],
    /// None: there was no connection.
    pending: Vec<Option<Pending<'a>>>,
}

impl<R> Begun<'_, R>
where
    R: ask::Request<Message = StorageRequest, Answer = StorageReply> + Clone,
{
    /// Waits for all answers, in the order of the requests.
    pub fn answers(self) -> Vec<Result<R::Reply, RpcError>> {
        let patience = self.links.ways.patience.for_answer();
        let asked = self.requests.iter().zip(self.pending);
        let answers = asked.map(|((id, request), pending)| {
            match pending.map(|p| p.wait(patience)) {
                // There was no connection, or it has broken.
                None | Some(Err(RpcError::Transport(_))) => self.links.ask(*id, request.clone()),
                Some(answer) => ask::answer_to::<R>(answer?),
            }
        });
        answers.collect()
    }
}

/// The ways to the storage nodes.
pub struct StorageLinks {
    ways: Arc<Ways>,
    meta: Arc<MetaLink>,
    pub(super) links: OnceLock<Vec<StorageLink>>,
    pub(super) record_bytes: AtomicU64,
    /// This life leases in the tables that were found: there will be no others for it.
    leases: AtomicBool,
}

impl StorageLinks {
    pub(super) fn new(ways: &Arc<Ways>, meta: &Arc<MetaLink>) -> Self {
        Self {
            ways: Arc::clone(ways),
            meta: Arc::clone(meta),
            links: OnceLock::new(),
            record_bytes: AtomicU64::new(64),
            leases: AtomicBool::new(false),
        }
    }

    fn link(&self, id: u16) -> Result<&StorageLink, RpcError> {
        self.links
            .get()
            .and_then(|links| links.iter().find(|l| l.id == id))
            .ok_or(RpcError::Errno(Errno(libc::ENOTCONN)))
    }

    /// What has been found at each of the storage nodes, by number.
    ///
    /// # Errors
    /// One is away for longer than is waited for, or refuses.
    pub(super) fn found(&self) -> Result<Vec<Attached>, RpcError> {
        let links = self.links.get().into_iter().flatten();
        links
            .map(|link| Ok(self.session(link.id)?.attached.clone()))
            .collect()
    }

    /// This life leases in these tables, or it does not begin to: false, there are others by now.
    pub(super) fn lease_in(&self, tables: &[u64]) -> Result<bool, RpcError> {
        self.leases.store(true, Ordering::SeqCst);
        let now = self.found()?;
        let same = now
            .iter()
            .map(|attached| attached.table)
            .eq(tables.iter().copied());
        self.leases.store(same, Ordering::SeqCst);
        Ok(same)
    }

    /// These are the lease tables that there are: the storage node whose table this life trusts though there is another one, if any.
    #[must_use]
    pub fn trusts_another(&self, tables: &[u64]) -> Option<u16> {
        let links = self.links.get().into_iter().flatten();
        let mut trusted =
            links.filter_map(|link| Some((link.id, link.session.read().as_ref()?.attached.table)));
        let other = |&(id, table): &(u16, u64)| tables.get(usize::from(id)).is_some_and(|now| *now != table);
        trusted.find(other).map(|(id, _)| id)
    }

    /// Number of storage nodes.
    #[must_use]
    pub fn count(&self) -> u16 {
        self.links.get().map_or(1, |links| links.len() as u16)
    }

    /// The session with a storage node, if it is up.
    #[must_use]
    pub fn session_now(&self, id: u16) -> Option<Arc<StorageSession>> {
        let link = self.link(id).ok()?;
        link.session
            .read()
            .as_ref()
            .filter(|s| s.conn.is_alive())
            .cloned()
    }

    /// The session with a storage node; connects if need be.
    ///
    /// # Errors
    /// It is away for longer than programs wait, or refuses.
    pub fn session(&self, id: u16) -> Result<Arc<StorageSession>, RpcError> {
        self.session_since(id, Instant::now())
    }

    /// As [`StorageLinks::session`], needed since `began`.
    fn session_since(&self, id: u16, began: Instant) -> Result<Arc<StorageSession>, RpcError> {
        loop {
            match self.session_or_attach(id) {
                Err(RpcError::Transport(error)) => self.ways.pause(began, error)?,
                other => return other,
            }
        }
    }

    /// The session; attaches to the node where there is none, at the first attempt or not at all.
    fn session_or_attach(&self, id: u16) -> Result<Arc<StorageSession>, RpcError> {
        if let Some(session) = self.session_now(id) {
            return Ok(session);
        }
        let link = self.link(id)?;
        let _one = link.connecting.lock();
        if let Some(session) = self.session_now(id) {
            return Ok(session);
        }
        let session = Arc::new(self.attach(link)?);
        let before = link.session.read().clone();
        if self.leases.load(Ordering::SeqCst)
            && before.is_some_and(|before| before.attached.table != session.attached.table)
        {
            // Not one operation of this life may reach the new table: it would change words there that it knows nothing of.
            session.conn.close();
            if let Some(owner) = self.ways.owner() {
                owner.leases_lost(id);
            }
            return Err(RpcError::Errno(Errno(libc::EIO)));
        }
        let before = link.session.write().replace(Arc::clone(&session));
        if let (Some(_), Some(owner)) = (before, self.ways.owner()) {
            tracing::info!("connected to storage node {id} again");
            self.ways.note_outage();
            owner.storage_back(id);
        }
        Ok(session)
    }

    fn attach(&self, link: &StorageLink) -> Result<StorageSession, RpcError> {
        let conn = self.ways.fabric.connect(&link.addr)?;
        let attached = ask::ask_on(
            &self.ways.calls,
            &conn,
            ask::storage::Attach {},
            self.ways.patience.for_answer(),
        )?;
        let expected = link.store.get_or_init(|| attached.store.clone());
        if *expected != attached.store {
            return Err(link.refuse(&conn, other_store(link.id, &link.addr, &attached.store, expected)));
        }
        self.refresh_generation(link);
        let (found, known) = (attached.generation, link.generation.load(Ordering::Acquire));
        if found < known {
            return Err(link.refuse(&conn, older_store(link.id, &link.addr, found, known)));
        }
        link.generation.fetch_max(found, Ordering::AcqRel);
        // The lease segments in use before must be known at once: messages about their records do not wait.
        let known: Vec<u32> = link
            .session
            .read()
            .as_ref()
            .map(|s| s.segments.read().keys().copied().collect())
            .unwrap_or_default();
        let session = StorageSession {
            conn,
            attached,
            segments: RwLock::default(),
        };
        for segment in known {
            self.load_segment(&session, segment)?;
        }
        Ok(session)
    }

    /// A storage node that comes back may do so with an older copy of its store: the metadata server knows better than this
    /// mount how new it must be.
    fn refresh_generation(&self, link: &StorageLink) {
        if link.session.read().is_none() || !self.meta.is_up() {
            return;
        }
        if let Ok((storage, _)) = self.meta.ask(ask::meta::Cluster {})
            && let Some(info) = storage.iter().find(|info| info.id == link.id)
        {
            link.generation.fetch_max(info.generation, Ordering::AcqRel);
        }
    }

    fn load_segment(&self, session: &StorageSession, segment: u32) -> Result<(), RpcError> {
        let request = ask::storage::LeaseSegment { segment };
        let patience = self.ways.patience.for_answer();
        let key = ask::ask_on(&self.ways.calls, &session.conn, request, patience)?;
        session.segments.write().insert(segment, RegionKey(key));
        Ok(())
    }

    /// Asks a storage node; repeats the request on a new connection where the old one broke.
    ///
    /// # Errors
    /// Its refusal; it is away for longer than programs wait.
    pub fn ask<R>(&self, id: u16, request: R) -> Result<R::Reply, RpcError>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply>,
    {
        let request = request.message();
        let began = Instant::now();
        loop {
            let session = self.session_since(id, began)?;
            let patience = self.ways.patience.for_answer();
            match self.ways.calls.call(&session.conn, &request, patience) {
                Err(RpcError::Transport(error)) => self.ways.pause(began, error)?,
                other => return ask::answer_to::<R>(other?),
            }
        }
    }

    /// Does a storage node answer, now?
    pub(super) fn probe(&self, id: u16) -> Result<(), RpcError> {
        let (session, patience) = (self.session_or_attach(id)?, self.ways.patience.for_answer());
        ask::ask_on(&self.ways.calls, &session.conn, ask::storage::Space {}, patience).map(drop)
    }

    /// Asks storage nodes at once, and waits for all their answers, in the order of the requests.
    pub fn ask_each<R>(&self, requests: &[(u16, R)]) -> Vec<Result<R::Reply, RpcError>>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply> + Clone,
    {
        self.begin_each(requests).answers()
    }

    /// As [`StorageLinks::ask_each`], without waiting for the answers, or for room at the nodes.
    pub fn begin_each<'a, R>(&'a self, requests: &'a [(u16, R)]) -> Begun<'a, R>
    where
        R: ask::Request<Message = StorageRequest, Answer = StorageReply> + Clone,
    {
        let begin = |(id, request): &(u16, R)| {
            let session = self.session_now(*id)?;
            let message = request.clone().message();
            self.ways.calls.begin_queued(&session.conn, &message).ok()
        };
        Begun {
            links: self,
            requests,
            pending: requests.iter().map(begin).collect(),
        }
    }

    fn place(&self, session: &StorageSession, record: RecordId) -> Option<RemoteAddr> {
        let index = record.index();
        let per = u64::from(session.attached.segment_records);
        let key = *session.segments.read().get(&((index / per) as u32))?;
        Some(RemoteAddr {
            key,
            offset: index % per * self.record_bytes.load(Ordering::Relaxed),
        })
    }

    /// Is the place of a lease record known?
    #[must_use]
    pub fn knows_record(&self, record: RecordId) -> bool {
        self.session_now(ino::record_shard(record))
            .is_some_and(|s| self.place(&s, record).is_some())
    }

    /// Finds out where a lease record is.
    ///
    /// # Errors
    /// Its storage node is away for longer than programs wait, or refuses.
    pub fn find_record(&self, record: RecordId) -> Result<(), RpcError> {
        let began = Instant::now();
        loop {
            let session = self.session_since(ino::record_shard(record), began)?;
            if self.place(&session, record).is_some() {
                return Ok(());
            }
            let segment = (record.index() / u64::from(session.attached.segment_records)) as u32;
            match self.load_segment(&session, segment) {
                Err(RpcError::Transport(error)) => self.ways.pause(began, error)?,
                Err(error) => return Err(error),
                Ok(()) => {}
            }
        }
    }

    /// Connection and address of a lease record that has been found before.
    ///
    /// # Errors
    /// [`LeaseError::StorageLost`] while its storage node is away.
    pub fn record(&self, record: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        let shard = ino::record_shard(record);
        let lost = || LeaseError::StorageLost {
            shard: u32::from(shard),
            why: "not connected".into(),
        };
        if self.link(shard).is_err() {
            return Err(LeaseError::NoSuchRecord { record });
        }
        let session = self.session_now(shard).ok_or_else(lost)?;
        let addr = self.place(&session, record).ok_or_else(lost)?;
        Ok((Arc::clone(&session.conn), addr))
    }
}
