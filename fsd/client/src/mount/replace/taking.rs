//! A mount takes over the kernel of another one, whose successor it is.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lockmgr::{Guard, Mode};
use rdma_transport::Fabric;
use rt::thread::JoinHandle;
use rt::time::Instant;

use super::messages::{Begin, Message, OpenFile, Pass};
use super::talk::Talk;
use crate::client::Client;
use crate::files::locks::PassedWaiter;
use crate::fuse::FsdFs;
use crate::fuse::inherited::{answer, take_over};
use crate::fuse::loops::{Loops, all_run};
use crate::kernel::caches::Whose;
use crate::kernel::notifier::Notifier;
use crate::mount::error::MountError;
use crate::mount::join::{How, SPARE_LOOPS, join, leave, thread};
use crate::mount::kernel_mount::{Mounted, flags_of};
use crate::mount::listen::open_endpoint;
use crate::mount::service::Front;
use crate::opens::handles::Handle;
use crate::session::ctx::{Ctx, Res, Stop};
use fsd_node::config::{CacheMode, Config};
use fsd_proto::ino;
use fsd_proto::rpc::{Errno, Service};

/// Longest wait for the predecessor's first message.
const FIRST: Duration = Duration::from_secs(10);
/// Longest wait for the others: it tries for a while, and says so by closing the socket when it gives up.
const NEXT: Duration = Duration::from_secs(60);
/// Descriptors that there must be room for, beside one for each event loop.
const SPARE: usize = 16;
/// Longest wait for leases that the predecessor has as well: whoever wants one exclusively may wait until the event loops go on.
const LEASES: Duration = Duration::from_millis(200);
/// As [`LEASES`], while they run.
const AHEAD: Duration = Duration::from_secs(5);
/// Longest wait for it to take in what it is told.
const SAID: Duration = Duration::from_secs(5);

/// Everything of a mount that has taken over.
pub(crate) struct Taken {
    pub(crate) client: Arc<Client>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) fabric: Arc<dyn Fabric>,
    pub(crate) session: fuser::BackgroundSession,
    pub(crate) loops: Arc<Loops>,
    pub(crate) count: usize,
    pub(crate) mounted: Mounted,
    pub(crate) listener: UnixListener,
    pub(crate) inherited: Arc<Vec<OwnedFd>>,
}

fn failed(why: impl std::fmt::Display) -> MountError {
    MountError::Successor(why.to_string())
}

/// What was handed over with the first message.
struct Handed {
    begin: Begin,
    mounted: Mounted,
    listener: UnixListener,
    devices: Arc<Vec<OwnedFd>>,
}

fn hear_first(talk: &mut Talk) -> io::Result<Handed> {
    let odd = || io::Error::other("the mount that is to be replaced says something else");
    let mut descriptors = talk.hear_descriptors(FIRST)?.into_iter();
    let Message::Begin(begin) = talk.hear(FIRST)? else {
        return Err(odd());
    };
    let (listener, devices) = (
        descriptors.next().ok_or_else(odd)?,
        descriptors.collect::<Vec<_>>(),
    );
    let mounted = Mounted::from_text(&begin.mounted).ok_or_else(odd)?;
    if devices.is_empty() {
        return Err(odd());
    }
    Ok(Handed {
        begin,
        mounted,
        listener: listener.into(),
        devices: Arc::new(devices),
    })
}

/// Joins the cluster and takes over what the process at the other end of `stream` has mounted; `options` as mount(8) has them, `listen` where
/// that was told to be reached.
///
/// # Errors
/// [`MountError`]; the other process goes on, and is told why.
pub(crate) fn take(
    config: &Config,
    key: &[u8],
    (options, listen): (&[String], Option<&str>),
    stream: UnixStream,
) -> Result<Taken, MountError> {
    let mut talk = Talk::new(stream);
    let handed = hear_first(&mut talk).map_err(failed)?;
    let taken = take_from(config, key, (options, listen), &mut talk, handed);
    match taken {
        Ok(taken) => {
            // Until the predecessor has left its open files are this mount's.
            let records = Arc::downgrade(&taken.client.opens.records);
            thread("fsd-former", move || {
                talk.end();
                if let Some(records) = records.upgrade() {
                    records.twin.set(None);
                }
            })?;
            Ok(taken)
        }
        Err(error) => {
            talk.refuse(&error.to_string());
            Err(error)
        }
    }
}

