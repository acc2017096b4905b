//! A mount's idea of an inode: what it has cached of it, and for which version of the lease it holds.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use rt::sync::{Mutex, MutexGuard};

use lockmgr::RecordId;

use super::ctx::{Ctx, Res};
use super::lazy::Lazy;
use super::pages::Pages;
use super::space::least_frame;
use fsd_proto::ino;
use fsd_proto::rpc::Errno;
use fsd_proto::wire::{Attr, AttrUpdate, Frame, Kind};

/// A listing by cookie: name, inode, type.
pub type Listing = Arc<BTreeMap<u64, (Vec<u8>, u64, Kind)>>;

/// Cached contents of a directory.
#[derive(Debug, Default)]
pub struct DirCache {
    /// Names known to exist: inode, type, cookie.
    pub entries: HashMap<Vec<u8>, (u64, Kind, u64)>,
    /// Names known not to exist (only where `complete` is false).
    pub absent: HashSet<Vec<u8>>,
    /// `entries` is everything there is.
    pub complete: bool,
    /// The complete listing by cookie, built on demand.
    pub listing: Option<Listing>,
}

impl DirCache {
    /// What is known of a name: `None` nothing, `Some(None)` that it does not exist.
    #[must_use]
    pub fn lookup(&self, name: &[u8]) -> Option<Option<(u64, Kind, u64)>> {
        match self.entries.get(name) {
            Some(&entry) => Some(Some(entry)),
            None if self.complete || self.absent.contains(name) => Some(None),
            None => None,
        }
    }

    /// A name now exists.
    pub fn add(&mut self, name: &[u8], ino: u64, kind: Kind, cookie: u64) {
        self.absent.remove(name);
        self.entries.insert(name.to_vec(), (ino, kind, cookie));
        self.listing = None;
    }

    /// A name does not exist (any more).
    pub fn remove(&mut self, name: &[u8]) {
        self.entries.remove(name);
        self.listing = None;
        if !self.complete {
            // Bounded: somebody who probes for random names must not fill the memory.
            if self.absent.len() >= 4096 {
                self.absent.clear();
            }
            self.absent.insert(name.to_vec());
        }
    }
}

fn is_short(frame: &Frame) -> bool {
    u64::from(frame.size) < fsd_proto::layout::BLOCK
}

/// Where the blocks of a file are, as far as known.
#[derive(Debug, Default)]
pub struct FrameMap {
    /// Layout number of the file that this belongs to.
    pub layout: Option<u64>,
    /// Blocks with frames.
    known: BTreeMap<u64, Frame>,
    /// How many of them are smaller than a block.
    short: usize,
    /// Blocks among them whose contents their storage node cannot read.
    pub lost: BTreeSet<u64>,
    /// Storage nodes whose part is complete.
    pub loaded: BTreeSet<u16>,
    /// Space set aside for dirty blocks without (large enough) frames, bytes.
    pub reserved: BTreeMap<u64, u32>,
}

impl FrameMap {
    /// The frame for a block that needs `size`: all that was set aside for it, for as much may be needed of it.
    #[must_use]
    pub fn size_of(&self, block: u64, size: u32) -> u32 {
        self.reserved
            .get(&block)
            .map_or(size, |&reserved| size.max(reserved))
    }

    /// Blocks with frames.
    #[must_use]
    pub fn known(&self) -> &BTreeMap<u64, Frame> {
        &self.known
    }

    /// A block has this frame. Returns the size of the one that it had.
    pub fn learn(&mut self, block: u64, frame: Frame) -> u32 {
        self.short += usize::from(is_short(&frame));
        let old = self.known.insert(block, frame);
        self.forgotten(old)
    }

    /// A block has no frame. Returns the size of the one that it had.
    fn unlearn(&mut self, block: u64) -> u32 {
        let old = self.known.remove(&block);
        self.forgotten(old)
    }

    fn forgotten(&mut self, old: Option<Frame>) -> u32 {
        self.short -= usize::from(old.as_ref().is_some_and(is_short));
        old.map_or(0, |frame| frame.size)
    }

    /// The last block, if all up to it have whole frames.
    #[must_use]
    pub fn whole_up_to(&self) -> Option<u64> {
        let (&last, _) = self.known.last_key_value()?;
        (self.short == 0 && self.known.len() as u64 == last + 1).then_some(last)
    }

