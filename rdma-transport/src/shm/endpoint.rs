//! The endpoint: listener, registered regions, setting up connections.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::conn::{Parts, ShmConn};
use super::control::{self, HandshakePipe, Notice};
use super::layout::{Channel, Directory, SLOTS, Side, slot_of};
use super::listen::listen;
use super::progress;
use crate::base::{self, Base, Endpoint};
use crate::buffer::{Buffer, BufferPool};
use crate::common::{self, LIMITS};
use crate::handshake::{self, Provider};
use crate::mem::SharedMem;
use crate::{
    Access, Connection, Fabric, FabricConfig, FabricKind, FabricStats, Handler, Limits, RegionKey,
    TransportError,
};

/// Sent by the connecting side with its directory, doorbell and the channel.
const SETUP: &[u8] = b"setup";

struct Region {
    key: RegionKey,
    access: Access,
    mem: Arc<SharedMem>,
}

/// Regions and connections under one lock: every connection is told of every region.
#[derive(Default)]
struct Links {
    regions: Vec<Option<Region>>,
    conns: Vec<Arc<ShmConn>>,
}

/// A connection on its way to the progress thread.
pub(super) struct Install {
    pub(super) conn: Arc<ShmConn>,
    /// Connections that this one replaces; they end first.
    pub(super) superseded: Vec<Arc<ShmConn>>,
}

pub(super) struct Core {
    pub(super) base: Base<Install>,
    pub(super) directory: Directory,
    pub(super) bell: OwnedFd,
    /// None: shut down.
    pub(super) listener: Mutex<Option<OwnedFd>>,
    links: Mutex<Links>,
}

pub(crate) struct ShmFabric {
    pub(super) core: Arc<Core>,
    /// Held until the endpoint is shut down; says that the socket path is in use.
    lock: Mutex<Option<OwnedFd>>,
}

/// Opens an endpoint that listens on a Unix socket path.
pub(crate) fn open(
    config: FabricConfig,
    handler: Arc<dyn Handler>,
) -> Result<Arc<dyn Fabric>, TransportError> {
    let fabric = start(config, handler)?;
    Ok(Arc::new(fabric))
}

pub(super) fn start(config: FabricConfig, handler: Arc<dyn Handler>) -> Result<ShmFabric, TransportError> {
    let (listener, lock) = listen(&config.listen)?;
    let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|e| TransportError::os("create an eventfd", &e.into()))?;
    let core = Arc::new(Core {
        base: Base::new(config, handler, BufferPool::new(None))?,
        directory: Directory::create()?,
        bell,
        listener: Mutex::new(Some(listener)),
        links: Mutex::new(Links::default()),
    });
    progress::start(&core)?;
    Ok(ShmFabric {
        core,
        lock: Mutex::new(Some(lock)),
    })
}

impl Endpoint for Core {
    type Install = Install;

    fn base(&self) -> &Base<Install> {
        &self.base
    }

    fn ring(&self) {
        let _full = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
}

impl Core {
    /// As `ring`, without a system call if the progress thread is running.
    pub(super) fn wake_if_sleeping(&self) {
        if self.directory.sleeping().swap(0, Ordering::SeqCst) != 0 {
            self.ring();
        }
    }

    /// Makes a new connection known: it learns of all regions, and of all future ones.
    fn link(&self, conn: &Arc<ShmConn>) {
        let mut links = self.links.lock();
        for region in links.regions.iter().flatten() {
            let len = region.mem.len() as u64;
            conn.notify(
                Notice::Region {
                    key: region.key.0,
                    len,
                    access: region.access,
                },
                Some(&region.mem),
            );
        }
        links.conns.push(Arc::clone(conn));
    }

    pub(super) fn unlink(&self, conn: &Arc<ShmConn>) {
        self.links.lock().conns.retain(|c| !Arc::ptr_eq(c, conn));
        self.base.counters.fold(&conn.stats());
    }

    /// Hands a connection to the progress thread, or undoes it.
    fn install_if(
        &self,
        ready: Result<(), TransportError>,
        conn: Arc<ShmConn>,
        superseded: Vec<Arc<ShmConn>>,
    ) -> Result<(), TransportError> {
        let handed = ready.and_then(|()| {
            self.install(Install {
                conn: Arc::clone(&conn),
                superseded,
            })
        });
        let Err(why) = handed else { return Ok(()) };
        conn.fail(why.clone());
        conn.finish();
        self.unlink(&conn);
        Err(why)
    }

