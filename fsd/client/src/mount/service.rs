//! What others ask of a mount, and what its connections tell it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lockmgr::msg::LeaseMsg;
use lockmgr::{Directory, LeaseError, Mode, NodeId, RecordId};
use rdma_transport::{Connection, RemoteAddr};

use crate::cache::inode::Inode;
use crate::client::Client;
use crate::session::net::{Net, Owner};
use fsd_proto::rpc::{Errno, Responder, Service};
use fsd_proto::wire::{
    AttrUpdate, Carried, Hello, LockSpec, MetaRequest, MountRequest, NamespaceOp, Role, Visited,
};

/// Connects the router to the client, which is made later.
pub(super) struct Front {
    pub(super) client: OnceLock<Weak<Client>>,
}

impl Service for Front {
    fn admit(&self, hello: &Hello) -> Result<(), String> {
        match hello.role {
            Role::Client(Some(_)) | Role::Tool => Ok(()),
            other => Err(format!("a mount accepts no connection from a {other}")),
        }
    }

    fn request(&self, hello: &Hello, body: &[u8], responder: Responder) {
        let refuse = |responder: Responder, errno| responder.reply::<()>(&Err(Errno(errno)));
        let Some(client) = self.client.get().and_then(Weak::upgrade) else {
            return refuse(responder, libc::EAGAIN);
        };
        match (fsd_proto::wire::decode::<MountRequest>(body), hello.role) {
            (Ok(MountRequest::Status), _) => {
                // It waits for answers that this thread brings.
                let asking = rt::thread::Builder::new()
                    .name("fsd-status".into())
                    .spawn(move || responder.reply(&Ok(client.status())));
                if let Err(error) = asking {
                    tracing::warn!("no thread can be started for the status: {error}");
                }
            }
            (Ok(MountRequest::View(view)), Role::Meta) => client.membership.take(view, responder),
            (Ok(MountRequest::Tables(tables)), Role::Meta) => {
                if let Some(shard) = client.session.net.storage.trusts_another(&tables) {
                    client.leases_lost(shard);
                }
                responder.reply::<()>(&Ok(()));
            }
            (Ok(MountRequest::Relay { from, life, frame }), Role::Meta) => {
                let taken = client.session.net.peers.take_relayed(NodeId(from), life, &frame);
                if let Ok(Some(message)) = taken {
                    heard(&client, from, message);
                }
                responder.reply(&taken.map(|_| ()));
            }
            (Ok(MountRequest::Visit { ino, offset, act }), Role::Client(Some(node))) => {
                match client.calls.get() {
                    Some(calls) => calls.forward.receive(node, ino, offset, act, responder),
                    // Without the extension nothing is forwarded: the lease is to be taken.
                    None => responder.reply(&Ok(Visited::Take)),
                }
            }
            _ => refuse(responder, libc::EPROTO),
        }
    }

    fn lease(&self, hello: &Hello, conn: &Arc<dyn Connection>, frame: &[u8]) {
        let (Role::Client(Some(node)), Some(client)) =
            (hello.role, self.client.get().and_then(Weak::upgrade))
        else {
            return;
        };
        let peers = &client.session.net.peers;
        if let Some(message) = peers.take_lease(NodeId(node), hello.life, conn, frame) {
            heard(&client, node, message);
        }
    }

    // The metadata server calls over the connection that the mount has made.
    fn connected(&self, hello: &Hello, conn: &Arc<dyn Connection>) {
        if let (Role::Client(Some(node)), Some(client)) =
            (hello.role, self.client.get().and_then(Weak::upgrade))
        {
            client.session.net.peers.connected(NodeId(node), hello, conn);
        }
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, _hello: Option<&Hello>) {
        if let Some(client) = self.client.get().and_then(Weak::upgrade) {
            client.session.net.disconnected(conn);
        }
    }
}