    /// The frame for a block whose data ends `end` bytes into it. What follows on a whole block is being written in order, and likely
    /// to come to a whole one; what stands in a hole by itself is not.
    #[must_use]
    pub fn size_for(&self, block: u64, end: u64) -> u32 {
        let whole = fsd_proto::layout::BLOCK as u32;
        let before = block.checked_sub(1);
        let follows = before.is_some_and(|before| {
            self.known.get(&before).is_some_and(|f| f.size == whole)
                || self.reserved.get(&before) == Some(&whole)
        });
        if follows { whole } else { least_frame(end) }
    }

    /// Takes out what is set aside for a block.
    pub fn unreserve(&mut self, block: u64) -> Option<u32> {
        let bytes = self.reserved.remove(&block);
        if self.reserved.is_empty() {
            // An empty tree keeps a node, in each of a hundred thousand inodes.
            self.reserved = BTreeMap::new();
        }
        bytes
    }

    /// Is there a block among `first ..= last` whose contents are lost? It can neither be read nor written in part.
    #[must_use]
    pub fn any_lost(&self, first: u64, last: u64) -> bool {
        self.lost.range(first..=last).next().is_some()
    }
}

/// What is cached, valid for one version of the lease record.
#[derive(Debug, Default)]
pub struct State {
    /// The version all this belongs to.
    pub version: Option<u64>,
    /// Attributes.
    pub attr: Option<Attr>,
    /// The attributes have changed and the metadata server does not know yet.
    pub attr_dirty: bool,
    /// Something has changed during this exclusive tenure.
    pub modified: bool,
    /// Data.
    pub pages: Pages,
    /// Where the data is.
    pub frames: FrameMap,
    /// Names in a directory.
    pub dir: Lazy<DirCache>,
    /// Extended attributes.
    pub xattrs: Option<BTreeMap<Vec<u8>, Vec<u8>>>,
    /// Counts changes of the extended attributes: what was asked for before one is not kept.
    pub xattr_changes: u64,
    /// Target of a symbolic link (never changes).
    pub target: Option<Vec<u8>>,
    /// The last attributes known, where those of this version are not: what can still be said of an inode that is gone.
    pub last: Option<Box<Attr>>,
    /// Where a directory was found: the directory above, and the name in it.
    pub place: Option<(u64, Vec<u8>)>,
    /// The attributes came from another mount, which may not have told the metadata server yet.
    pub from_owner: bool,
    /// Gone: last name and last open are no more.
    pub gone: bool,
}

impl State {
    /// Forgets everything that depends on the version.
    fn forget(&mut self) {
        let target = self.target.take();
        let last = match self.attr {
            Some(attr) => Some(Box::new(self.shown(&attr))),
            None => self.last.take(),
        };
        let place = self.place.take();
        // Frames have a number of their own; space was set aside for pages that are gone.
        let mut frames = std::mem::take(&mut self.frames);
        frames.reserved.clear();
        *self = Self {
            target,
            last,
            place,
            frames,
            gone: self.gone,
            ..Self::default()
        };
    }

    /// What `stat` is told: the storage that dirty data is going to take counts already, for programs take a file without any for
    /// one that is all hole (`tar -S`).
    #[must_use]
    pub fn shown(&self, attr: &Attr) -> Attr {
        let due = self.frames.reserved.iter().map(|(block, &bytes)| {
            let has = self.frames.known().get(block).map_or(0, |f| f.size);
            u64::from(bytes.saturating_sub(has)) / 512
        });
        let mut due: u64 = due.sum();
        if self.pages.dirty() == 0 {
            // Set aside for what the kernel may yet write, which may be far more than it has.
            due = due.min(attr.size.div_ceil(4096) * 8);
        }
        Attr {
            blocks: attr.blocks + due,
            ..*attr
        }
    }

    /// Something has been changed under the exclusive lease.
    pub fn touch(&mut self) {
        self.modified = true;
        self.attr_dirty = true;
    }

    /// A block has got a frame, whose space was perhaps set aside before.
    pub fn take_frame(&mut self, block: u64, frame: Frame) {
        self.frames.unreserve(block);
        let old = self.frames.learn(block, frame);
        if let Some(attr) = self.attr.as_mut() {
            attr.blocks += u64::from(frame.size.saturating_sub(old)) / 512;
        }
        self.new_layout();
        self.touch();
    }

    /// A block has lost its frame.
    pub fn drop_frame(&mut self, block: u64) {
        self.frames.lost.remove(&block);
        let old = self.frames.unlearn(block);
        if let Some(attr) = self.attr.as_mut() {
            attr.blocks = attr.blocks.saturating_sub(u64::from(old) / 512);
        }
        self.new_layout();
    }

    fn new_layout(&mut self) {
        if let Some(attr) = self.attr.as_mut() {
            attr.layout += 1;
            self.frames.layout = Some(attr.layout);
        }
    }