fn take_from(
    config: &Config,
    key: &[u8],
    (options, listen): (&[String], Option<&str>),
    talk: &mut Talk,
    handed: Handed,
) -> Result<Taken, MountError> {
    let flags = flags_of(options).map_err(|detail| MountError::Options { detail })?;
    let front = Arc::new(Front {
        client: OnceLock::new(),
    });
    let service = Arc::clone(&front) as Arc<dyn Service>;
    // At a port that it was told the predecessor still listens.
    let listen = listen.filter(|address| address.ends_with(":0"));
    let endpoint = open_endpoint(config, listen, key, &service)?;
    let how = How {
        mode: if handed.begin.direct {
            CacheMode::Direct
        } else {
            CacheMode::Writethrough
        },
        cache_shared: handed.begin.cache_shared,
        flags,
        #[cfg(feature = "flaws")]
        flaws: 0,
    };
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let name = format!("{host}:{}", handed.mounted.point().display());
    let joined = join(config, name, &how, &endpoint, &front);
    let (client, threads) = joined.inspect_err(|_| endpoint.fabric.shutdown())?;
    let count = config.mount.loops.max(SPARE_LOOPS + 1);
    let loops = Arc::new(Loops::default());
    match serve(&client, &loops, count, talk, &handed) {
        Ok(session) => Ok(Taken {
            client,
            threads,
            fabric: endpoint.fabric,
            session,
            loops,
            count,
            mounted: handed.mounted,
            listener: handed.listener,
            inherited: handed.devices,
        }),
        Err(error) => {
            client.kernel.caches.passing.set(Whose::Theirs);
            talk.refuse(&error.to_string());
            leave(&client, threads, endpoint.fabric.as_ref());
            Err(failed(error))
        }
    }
}

/// Takes everything in, and begins to serve the kernel.
fn serve(
    client: &Arc<Client>,
    loops: &Arc<Loops>,
    count: usize,
    talk: &mut Talk,
    handed: &Handed,
) -> io::Result<fuser::BackgroundSession> {
    let begin = &handed.begin;
    let device = handed.devices.first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut fuse = fuser::Config::default();
    fuse.n_threads = Some(count);
    fuse.clone_fd = true;
    fuse.acl = fuser::SessionACL::All;
    let files = FsdFs::new(Arc::clone(client), Arc::clone(loops));
    let session = take_over(files, loops, device, begin.handshake, fuse)?;
    let _ = client
        .kernel
        .caches
        .notifier
        .set(Notifier::new(device.try_clone()?));
    // Where descriptors are few that is found out now, and not when the kernel has passed.
    let room: Vec<OwnedFd> = (0..count + SPARE)
        .map(|_| device.try_clone())
        .collect::<io::Result<_>>()?;
    let passing = &client.kernel.caches.passing;
    passing.set(Whose::Theirs);
    client.opens.records.twin.set(Some(begin.node));
    talk.send(&Message::Ready(client.session.node.0), SAID)?;
    let mut ahead = Ahead::new(client);
    let mut taken: Option<Pass> = None;
    let pass = loop {
        let answer = match (talk.hear(NEXT)?, taken.take()) {
            (Message::Ahead(files), None) => {
                ahead
                    .open(&files)
                    .map_err(|stop| because("opening files", stop))?;
                Message::Done
            }
            (Message::Pass(pass), None) => {
                // From here on nothing that is taken in may be given up before it is decided whose it is.
                passing.set(Whose::Undecided);
                match adopt(client, &pass) {
                    Ok(()) => {
                        taken = Some(pass);
                        Message::Done
                    }
                    Err(why) => {
                        disown(client, &pass);
                        Message::NotYet(why.to_string())
                    }
                }
            }
            (Message::Undo, Some(pass)) => {
                disown(client, &pass);
                Message::Done
            }
            (Message::Go, Some(pass)) => break pass,
            _ => {
                let odd = "the mount that is to be replaced says something else";
                return Err(io::Error::other(odd));
            }
        };
        if client.session.fate.doomed.load(Ordering::SeqCst) {
            return Err(io::Error::other("this mount was declared dead"));
        }
        talk.send(&answer, SAID)?;
    };
    drop(room);
    let _ = passing.owed();
    passing.set(Whose::Ours);
    let session = session.spawn()?;
    // They are started aside. None of them has read anything if that has failed.
    if !all_run(count, SAID, || session.guard.is_finished()) {
        return Err(io::Error::other("the threads that read requests do not start"));
    }
    // Whether it hears that or has died just now: requests are read here from now on.
    let _ = talk.send(&Message::Done, SAID);
    for waiter in &pass.waiting {
        let (unique, devices) = (waiter.unique, Arc::clone(&handed.devices));
        let asked = PassedWaiter {
            lock: client.files.locks.mine(waiter.lock),
            ..*waiter
        };
        client
            .files
            .locks
            .setlk_wait(asked, move |result| answer(&devices, unique, result));
    }
    Ok(session)
}

fn because(what: &str, stop: Stop) -> io::Error {
    io::Error::other(format!("{what}: {}", stop.errno()))
}