/// A lease message has come from another mount, whichever way.
fn heard(client: &Client, node: u16, message: &[u8]) {
    if let Some(inode) = LeaseMsg::record_of(message).and_then(|record| client.cache.inodes.by_record(record))
    {
        inode.heard_of(node);
    }
    if let Err(error) = client.session.leases.message(NodeId(node), message) {
        tracing::error!("lease message from mount {node}: {error}");
    }
}

/// Where lease records and other mounts are.
pub(super) struct Places(pub(super) Arc<Net>);

impl Directory for Places {
    fn record(&self, id: RecordId) -> Result<(Arc<dyn Connection>, RemoteAddr), LeaseError> {
        self.0.storage.record(id)
    }

    fn send(&self, to: NodeId, msg: &[u8]) -> Result<(), LeaseError> {
        self.0.peers.send_lease(to, msg);
        Ok(())
    }
}

impl Owner for Client {
    fn held_locks(&self) -> Vec<LockSpec> {
        self.files.locks.file_locks.all()
    }
    fn shared_attrs(&self) -> Vec<AttrUpdate> {
        let known = |inode: Arc<Inode>| {
            let (mode, version) = self.session.leases.held(inode.record())?;
            let state = inode.try_lock_raw()?;
            let attr = state.attr.filter(|_| state.version == Some(version))?;
            (mode == Mode::Shared).then(|| AttrUpdate {
                version,
                ..AttrUpdate::from(&attr)
            })
        };
        self.cache.inodes.all().into_iter().filter_map(known).collect()
    }
    fn storage_lost(&self, shard: u16) {
        self.data.space.accounts.forget(shard);
        self.session.leases.storage_lost(u32::from(shard));
    }
    fn transaction_lost(&self, request: &MetaRequest, error: Errno) {
        let inos: Vec<u64> = match request {
            MetaRequest::Namespace { touched, .. } => touched.iter().map(|t| t.ino).collect(),
            MetaRequest::WriteBack { changes, .. } => changes.iter().flat_map(Carried::inodes).collect(),
            MetaRequest::Update { updates } => updates.iter().map(|u| u.ino).collect(),
            _ => Vec::new(),
        };
        for inode in inos.into_iter().filter_map(|ino| self.cache.inodes.find(ino)) {
            tracing::error!(
                "a change of {:#x} that was acknowledged is lost: {error}",
                inode.ino
            );
            inode.errors.set(Errno(libc::EIO));
            // What is known of its names came of that change, too.
            inode.lock_raw().forget_names();
        }
    }
    fn carried_out(&self, change: &Carried, place: u64) {
        let unlinked = match change.op {
            NamespaceOp::Unlink { ino, .. } => Some(ino),
            NamespaceOp::Rename { replaced, .. } => replaced,
            _ => None,
        };
        if let Some(inode) = unlinked.and_then(|ino| self.cache.inodes.find(ino)) {
            inode.transit.push.lock().linked = (place as u32).max(1);
        }
    }
    fn storage_back(&self, shard: u16) {
        self.session.leases.storage_reconnected(u32::from(shard));
    }
    fn leases_lost(&self, shard: u16) {
        if self.session.fate.doom() {
            tracing::error!(
                "storage node {shard} came back without its leases (its host was restarted): this mount cannot know what others have changed, and begins anew"
            );
        }
    }
    fn alive(&self, sent: Duration) {
        self.session.term.renew(sent);
    }
    fn declared_dead(&self) {
        if !self.session.fate.left.load(Ordering::SeqCst) && self.session.term.finish() {
            tracing::error!(
                "this mount was declared dead, because it was silent for too long or was evicted: what it had not stored is lost, and it begins anew"
            );
            self.session.fate.doom();
        }
    }
    fn peer_unreachable(&self, node: NodeId) {
        self.session.leases.peer_unreachable(node);
    }
    fn peer_silent(&self, node: NodeId) {
        if let Some(calls) = self.calls.get() {
            calls.forward.take_back_reads(node.0);
        }
    }
    fn peer_gone(&self, node: NodeId) {
        self.session.leases.peer_gone(node);
    }
    fn peer_back(&self, node: NodeId) {
        self.session.leases.peer_back(node);
    }
}