    /// Drops frames that belong to another layout than the attributes (which must be loaded).
    pub fn check_layout(&mut self) {
        let layout = self.attr.map(|a| a.layout);
        if self.frames.layout != layout || layout.is_none() {
            self.frames.known.clear();
            self.frames.short = 0;
            self.frames.lost.clear();
            self.frames.loaded.clear();
            self.frames.layout = layout;
        }
    }

    /// Is everything here that reading any part of the file needs, of `nodes` storage nodes?
    #[must_use]
    pub fn is_mapped(&self, nodes: u16) -> bool {
        let Some(attr) = &self.attr else { return false };
        let blocks = attr.size.div_ceil(fsd_proto::layout::BLOCK);
        self.version.is_some()
            && self.frames.layout == Some(attr.layout)
            && self.frames.loaded.len() as u64 >= blocks.min(u64::from(nodes))
    }

    /// Anything not yet given to the servers?
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.attr_dirty || self.pages.dirty() > 0
    }
}

/// What the kernel may have cached of an inode.
#[derive(Debug, Default)]
pub struct KernelCache {
    /// Attributes with a time to live.
    pub attrs: AtomicBool,
    /// Pages.
    pub pages: AtomicBool,
    /// Reads answered that fill the page cache.
    pub fills: AtomicU64,
    /// Invalidations under way for writes that went past the page cache.
    pub invals: AtomicU64,
    /// A revocation is under way: nothing new may get a time to live.
    pub revoking: AtomicBool,
    /// Files open through the page cache.
    pub cached: AtomicU64,
    /// When attributes were answered last, nanoseconds since the mount began.
    pub answered: AtomicU64,
    /// Lookups the kernel has not forgotten.
    pub lookups: AtomicU64,
}

/// An error of a write that was acknowledged before it failed, told once to every open file.
#[derive(Debug, Default)]
pub struct Latch(Mutex<(u64, Option<Errno>)>);

impl Latch {
    /// Notes an error.
    pub fn set(&self, error: Errno) {
        let mut latch = self.0.lock();
        latch.0 += 1;
        latch.1 = Some(error);
    }

    /// Number of errors so far; what a newly opened file has seen.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.0.lock().0
    }

    /// An error this file has not been told yet.
    ///
    /// # Errors
    /// That error.
    pub fn check(&self, seen: &AtomicU64) -> Result<(), Errno> {
        let latch = self.0.lock();
        match latch.1 {
            Some(error) if seen.swap(latch.0, Ordering::AcqRel) < latch.0 => Err(error),
            _ => Ok(()),
        }
    }

    /// As [`Self::check`]; it stays untold.
    ///
    /// # Errors
    /// That error.
    pub fn peek(&self, seen: &AtomicU64) -> Result<(), Errno> {
        let latch = self.0.lock();
        match latch.1 {
            Some(error) if seen.load(Ordering::Acquire) < latch.0 => Err(error),
            _ => Ok(()),
        }
    }
}

/// Where attributes came from that nobody asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// From the metadata server.
    Server,
    /// With a shared lease, from an owner that answers for the metadata server's having them.
    Owner,
    /// With the exclusive lease: it is for this mount now to tell the metadata server.
    Handed,
}

/// Attributes that came with a grant or with something else.
#[derive(Debug, Clone, Copy)]
pub struct Granted {
    /// The attributes, with their version.
    pub attr: Attr,
    /// Where they came from.
    pub source: Source,
}

/// Attributes of exclusive tenures that are over, on their way to the metadata server.
#[derive(Debug, Default)]
pub struct Push {
    /// Not sent: the record is still this mount's, which may well change them again.
    pub waiting: Option<Box<AttrUpdate>>,
    /// Sent, not answered.
    pub sent: Option<Box<AttrUpdate>>,
}

