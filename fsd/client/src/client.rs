//! All rooms of a mount.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use lockmgr::{LeaseInfo, Mode};
use rustix::mount::MountFlags;

use crate::cache::{Base, Cache};
use crate::calls::Calls;
use crate::data::Data;
use crate::files::FileOperations;
use crate::files::atime::AccessTimes;
use crate::kernel::Kernel;
use crate::kernel::extension::Extension;
use crate::membership::Membership;
use crate::namespace::Namespace;
use crate::opens::Opens;
use crate::revoke::Revoke;
use crate::revoke::trim::Trim;
use crate::session::Session;
use crate::storing::Storing;
use fsd_node::config::{CacheMode, Config};
use fsd_proto::wire::MountStatus;

/// A file is blocked that a request has waited for so long.
const BLOCKED: Duration = Duration::from_secs(2);

/// Everything a mount consists of.
pub struct Client {
    /// Connections and leases.
    pub session: Arc<Session>,
    /// What is cached.
    pub cache: Arc<Cache>,
    /// The kernel's caches.
    pub kernel: Kernel,
    /// Data.
    pub data: Data,
    /// Open files.
    pub opens: Opens,
    /// Names.
    pub namespace: Namespace,
    /// What is dirty.
    pub storing: Storing,
    /// Operations on files.
    pub files: FileOperations,
    /// Giving up and forgetting.
    pub revoke: Revoke,
    /// What it does when another mount is dead.
    pub membership: Arc<Membership>,
    /// Calls of the kernel extension, where it is attached.
    pub calls: OnceLock<Calls>,
}

impl Client {
    /// The rooms on top of a session and a cache: `mode` is how the kernel caches, `flags` are those of the mount.
    #[must_use]
    pub fn new(
        base: &Base,
        config: &Config,
        (mode, cache_shared, flags): (CacheMode, bool, MountFlags),
    ) -> Self {
        let settings = &config.mount;
        let kernel = Kernel::new(base, mode);
        let data = Data::new(base, &kernel);
        let opens = Opens::new(base, &kernel, &data, cache_shared, settings.shared_mappings);
        let namespace = Namespace::new(base, &kernel, &data, &opens);
        let writeback_after = Duration::from_millis(settings.writeback_ms);
        let storing = Storing::new(base, &data, &opens, writeback_after);
        let access_times = AccessTimes::of(flags);
        let files = FileOperations::new(base, &kernel, &data, &opens, &namespace, &storing, access_times);
        let trim = Trim::new(settings.max_inodes);
        let revoke = Revoke::new(base, &kernel, &data, &opens, &storing, trim);
        let membership = Membership::new(&base.session, &base.cache, &storing.push, &opens.pinning);
        Self {
            session: Arc::clone(&base.session),
            cache: Arc::clone(&base.cache),
            kernel,
            data,
            opens,
            namespace,
            storing,
            files,
            revoke,
            membership,
            calls: OnceLock::new(),
        }
    }

    /// The kernel extension is attached; before anybody uses the mount.
    pub fn attach(&self, ext: &Arc<Extension>) {
        let base = Base {
            session: Arc::clone(&self.session),
            cache: Arc::clone(&self.cache),
        };
        let kernel = self.kernel.attach(&base, ext);
        let told = Arc::downgrade(ext);
        self.session.term.watch(Box::new(move |end| {
            if let Some(ext) = told.upgrade() {
                ext.set_term(end);
            }
        }));
        let calls = Calls::new(&base, &kernel, &self.data, &self.namespace);
        let _ = self.calls.set(calls);
    }

    /// Nothing may be answered from caches before long: those of a stock kernel go now, for it asks nobody. One with the extension
    /// has been told when the term ends, and looks at that itself.
    pub fn freeze(&self) {
        if self.kernel.caches.mode == CacheMode::Writeback {
            return;
        }
        for inode in self.cache.inodes.all() {
            let kernel = Arc::clone(&self.kernel.caches);
            self.session.threads.workers.run(move || {
                kernel.take_attrs(&inode, true);
                if inode.kernel.cached.load(Ordering::SeqCst) > 0 {
                    kernel.invalidate_pages(&inode);
                }
            });
        }
    }

    /// What `fsd status` shows.
    ///
    /// Asks the servers whether they are there: not for a thread that brings their answers.
    #[must_use]
    pub fn status(&self) -> MountStatus {
        let leases = self.session.leases.snapshot();
        let count = |mode| leases.iter().filter(|l| l.mode == Some(mode)).count() as u64;
        let mut cache = format!("{:?}", self.kernel.caches.mode).to_lowercase();
        if self.opens.open_files.cache_shared {
            cache += " with shared files";
        }
        // What follows waits for servers, and a lock taken in the middle of an expression is held to its end: all that the mount does, its
        // signs of life among it, would wait along.
        let dirty_files = self.cache.dirty.lock().len() as u64;
        MountStatus {
            node: self.session.node.0,
            cache,
            shared: count(Mode::Shared),
            exclusive: count(Mode::Exclusive),
            waiting: leases.iter().map(|l| l.waiting as u64).sum(),
            inodes: self.cache.inodes.len() as u64,
            cached_bytes: self.cache.cached_pages.load(Ordering::Relaxed) as u64 * crate::cache::pages::PAGE,
            dirty_files,
            requests: self.session.counters.requests.load(Ordering::Relaxed),
            parked: self.session.counters.parked.load(Ordering::Relaxed),
            messages: self.session.net.ways.messages(),
            revocations: self.session.counters.revocations.load(Ordering::Relaxed),
            repeats: self.session.counters.repeats.load(Ordering::Relaxed),
            sent: self.session.counters.sent.load(Ordering::Relaxed),
            visits: self.session.counters.visits.load(Ordering::Relaxed),
            kernel: self.kernel.front.counters(),
            troubles: self
                .blocked(&leases)
                .chain(self.session.net.unreachable())
                .collect(),
        }
    }

    /// A sentence for each file that requests have waited for for too long.
    fn blocked<'a>(&'a self, leases: &'a [LeaseInfo]) -> impl Iterator<Item = String> + 'a {
        leases.iter().filter_map(|lease| {
            let waited = lease.since?.elapsed();
            if waited < BLOCKED {
                return None;
            }
            let inode = self.cache.inodes.by_record(lease.id);
            let what = inode.map_or_else(|| lease.id.to_string(), |inode| self.cache.path_of(inode.ino));
            let whom: Vec<String> = lease.waits_for.iter().map(|n| format!("mount {}", n.0)).collect();
            let whom = match &whom[..] {
                [] => "a server".into(),
                whom => whom.join(", "),
            };
            Some(format!(
                "{what}: {} requests have waited for {:.1} s for {whom} ({})",
                lease.waiting,
                waited.as_secs_f64(),
                lease.state
            ))
        })
    }
}
