//! Starting and stopping a mount.

mod error;
mod join;
pub mod kernel_mount;
pub mod listen;
pub mod mountpoint;
mod service;

pub use error::MountError;
pub use join::Detached;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rdma_transport::Fabric;
use rt::thread::JoinHandle;
use rustix::mount::MountFlags;

use crate::client::Client;
use crate::fuse::{FsdFs, events};
use crate::kernel::extension::Extension;
use crate::mount::listen::open_endpoint;
use fsd_node::config::{CacheMode, Config};
use fsd_node::endpoint::Endpoint;
use fsd_proto::rpc::Service;
use join::{How, SPARE_LOOPS, join, leave, thread};
pub use kernel_mount::Mounted;
use mountpoint::{check_point, set_read_ahead};
use service::Front;

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
    loops: usize,
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
    let files = FsdFs::new(Arc::clone(client));
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

        let (session, mounted) = open_session(config, options, loops, &client, (&point, flags))?;
        if let Some(mounted) = &mounted {
            // The kernel has answered the handshake, which would undo it.
            set_read_ahead(mounted, config.mount.read_ahead.0);
        }
        let _ = client.kernel.caches.notifier.set(session.notifier());
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
        Ok(Self {
            client,
            fabric: Arc::clone(&endpoint.fabric),
            session: Some(session),
            threads,
            point,
            mounted,
        })
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
        self.session.as_ref().is_none_or(|s| s.guard.is_finished()) || self.is_doomed()
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
    pub fn stop(mut self) {
        if self.is_doomed() {
            // Nothing that is cached can be trusted, nor written without a lease. Nobody must wait for an answer any more: a thread that
            // invalidates a page waits for the read that has it locked, and outlives even the end of the process until that is answered.
            if let Some(session) = self.session.take() {
                std::mem::forget(session);
            }
            self.mounted.iter().for_each(Mounted::disconnect);
            self.client.session.net.ways.stop();
            return self.fabric.shutdown();
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
    }
}