/// An inode.
#[derive(Debug)]
pub struct Inode {
    /// Number.
    pub ino: u64,
    /// Its record serves a later generation: it is gone, whatever was cached of it.
    pub superseded: AtomicBool,
    /// What is cached of it.
    state: Mutex<State>,
    /// Attributes that came with a grant, with their version; taken over by whoever uses the lease first.
    pub granted: Mutex<Option<Box<Granted>>>,
    /// Attributes the metadata server does not have yet.
    pub push: Mutex<Push>,
    /// The exclusive lease was granted: attributes that wait to be pushed are this tenure's again.
    pub regained: AtomicBool,
    /// What the kernel has cached.
    pub kernel: KernelCache,
    /// The mount that was heard of last in the matter of its lease, plus one; 0: none.
    peer: AtomicU32,
    /// What of its lease is lent to the kernel.
    pub lent: Lazy<super::extension::Lent>,
    /// When its lease was last waited for in vain, nanoseconds since the mount began; 0: it was had since.
    pub lease_failed: AtomicU64,
    /// Whom it was looked up for.
    pub looked_up: super::pins::LookedUp,
    /// Open files on this mount.
    pub opens: Mutex<Opens>,
    /// Delayed errors.
    pub errors: Latch,
    /// Writes of mapped pages that wait for the exclusive lease.
    pub mapped: Lazy<super::mapped::MappedWrites>,
    /// Pages that the kernel may keep locked for writes that wait for the exclusive lease.
    pub edges: Lazy<super::edges::Edges>,
}

/// Open files of an inode on this mount.
#[derive(Debug, Default)]
pub struct Opens {
    /// How many.
    pub count: u64,
    /// Of those, for writing in a way that may leave dirty pages, or locked ones, in the kernel: through its page cache, or mapped.
    pub page_writers: u64,
    /// For writing, of any kind.
    pub writers: u64,
    /// This mount is counted among those that have the file open for writing.
    pub writer_counted: bool,
    /// This mount's bit in the record's opens bitmap is set.
    pub bit: bool,
    /// This mount pins it, at least until then.
    pub pinned: Option<rt::time::Instant>,
    /// When others were seen to have it open for good.
    pub looked_again: Option<rt::time::Instant>,
    /// It is being removed: nobody may open it any more.
    pub removed: bool,
}

impl Inode {
    /// One of which nothing is known.
    #[must_use]
    pub fn new(ino: u64) -> Self {
        Self {
            ino,
            superseded: AtomicBool::new(false),
            state: Mutex::default(),
            granted: Mutex::default(),
            push: Mutex::default(),
            regained: AtomicBool::new(false),
            kernel: KernelCache::default(),
            peer: AtomicU32::new(0),
            lent: Lazy::default(),
            lease_failed: AtomicU64::new(0),
            looked_up: super::pins::LookedUp::default(),
            opens: Mutex::default(),
            errors: Latch::default(),
            mapped: Lazy::default(),
            edges: Lazy::default(),
        }
    }

    /// Its lease record.
    #[must_use]
    pub fn record(&self) -> RecordId {
        ino::record(self.ino)
    }

    /// Who is likely to have its lease, if this mount has not.
    #[must_use]
    pub fn peer(&self) -> Option<u16> {
        u16::try_from(self.peer.load(Ordering::Relaxed).checked_sub(1)?).ok()
    }

    /// Another mount was heard of in the matter of its lease.
    pub fn heard_of(&self, node: u16) {
        self.peer.store(u32::from(node) + 1, Ordering::Relaxed);
    }

