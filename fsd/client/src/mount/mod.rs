//! Starting and stopping a mount.

mod error;
mod join;
pub mod kernel_mount;
pub mod listen;
pub mod mountpoint;
pub mod replace;
mod service;

pub use error::MountError;
pub use join::Detached;

use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rdma_transport::Fabric;
use rt::thread::JoinHandle;
use rustix::mount::MountFlags;
use rustix::process::Pid;

use crate::client::Client;
use crate::fuse::loops::Loops;
use crate::fuse::{FsdFs, events};
use crate::kernel::extension::Extension;
use crate::kernel::notifier::Notifier;
use crate::mount::listen::open_endpoint;
use fsd_node::config::{CacheMode, Config};
use fsd_node::endpoint::Endpoint;
use fsd_proto::rpc::Service;
use join::{How, SPARE_LOOPS, join, leave, thread};
pub use kernel_mount::Mounted;
use mountpoint::{check_point, set_read_ahead};
use replace::control::{self, Start};
use replace::standing::{Stage, Standing};
use replace::taking::take;
use service::Front;

/// How long one that has been replaced stays: who has looked something up may be about to open it, and others have late questions.
const STAY: Duration = Duration::from_secs(2);
/// Longest wait for open files to be closed when leaving.
const OPEN_WAIT: Duration = Duration::from_secs(5);

/// What the user can choose for one mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Where.
    pub point: PathBuf,
    /// Kernel caching.
    pub cache: CacheMode,
    /// In mode `writethrough`: shared files through the page cache too.
    pub cache_shared: bool,
    /// Where other mounts reach this one; `None`: chosen from the configuration.
    pub listen: Option<String>,
    /// As mount(8) has them, separated by commas.
    pub options: Vec<String>,
    /// Use a directory that is not empty.
    pub allow_nonempty: bool,
    /// Have fusermount3 unmount when this process dies, however it dies.
    pub auto_unmount: bool,
    /// What a former life of this mount has left, which answers nothing any more: it gives way when this one is ready.
    pub former: Option<Mounted>,
}

/// A running mount.
pub struct Mount {
    client: Arc<Client>,
    fabric: Arc<dyn Fabric>,
    session: Option<fuser::BackgroundSession>,
    threads: Vec<JoinHandle<()>>,
    point: PathBuf,
    mounted: Option<Mounted>,
    standing: Arc<Standing>,
    /// Where it can be asked to be replaced.
    listener: Option<UnixListener>,
}

/// The kernel extension if it is there, else what a stock kernel can do.
fn best_mode() -> CacheMode {
    match distfuse_abi::kernel_version(Path::new(distfuse_abi::DEVICE)) {
        Ok(distfuse_abi::ABI_VERSION) => CacheMode::Writeback,
        Ok(kernel) => {
            let error = distfuse_abi::Error::Version { kernel };
            tracing::warn!("{error}; until then writes go through to the daemon");
            CacheMode::Writethrough
        }
        Err(distfuse_abi::Error::NotLoaded(_)) => CacheMode::Writethrough,
        Err(error) => {
            tracing::warn!("{error}; writes go through to the daemon");
            CacheMode::Writethrough
        }
    }
}

/// Mounts in the kernel, and shakes hands with it.
fn open_session(
    config: &Config,
    options: &MountOptions,
    (loops, known): (usize, &Arc<Loops>),
    client: &Arc<Client>,
    (point, flags): (&Path, MountFlags),
) -> Result<(fuser::Session<FsdFs>, Option<Mounted>), MountError> {
    let refused = |error| MountError::Kernel {
        path: point.to_owned(),
        error,
    };
    let root = rustix::process::geteuid().is_root();
    let mut fuse = fuser::Config::default();
    fuse.n_threads = Some(loops);
    fuse.clone_fd = true;
    fuse.acl = if root {
        fuser::SessionACL::All
    } else {
        fuser::SessionACL::Owner
    };
    let files = FsdFs::new(Arc::clone(client), Arc::clone(known));
    let session = if root && !options.auto_unmount {
        let former = options.former.as_ref();
        let device = kernel_mount::mount(point, &config.cluster, flags, former).map_err(refused)?;
        let mounted = Mounted::at(point);
        fuser::Session::from_fd(files, device.into(), fuse.acl, fuse)
            .inspect_err(|_| mounted.iter().for_each(Mounted::unmount))
    } else {
        options.former.iter().for_each(Mounted::abandon);
        fuse.mount_options = vec![
            fuser::MountOption::FSName(config.cluster.clone()),
            fuser::MountOption::Subtype("distfuse".into()),
            fuser::MountOption::DefaultPermissions,
        ];
        let words = kernel_mount::words_of(flags);
        fuse.mount_options.extend(
            words
                .iter()
                .map(|word| fuser::MountOption::CUSTOM((*word).into())),
        );
        if root {
            for (word, option) in [
                ("nosuid", fuser::MountOption::Suid),
                ("nodev", fuser::MountOption::Dev),
            ] {
                if !words.contains(&word) {
                    fuse.mount_options.push(option);
                }
            }
        }
        if options.auto_unmount {
            fuse.mount_options.push(fuser::MountOption::AutoUnmount);
        }
        fuser::Session::new(files, point, &fuse)
    };
    Ok((session.map_err(refused)?, Mounted::at(point)))
}