    /// Takes an incoming socket: the handshake runs on a thread of its own.
    pub(super) fn accept(self: &Arc<Self>, sock: OwnedFd) {
        let sock = Arc::new(sock);
        let addr = match rustix::net::sockopt::socket_peercred(&*sock) {
            Ok(cred) => format!("process {}", cred.pid.as_raw_nonzero()),
            Err(_) => "a local process".to_owned(),
        };
        self.shake_hands(Arc::clone(&sock), move |core, deadline, timeout| {
            core.welcome(HandshakePipe {
                sock,
                addr,
                deadline,
                timeout,
            })
        });
    }

    fn welcome(self: &Arc<Self>, mut pipe: HandshakePipe) -> Result<(), TransportError> {
        let verified = handshake::server(&mut pipe, &self.base.local(Provider::Shm), &|identity| {
            self.base.handler.admit(identity)
        })?;
        pipe.send_with(&verified.welcome, &[self.directory.mem().fd(), self.bell.as_fd()])?;
        let malformed = || TransportError::Protocol {
            addr: pipe.addr.clone(),
            detail: "connection set-up without its shared memory".to_owned(),
        };
        let packet = pipe.recv_packet()?;
        let Ok([dir, bell, channel]) = <[OwnedFd; 3]>::try_from(packet.fds) else {
            return Err(malformed());
        };
        if packet.bytes != SETUP {
            return Err(malformed());
        }
        let parts = Parts {
            channel: Channel::of_peer(channel)?,
            peer_dir: Directory::of_peer(dir)?,
            peer_bell: bell,
            side: Side::Listening,
            addr: pipe.addr.clone(),
            sock: Arc::clone(&pipe.sock),
            peer: verified.peer,
        };
        let superseded: Vec<_> = {
            let links = self.links.lock();
            let over = |c: &&Arc<ShmConn>| c.base.superseded_by(&parts.peer);
            links.conns.iter().filter(over).cloned().collect()
        };
        for old in &superseded {
            // Returns when nothing of the old connection can land any more.
            old.close();
        }
        let conn = ShmConn::new(self.base.next_id(), self, parts);
        self.link(&conn);
        conn.notify(Notice::Ready, None);
        let ready = conn.await_ready(pipe.deadline);
        self.install_if(ready, conn, superseded)
    }

    pub(super) fn connect(self: &Arc<Self>, path: &str) -> Result<Arc<ShmConn>, TransportError> {
        let timeout = self.base.config.timeout;
        let deadline = Instant::now() + timeout;
        let unreachable = |reason: String| TransportError::Unreachable {
            addr: path.to_owned(),
            reason,
        };
        let address = control::address(path)?;
        let sock = control::socket()?;
        loop {
            match rustix::net::connect(&sock, &address) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                // The backlog is full.
                Err(Errno::AGAIN) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(e) => return Err(unreachable(e.to_string())),
            }
        }
        let mut pipe = HandshakePipe {
            sock: Arc::new(sock),
            addr: path.to_owned(),
            deadline,
            timeout,
        };
        let serial = self.base.next_id();
        let links_to = |instance: u64| {
            let links = self.links.lock();
            base::serials_to(links.conns.iter().map(|c| &c.base), instance)
        };
        let (peer, fds) = {
            let mut taker = FdTaker {
                pipe: &mut pipe,
                fds: Vec::new(),
            };
            let peer = handshake::client(&mut taker, &self.base.local(Provider::Shm), serial.0, &links_to)?;
            (peer, taker.fds)
        };
        let malformed = |detail: &str| TransportError::Protocol {
            addr: path.to_owned(),
            detail: detail.to_owned(),
        };
        let Ok([dir, bell]) = <[OwnedFd; 2]>::try_from(fds) else {
            return Err(malformed("welcome without its shared memory"));
        };
        let channel = Channel::create()?;
        let ours = [self.directory.mem().fd(), self.bell.as_fd(), channel.mem().fd()];
        pipe.send_with(SETUP, &ours)?;
        let parts = Parts {
            peer,
            addr: path.to_owned(),
            side: Side::Connecting,
            channel,
            peer_dir: Directory::of_peer(dir)?,
            peer_bell: bell,
            sock: Arc::clone(&pipe.sock),
        };
        let conn = ShmConn::new(serial, self, parts);
        let ready = conn.await_ready(deadline);
        self.link(&conn);
        conn.notify(Notice::Ready, None);
        self.install_if(ready, Arc::clone(&conn), Vec::new())?;
        Ok(conn)
    }
}