    /// Locks the state while holding a lease of `version`; what is cached for another version is dropped.
    ///
    /// # Errors
    /// Park, where another thread has it and waiting is not allowed here.
    pub fn lock(&self, ctx: &Ctx<'_>, version: u64) -> Res<MutexGuard<'_, State>> {
        let mut state = match self.state.try_lock() {
            Some(state) => state,
            None => {
                ctx.may_wait()?;
                self.state.lock()
            }
        };
        self.sync(&mut state, version);
        Ok(state)
    }

    /// Locks the state without a lease: for looking at it, and for revocations.
    pub fn lock_raw(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// As [`Inode::lock_raw`], if nobody has it.
    pub fn try_lock_raw(&self) -> Option<MutexGuard<'_, State>> {
        self.state.try_lock()
    }

    /// What an earlier tenure left to be pushed is dirty again in this one. Else attributes of this version
    /// that the metadata server makes in a transaction meanwhile, without what it was not told, would be
    /// taken for newer.
    pub fn take_back(&self, state: &mut State) {
        if self.regained.swap(false, Ordering::SeqCst)
            && let Some(update) = self.push.lock().waiting.take()
        {
            state.attr_dirty |= Some(update.version) == state.version;
        }
    }

    /// Brings the state to a version.
    pub fn sync(&self, state: &mut State, version: u64) {
        if state.version != Some(version) {
            state.forget();
            state.version = Some(version);
        }
        state.gone |= self.superseded.load(Ordering::SeqCst);
        self.take_back(state);
        if let Some(granted) = self.granted.lock().take()
            && granted.attr.version == version
            && granted.attr.ino == self.ino
            && !state.attr_dirty
            // What the server said with a look-up may be from before it was told of changes in the middle of this tenure, which
            // do not move the version.
            && (granted.source != Source::Server || state.attr.is_none())
        {
            // What this mount gave itself, keeping a shared lease, it has told the server already.
            state.from_owner = granted.source == Source::Owner && state.attr.is_none();
            state.attr = Some(granted.attr);
            state.attr_dirty = granted.source == Source::Handed;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_look_up_brings_late_does_not_undo_what_was_written() {
        let inode = Inode::new(5);
        let offer = |size| {
            *inode.granted.lock() = Some(Box::new(Granted {
                attr: Attr::of_file(5, 3, size),
                source: Source::Server,
            }));
        };
        let size = || inode.lock(&Ctx::on_worker(), 3).unwrap().attr.map(|a| a.size);
        offer(10);
        assert_eq!(size(), Some(10));
        // Written, and pushed in the middle of the tenure; then comes what the server said before that.
        inode.lock_raw().attr = Some(Attr::of_file(5, 3, 20));
        offer(10);
        assert_eq!(size(), Some(20));
    }

    #[test]
    fn an_inode_is_small() {
        assert!(size_of::<Inode>() <= 720, "{} bytes", size_of::<Inode>());
    }

    #[test]
    fn what_is_written_in_order_gets_whole_frames_and_what_stands_in_a_hole_small_ones() {
        let whole = fsd_proto::layout::BLOCK as u32;
        let frame = |size| Frame { offset: 0, size };
        let mut frames = FrameMap::default();
        assert_eq!((frames.size_for(0, 100), frames.size_for(7, 4096)), (4096, 4096));
        assert_eq!(
            (frames.size_for(7, 5000), frames.size_for(7, 200_000)),
            (16_384, whole)
        );
        frames.learn(0, frame(4096));
        assert_eq!((frames.size_for(1, 100), frames.whole_up_to()), (4096, None));
        frames.learn(0, frame(whole));
        assert_eq!((frames.size_for(1, 100), frames.whole_up_to()), (whole, Some(0)));
        frames.reserved.insert(1, whole);
        assert_eq!((frames.size_for(2, 100), frames.size_for(3, 100)), (whole, 4096));
        frames.learn(1, frame(4096));
        assert_eq!(frames.whole_up_to(), None);
        frames.unlearn(1);
        assert_eq!(frames.whole_up_to(), Some(0));
    }

    #[test]
    fn dirty_data_counts_as_storage_once() {
        let mut state = State {
            attr: Some(Attr::of_file(5, 1, 5000)),
            ..State::default()
        };
        state.pages.insert(0, vec![1; 4096].into(), true);
        state.frames.reserved.insert(0, 16_384);
        let blocks = |state: &State| state.attr.map(|a| state.shown(&a).blocks);
        assert_eq!(blocks(&state), Some(32));
        let frame = Frame {
            offset: 0,
            size: 16_384,
        };
        state.take_frame(0, frame);
        assert_eq!(blocks(&state), Some(32));
        // A block that grows.
        state.frames.reserved.insert(0, 65_536);
        assert_eq!(blocks(&state), Some(128));
    }

    #[test]
    fn another_version_drops_what_is_cached() {
        let inode = Inode::new(5);
        let ctx = Ctx::on_worker();
        {
            let mut state = inode.lock(&ctx, 7).unwrap();
            state.dir.add(b"a", 9, Kind::File, 3);
        }
        assert_eq!(
            inode.lock(&ctx, 7).unwrap().dir.lookup(b"a"),
            Some(Some((9, Kind::File, 3)))
        );
        assert_eq!(inode.lock(&ctx, 8).unwrap().dir.lookup(b"a"), None);
    }

    #[test]
    fn every_open_file_hears_of_an_error_once() {
        let latch = Latch::default();
        let (a, b) = (AtomicU64::new(latch.seen()), AtomicU64::new(latch.seen()));
        latch.set(Errno(libc::ENOSPC));
        let late = AtomicU64::new(latch.seen());
        assert_eq!(latch.check(&a), Err(Errno(libc::ENOSPC)));
        assert_eq!(latch.check(&a), Ok(()));
        assert_eq!(latch.check(&b), Err(Errno(libc::ENOSPC)));
        assert_eq!(latch.check(&late), Ok(()));
    }

    #[test]
    fn a_complete_directory_knows_what_is_absent() {
        let mut dir = DirCache::default();
        assert_eq!(dir.lookup(b"x"), None);
        dir.remove(b"x");
        assert_eq!(dir.lookup(b"x"), Some(None));
        dir.complete = true;
        assert_eq!(dir.lookup(b"y"), Some(None));
    }
}
