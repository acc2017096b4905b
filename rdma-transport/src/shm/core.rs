//! An endpoint with its connections and its regions.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::conn::ShmConn;
use super::control::Notice;
use super::executor::Executor;
use super::former::Former;
use super::host::Host;
use super::layout::slot_of;
use super::seat::{SLOTS, Seat};
use crate::base::{self, Base};
use crate::common;
use crate::error::TransportError;
use crate::fabric::Connection;
use crate::mem::SharedMem;
use crate::ops::{Access, RegionKey};
use crate::stats::FabricStats;
use crate::threads::{Endpoint, Threads};

/// Longest time that a peer waits for its own operations by connections to former processes.
const FENCE: Duration = Duration::from_secs(1);

/// Connections to former processes by which something may still be executed.
struct Left {
    conns: Vec<Arc<Former>>,
    /// They have been asked for.
    told: bool,
}

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
    pub(super) host: Arc<Host>,
    threads: Threads<Install>,
    /// None: shut down.
    pub(super) listener: Mutex<Option<OwnedFd>>,
    links: Mutex<Links>,
    left: Mutex<Left>,
}

impl Endpoint for Core {
    type Install = Install;

    fn base(&self) -> &Base {
        &self.host.base
    }

    fn threads(&self) -> &Threads<Install> {
        &self.threads
    }

    fn wake(&self) {
        self.host.wake();
    }
}

impl Core {
    /// Before it lets anybody in, it shuts out whoever a former process has let in.
    pub(super) fn new(host: Host, listener: OwnedFd) -> Result<Arc<Self>, TransportError> {
        let left = Mutex::new(Left {
            conns: Former::all(&host.base)?,
            told: false,
        });
        Ok(Arc::new(Self {
            left,
            host: Arc::new(host),
            threads: Threads::default(),
            listener: Mutex::new(Some(listener)),
            links: Mutex::default(),
        }))
    }

    /// [`crate::Fabric::left_behind`].
    pub(super) fn left_behind(&self) -> Vec<Arc<dyn Connection>> {
        let mut left = self.left.lock();
        if std::mem::replace(&mut left.told, true) {
            return Vec::new();
        }
        let all = left.conns.iter();
        all.map(|conn| Arc::clone(conn) as Arc<dyn Connection>).collect()
    }

    /// A peer is about to get a new connection: what it has begun by one to a former process is over before it does.
    pub(super) fn await_former(&self, identity: &[u8]) {
        let theirs: Vec<Arc<Former>> = {
            let mut left = self.left.lock();
            left.conns.retain(|conn| !conn.settled());
            let theirs = left.conns.iter().filter(|conn| conn.is_of(identity));
            theirs.cloned().collect()
        };
        for conn in theirs {
            if !conn.wait_settled(FENCE) {
                tracing::error!(
                    "{}: an operation of the peer, by a connection to a former process, is stuck on our memory",
                    conn.peer_addr()
                );
            }
        }
    }

    /// The seat for a peer, if what it does here outlives this process.
    pub(super) fn seat_for(
        &self,
        identity: &[u8],
        executor: Option<&Executor>,
    ) -> Result<Option<Seat>, TransportError> {
        let Some(keep) = &self.host.base.config.keep else {
            return Ok(None);
        };
        let mut name = keep.clone().into_os_string();
        name.push(format!(".{}", u64::from_ne_bytes(common::random()?)));
        let seat = Seat::make(name.into(), identity, executor);
        seat.map(Some).inspect_err(|error| tracing::warn!("{error}"))
    }

    /// Makes a new connection known: it learns of all regions, and of all future ones. If the peer has connected to us,
    /// also what it had before, which ends now: found under the same lock, so that of two connections that begin at
    /// the same time one is the older.
    pub(super) fn link(&self, conn: &Arc<ShmConn>) -> Vec<Arc<ShmConn>> {
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
        let over = |c: &&Arc<ShmConn>| conn.base.incoming && c.base.superseded_by(&conn.base.peer);
        let superseded = links.conns.iter().filter(over).cloned().collect();
        links.conns.push(Arc::clone(conn));
        superseded
    }

    pub(super) fn unlink(&self, conn: &Arc<ShmConn>) {
        self.links.lock().conns.retain(|c| !Arc::ptr_eq(c, conn));
        self.host.base.counters.fold(&conn.stats());
    }

    /// Hands a connection to the progress thread, or undoes it.
    pub(super) fn install_if(
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

    /// [`crate::Fabric::register`].
    pub(super) fn register(&self, mem: &Arc<SharedMem>, access: Access) -> Result<RegionKey, TransportError> {
        let mut links = self.links.lock();
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
        self.host.directory.key(slot).store(key.0, Ordering::SeqCst);
        Ok(key)
    }

    /// [`crate::Fabric::deregister`].
    pub(super) fn deregister(&self, key: RegionKey) -> Result<(), TransportError> {
        let slot = slot_of(key.0);
        let conns = {
            let mut links = self.links.lock();
            match links.regions.get_mut(slot) {
                Some(region) if region.as_ref().is_some_and(|r| r.key == key) => *region = None,
                _ => {
                    return Err(TransportError::Invalid(format!(
                        "region {:#x} is not registered",
                        key.0
                    )));
                }
            }
            self.host.directory.key(slot).store(0, Ordering::SeqCst);
            for conn in &links.conns {
                conn.notify(Notice::Gone { key: key.0 }, None);
            }
            links.conns.clone()
        };
        let deadline = Instant::now() + self.host.base.config.timeout;
        for conn in conns {
            if !conn.wait_quiet(Some(slot), deadline) {
                return Err(common::timed_out(
                    &conn.peer_addr(),
                    self.host.base.config.timeout,
                ));
            }
        }
        Ok(())
    }

    /// Serials of the connections to an endpoint instance.
    pub(super) fn links_to(&self, instance: u64) -> Vec<u64> {
        let links = self.links.lock();
        base::serials_to(links.conns.iter().map(|c| &c.base), instance)
    }

    pub(super) fn stats(&self) -> FabricStats {
        let conns = self.links.lock().conns.clone();
        self.host.base.stats(conns.iter().map(|c| &c.base))
    }

    /// Whether a connection waits at the listener.
    pub(super) fn accept_one(&self) -> Option<OwnedFd> {
        let listener = self.listener.lock();
        match rustix::net::accept_with(listener.as_ref()?, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(sock) => Some(sock),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => None,
            Err(e) => {
                // Out of descriptors, most likely; without a pause this would spin.
                tracing::error!("accept a connection: {e}");
                let _waited = common::wait(
                    self.host.bell.as_fd(),
                    PollFlags::IN,
                    Instant::now() + Duration::from_millis(10),
                );
                None
            }
        }
    }
}