/// Files that the predecessor has open, opened before anything has passed.
struct Ahead {
    client: Arc<Client>,
    open: HashMap<(u64, bool), Handle>,
}

impl Ahead {
    fn new(client: &Arc<Client>) -> Self {
        Self {
            client: Arc::clone(client),
            open: HashMap::new(),
        }
    }

    /// Opens those that are not open yet.
    fn open(&mut self, files: &[OpenFile]) -> Res<()> {
        let ctx = Ctx::on_worker();
        let began = Instant::now();
        for &OpenFile { ino, writer, cached } in files {
            if cached && let Err(why) = lease(&self.client, ino, began + AHEAD) {
                tracing::debug!("{ino:#x} is not leased yet: {why}");
            }
            if self.open.contains_key(&(ino, writer)) {
                continue;
            }
            let inode = self.client.cache.inode(ino);
            match self.client.opens.open_files.open_ahead(&ctx, &inode, writer) {
                Ok(handle) => _ = self.open.insert((ino, writer), handle),
                // Closed and removed since.
                Err(Stop::Errno(Errno(libc::ESTALE))) => {}
                Err(stop) => return Err(stop),
            }
        }
        Ok(())
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        for ((ino, _), handle) in &self.open {
            if let Err(stop) = self.client.opens.open_files.close_ahead(handle) {
                tracing::warn!("{ino:#x} cannot be closed: {}", stop.errno());
            }
        }
    }
}

/// Takes in what the kernel knows, and what it has cached: from now on that is this mount's to drop.
fn adopt(client: &Arc<Client>, pass: &Pass) -> io::Result<()> {
    let ctx = Ctx::on_worker();
    for passed in &pass.inodes {
        let inode = client.cache.inode(passed.ino);
        inode.kernel.lookups.store(passed.lookups, Ordering::SeqCst);
        let (count, last) = passed.errors;
        inode.errors.go_on_from((count, last.map(Errno)));
        if passed.refilled {
            // A write may have come before its pages were dropped, and wait to be read.
            inode.kernel.refills.emptying(client.session.now());
        }
        inode.lock_raw().lasting.place = passed.place.clone().map(Box::new);
    }
    for handle in &pass.handles {
        let inode = client.cache.inode(handle.ino);
        let adopted = client.opens.open_files.adopt(&ctx, &inode, handle);
        adopted.map_err(|stop| because("an open file", stop))?;
    }
    // Behind the open files: an open for writing has attributes dropped, if there are any, and nothing is dropped before it is decided.
    let end = Instant::now() + LEASES;
    for passed in pass.inodes.iter().filter(|p| p.cached) {
        adopt_cached(client, passed.ino, end)?;
    }
    client.opens.open_files.handles.go_on_from(pass.last_handle);
    client.files.locks.adopt(&pass.locks);
    Ok(())
}

/// A shared lease beside the predecessor's.
fn lease(client: &Client, ino: u64, end: Instant) -> io::Result<Guard> {
    let (record, session) = (ino::record(ino), &client.session);
    let reached = session.net.storage.find_record(record);
    reached.map_err(|error| io::Error::other(error.to_string()))?;
    let left = end.saturating_duration_since(Instant::now());
    let guard = session.leases.enter(record, Mode::Shared, left);
    guard.map_err(|error| io::Error::other(error.to_string()))
}

/// What the kernel has cached of an inode is right as long as the predecessor has its lease; here it gets another one beside that, which
/// protects it from now on.
fn adopt_cached(client: &Client, ino: u64, end: Instant) -> io::Result<()> {
    let guard = lease(client, ino, end)?;
    let inode = client.cache.inode(ino);
    let kernel = &inode.kernel;
    kernel.pages.store(true, Ordering::SeqCst);
    kernel.attrs.store(true, Ordering::SeqCst);
    kernel.answered.store(client.session.now(), Ordering::SeqCst);
    if let Some(refills) = kernel.refills.get() {
        refills.filled(0, u64::MAX);
    }
    drop(guard);
    Ok(())
}

/// What was taken in, or some of it, is the predecessor's after all.
fn disown(client: &Arc<Client>, pass: &Pass) {
    // The kernel is the other mount's still: who waits to give a lease up here goes on. Else other mounts would wait for that, and for them
    // the requests that are under way at the other mount, which it waits for before it passes the kernel.
    client.kernel.caches.passing.set(Whose::Theirs);
    for handle in &pass.handles {
        if let Err(stop) = client.opens.open_files.release(&Ctx::on_worker(), handle.number) {
            tracing::warn!("{:#x} cannot be closed: {}", handle.ino, stop.errno());
        }
    }
    for passed in &pass.inodes {
        client
            .cache
            .inode(passed.ino)
            .kernel
            .lookups
            .store(0, Ordering::SeqCst);
    }
    client.files.locks.disown();
}