impl Mount {
    /// Joins the cluster and mounts.
    ///
    /// # Errors
    /// [`MountError`]; nothing is left behind.
    pub fn start(config: &Config, key: Vec<u8>, options: &MountOptions) -> Result<Self, MountError> {
        let flags =
            kernel_mount::flags_of(&options.options).map_err(|detail| MountError::Options { detail })?;
        let point = match &options.former {
            Some(former) => former.point().to_owned(),
            None => check_point(&options.point, options.allow_nonempty)?,
        };
        let mode = match options.cache {
            CacheMode::Auto => best_mode(),
            chosen => chosen,
        };
        if options.cache_shared && mode != CacheMode::Writethrough {
            tracing::warn!("cache_shared changes nothing here: it is for mode writethrough");
        }
        if mode == CacheMode::Writeback {
            // Memory that this process asks for must not have to wait for pages that it is to write back itself. For
            // this thread and those it starts.
            if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
                tracing::warn!("this process cannot be marked as one that writes back pages: {error}");
            }
        }
        let front = Arc::new(Front {
            client: OnceLock::new(),
        });
        let service = Arc::clone(&front) as Arc<dyn Service>;
        let endpoint = open_endpoint(config, options.listen.as_deref(), &key, &service)?;
        let started = Self::start_on(config, options, mode, (point, flags), &endpoint, &front);
        if started.is_err() {
            endpoint.fabric.shutdown();
        }
        started
    }

    fn start_on(
        config: &Config,
        options: &MountOptions,
        mode: CacheMode,
        (point, flags): (PathBuf, MountFlags),
        endpoint: &Endpoint,
        front: &Arc<Front>,
    ) -> Result<Self, MountError> {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let name = format!("{host}:{}", point.display());
        let how = How {
            mode,
            cache_shared: options.cache_shared && mode == CacheMode::Writethrough,
            flags,
            #[cfg(feature = "flaws")]
            flaws: 0,
        };
        let (client, threads) = join(config, name, &how, endpoint, front)?;
        let (node, loops) = (client.session.node, config.mount.loops.max(SPARE_LOOPS + 1));

        let known = Arc::new(Loops::default());
        let (session, mounted) = open_session(config, options, (loops, &known), &client, (&point, flags))?;
        if let Some(mounted) = &mounted {
            // The kernel has answered the handshake, which would undo it.
            set_read_ahead(mounted, config.mount.read_ahead.0);
        }
        let device = session.as_fd().try_clone_to_owned().map_err(MountError::Device)?;
        let _ = client.kernel.caches.notifier.set(Notifier::new(device));
        if mode == CacheMode::Writeback {
            // Before the kernel is answered for the first time, so nobody has a file open.
            let ext = Extension::attach(
                &point,
                config.mount.lease_table,
                Duration::from_micros(config.spin_us),
            );
            let ext = Arc::new(ext.inspect_err(|_| mounted.iter().for_each(Mounted::unmount))?);
            client.attach(&ext);
            let client = Arc::downgrade(&client);
            // Ends with the mount in the kernel, which may be later than this one.
            thread("fsd-kernel", move || events::run(&client, &ext))?;
        }
        let session = session.spawn().map_err(MountError::Thread)?;
        tracing::info!("mount {} on {} ({mode:?})", node.0, point.display());
        let standing = Arc::new(Standing {
            client: Arc::clone(&client),
            loops: known,
            count: loops,
            mounted: mounted.clone(),
            never: never_replaced(options, mode),
            inherited: Arc::default(),
            stage: rt::sync::Mutex::new(Stage::Serving),
            successor: Default::default(),
        });
        Ok(Self {
            client,
            fabric: Arc::clone(&endpoint.fabric),
            session: Some(session),
            threads,
            point,
            mounted,
            standing,
            listener: None,
        })
    }

    /// Joins the cluster, and takes over what the process at the other end of `stream` has mounted, which has started this one for
    /// that. `options` are those of the mount.
    ///
    /// # Errors
    /// [`MountError`]: the other process goes on.
    pub fn succeed(
        config: &Config,
        key: &[u8],
        options: &MountOptions,
        stream: UnixStream,
    ) -> Result<Self, MountError> {
        let taken = take(config, key, (&options.options, options.listen.as_deref()), stream)?;
        let standing = Arc::new(Standing {
            client: Arc::clone(&taken.client),
            loops: taken.loops,
            count: taken.count,
            mounted: Some(taken.mounted.clone()),
            never: None,
            inherited: taken.inherited,
            stage: rt::sync::Mutex::new(Stage::Serving),
            successor: Default::default(),
        });
        Ok(Self {
            client: taken.client,
            fabric: taken.fabric,
            session: Some(taken.session),
            threads: taken.threads,
            point: taken.mounted.point().to_owned(),
            mounted: Some(taken.mounted),
            standing,
            listener: Some(taken.listener),
        })
    }

    /// Can be replaced from now on, by processes that `start` starts.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn may_be_replaced(&mut self, start: Start) -> Result<(), MountError> {
        control::answer(Arc::clone(&self.standing), self.listener.take(), start)
    }

    /// The process that has replaced this one.
    #[must_use]
    pub fn replaced_by(&self) -> Option<Pid> {
        // Locked: it may just be so.
        match *self.standing.stage.try_lock()? {
            Stage::Replaced(process) => Some(process),
            _ => None,
        }
    }

    /// The mount point.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// How the kernel caches.
    #[must_use]
    pub fn mode(&self) -> CacheMode {
        self.client.kernel.caches.mode
    }

    /// Has somebody else unmounted it?
    #[must_use]
    pub fn is_gone(&self) -> bool {
        let served =
            |s: &fuser::BackgroundSession| !s.guard.is_finished() && !self.standing.loops.have_ended();
        !self.session.as_ref().is_some_and(served) || self.is_doomed()
    }

    /// Calls this when it may be gone, or replaced. It may have been before.
    pub fn once_ending(&self, tell: Box<dyn Fn() + Send + Sync>) {
        self.client.session.fate.once_ending(tell);
    }

    /// Has it lost its leases?
    #[must_use]
    pub fn is_doomed(&self) -> bool {
        self.client.session.fate.doomed.load(Ordering::SeqCst)
    }

    /// What the kernel has mounted, to be left to the next life of this process.
    #[must_use]
    pub fn mounted(&self) -> Option<&Mounted> {
        self.mounted.as_ref()
    }

    /// Unmounts, writes everything back, gives up all leases and leaves. One that has lost its leases stays where it is and
    /// answers nothing any more, until its next life, or somebody else, unmounts it: programs would go on in the directory below, and
    /// not know.
    ///
    /// One that was replaced leaves the cluster only: with the process that serves the mount now.
    pub fn stop(mut self) -> Option<Pid> {
        // Not while it is being replaced.
        let stage = std::mem::replace(&mut *self.standing.stage.lock(), Stage::Ending);
        if let Stage::Replaced(process) = stage {
            self.retire();
            return Some(process);
        }
        if self.is_doomed() {
            // Nothing that is cached can be trusted, nor written without a lease. Nobody must wait for an answer any more: a thread that
            // invalidates a page waits for the read that has it locked, and outlives even the end of the process until that is answered.
            if let Some(session) = self.session.take() {
                std::mem::forget(session);
            }
            self.mounted.iter().for_each(Mounted::disconnect);
            self.client.session.net.ways.stop();
            self.fabric.shutdown();
            return None;
        }
        if let Some(session) = self.session.take() {
            if !session.guard.is_finished() {
                self.mounted.iter().for_each(Mounted::unmount);
            }
            // Where files are still open, the kernel keeps the connection until they are closed, or this
            // process ends.
            let deadline = rt::time::Instant::now() + OPEN_WAIT;
            while !session.guard.is_finished() && rt::time::Instant::now() < deadline {
                rt::thread::sleep(Duration::from_millis(5));
            }
            if session.guard.is_finished() {
                let _ = session.join();
            } else {
                tracing::warn!("files of this mount are still open: their processes will see errors");
                // Joining would wait for them; the threads end with the process.
                std::mem::forget(session);
            }
        }
        leave(&self.client, self.threads, self.fabric.as_ref());
        None
    }

    /// Leaves the cluster, and the kernel to the successor.
    fn retire(mut self) {
        // Its threads wait for requests that never come, and end with the process.
        std::mem::forget(self.session.take());
        self.client.opens.open_files.close_all();
        rt::thread::sleep(STAY);
        // The successor learns that this number may soon be another mount's.
        drop(self.standing.successor.lock().take());
        leave(&self.client, self.threads, self.fabric.as_ref());
    }
}

/// Why a mount can never be replaced, if so.
fn never_replaced(options: &MountOptions, mode: CacheMode) -> Option<&'static str> {
    if mode == CacheMode::Writeback {
        return Some("a mount with the kernel extension cannot be replaced: unmount it, and mount it anew");
    }
    if options.auto_unmount {
        return Some(
            "a mount with --auto-unmount cannot be replaced, for it is unmounted when its daemon ends",
        );
    }
    (!rustix::process::geteuid().is_root())
        .then_some("only a mount of root can be replaced: unmount it, and mount it anew")
}