/// Keeps the descriptors that come with handshake messages.
struct FdTaker<'a> {
    pipe: &'a mut HandshakePipe,
    fds: Vec<OwnedFd>,
}

impl handshake::Pipe for FdTaker<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError> {
        self.pipe.send_with(message, &[])
    }
    fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
        let packet = self.pipe.recv_packet()?;
        self.fds = packet.fds;
        Ok(packet.bytes)
    }
    fn addr(&self) -> String {
        self.pipe.addr.clone()
    }
}

impl Fabric for ShmFabric {
    fn kind(&self) -> FabricKind {
        FabricKind::Shm
    }

    fn local_addr(&self) -> String {
        self.core.base.config.listen.clone()
    }

    fn limits(&self) -> Limits {
        LIMITS
    }

    fn set_identity(&self, identity: Vec<u8>) {
        self.core.base.set_identity(identity);
    }

    fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError> {
        self.core.base.check_open()?;
        let mut links = self.core.links.lock();
        let slot = match links.regions.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if links.regions.len() < SLOTS => {
                links.regions.push(None);
                links.regions.len() - 1
            }
            None => {
                return Err(TransportError::Os {
                    what: "register memory".to_owned(),
                    reason: format!("all {SLOTS} region slots of this endpoint are taken"),
                });
            }
        };
        let key = common::region_key(slot)?;
        for conn in &links.conns {
            conn.notify(
                Notice::Region {
                    key: key.0,
                    len: mem.len() as u64,
                    access,
                },
                Some(mem),
            );
        }
        links.regions[slot] = Some(Region {
            key,
            access,
            mem: Arc::clone(mem),
        });
        // Valid only now that every connection has been told.
        self.core.directory.key(slot).store(key.0, Ordering::SeqCst);
        Ok(key)
    }

    fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        let slot = slot_of(key.0);
        let conns = {
            let mut links = self.core.links.lock();
            match links.regions.get_mut(slot) {
                Some(region) if region.as_ref().is_some_and(|r| r.key == key) => *region = None,
                _ => {
                    return Err(TransportError::Invalid(format!(
                        "region {:#x} is not registered",
                        key.0
                    )));
                }
            }
            self.core.directory.key(slot).store(0, Ordering::SeqCst);
            for conn in &links.conns {
                conn.notify(Notice::Gone { key: key.0 }, None);
            }
            links.conns.clone()
        };
        let deadline = Instant::now() + self.core.base.config.timeout;
        for conn in conns {
            if !conn.wait_quiet(Some(slot), deadline) {
                return Err(common::timed_out(
                    &conn.peer_addr(),
                    self.core.base.config.timeout,
                ));
            }
        }
        Ok(())
    }

    fn buffer(&self, len: usize) -> Result<Buffer, TransportError> {
        self.core.base.buffers.take(len)
    }

    fn connect(&self, addr: &str) -> Result<Arc<dyn Connection>, TransportError> {
        self.core.base.check_open()?;
        let conn = self.core.connect(addr)?;
        Ok(conn)
    }

    fn stats(&self) -> FabricStats {
        let conns = self.core.links.lock().conns.clone();
        self.core.base.stats(conns.iter().map(|c| &c.base))
    }

    fn shutdown(&self) {
        if !self.core.base.begin_stop() {
            return;
        }
        let path = &self.core.base.config.listen;
        if let Err(e) = rustix::fs::unlink(path) {
            tracing::warn!("remove {path}: {e}");
        }
        self.core.end_threads(path);
        drop(self.core.listener.lock().take());
        if let Some(lock) = self.lock.lock().take()
            // Closing alone would not do while a child that has not yet executed its program holds a copy.
            && let Err(e) = rustix::fs::flock(&lock, FlockOperation::Unlock)
        {
            tracing::warn!("unlock {path}: {e}");
        }
        // The lock file stays: removing it would let two later processes lock different files.
    }
}

impl Drop for ShmFabric {
    fn drop(&mut self) {
        self.shutdown();
    }
}
