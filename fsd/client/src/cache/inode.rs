//! A mount's idea of an inode: what it has cached of it, and for which version of the lease it holds.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use lockmgr::{Mode, OwnerWord, RecordId};
use rt::sync::{Condvar, Mutex, MutexGuard};
use rt::time::Instant;

use crate::cache::claims::{Purpose, Span};
use crate::cache::errseq::ErrorSequence;
use crate::cache::lazy::Lazy;
use crate::cache::opens::Opens;
use crate::cache::refills::Refills;
use crate::cache::state::State;
use crate::cache::turns::Turns;
use crate::session::ctx::{Ctx, Res};
use fsd_proto::ino;
use fsd_proto::wire::{Attr, AttrUpdate, Places};

/// What the kernel may have cached of an inode.
#[derive(Debug, Default)]
pub struct KernelCache {
    /// Attributes with a time to live.
    pub attrs: AtomicBool,
    /// Pages.
    pub pages: AtomicBool,
    /// Revocations that are dropping them: they do not count as there any more, but still are.
    pub drops: AtomicU64,
    /// Reads answered that fill the page cache.
    pub fills: AtomicU64,
    /// What those have brought since pages were dropped.
    pub refills: Lazy<Refills>,
    /// Invalidations under way for writes that went past the page cache, or whose pages a read has brought back.
    pub invals: AtomicU64,
    /// A revocation is under way: nothing new may get a time to live.
    pub revoking: AtomicBool,
    /// Files open through the page cache.
    pub cached: AtomicU64,
    /// When attributes were answered last, nanoseconds since the mount began.
    pub answered: AtomicU64,
    /// Lookups the kernel has not forgotten.
    pub lookups: AtomicU64,
    /// It got attributes to keep with the answer to CREATE, of this open file, and nothing has shown yet that it has taken that in.
    pub created: AtomicU64,
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
#[derive(Debug, Clone)]
pub struct Granted {
    /// The attributes, with their version.
    pub attr: Attr,
    /// Where the blocks are under the layout number among them, if that came, too.
    pub places: Option<Places>,
    /// Where they came from.
    pub source: Source,
}

/// Attributes of exclusive tenures that are over, on their way to the metadata server.
#[derive(Debug, Default)]
pub struct Push {
    /// Not sent: the record is still this mount's, which may well change them again.
    pub waiting: Option<Box<AttrUpdate>>,
    /// Sent, not answered. One at a time: of two with one version the one that came last would count, and that is any of them where
    /// a connection breaks.
    pub sent: Option<Box<AttrUpdate>>,
    /// What waits is to be sent when that has been answered.
    pub next: bool,
    /// Low bits of the place of the last transaction of this mount that has changed how many names the file has, which another mount is
    /// shown with the lease; 0: there is none.
    pub linked: u32,
}

/// Attributes on their way from lease to lease, and to the metadata server.
#[derive(Debug, Default)]
pub struct AttrTransit {
    /// Attributes that came with a grant, with their version; taken over by whoever uses the lease first.
    pub granted: Mutex<Option<Box<Granted>>>,
    /// Attributes the metadata server does not have yet.
    pub push: Mutex<Push>,
}

/// What was last heard of the lease.
#[derive(Debug, Default)]
pub struct LeaseHints {
    /// The mount that was heard of last in the matter of its lease, plus one; 0: none.
    peer: AtomicU32,
    /// The exclusive lease was granted: attributes that wait to be pushed are this tenure's again.
    pub regained: AtomicBool,
    /// Its record serves a later generation: it is gone, whatever was cached of it.
    pub superseded: AtomicBool,
    /// Its lease was asked for because a program seems to go through the directory above: not taken notice of yet.
    pub foreseen: AtomicBool,
    /// When its lease was last waited for in vain, nanoseconds since the mount began; 0: it was had since.
    pub failed: AtomicU64,
    /// Of a directory in which names were changed here.
    pub turns: Lazy<Mutex<Turns>>,
}

/// Pages whose writes wait for the exclusive lease.
#[derive(Debug, Default)]
pub struct WaitingPages {
    /// Writes of mapped pages.
    pub mapped: Lazy<crate::cache::mapped::MappedWrites>,
    /// Pages that the kernel may keep locked for such writes.
    pub edges: Lazy<crate::cache::edges::Edges>,
}

/// What this mount knows of one inode, and what is under way on it.
#[derive(Debug)]
pub struct Inode {
    /// Number.
    pub ino: u64,
    /// What is cached of it.
    state: Mutex<State>,
    /// A claim on a range has ended.
    landed: Condvar,
    /// Attributes that come with leases and go on with them.
    pub transit: AttrTransit,
    /// Held from looking at attributes until the metadata server has them, so that later ones come later.
    pub telling: Mutex<()>,
    /// What the kernel has cached.
    pub kernel: KernelCache,
    /// What of its lease is delegated to the kernel.
    pub delegation: Lazy<super::delegation::Delegation>,
    /// What was last heard of its lease.
    pub hints: LeaseHints,
    /// Whom it was looked up for.
    pub looked_up: super::looked_up::LookedUp,
    /// Open files on this mount.
    pub opens: Mutex<Opens>,
    /// Errors of writing back, which `fsync` and `close` report.
    pub errors: ErrorSequence,
    /// Pages whose writes wait for the exclusive lease.
    pub waiting: WaitingPages,
}

impl Inode {
    /// One of which nothing is known.
    #[must_use]
    pub fn new(ino: u64) -> Self {
        Self {
            ino,
            state: Mutex::default(),
            landed: Condvar::new(),
            transit: AttrTransit::default(),
            telling: Mutex::new(()),
            kernel: KernelCache::default(),
            delegation: Lazy::default(),
            hints: LeaseHints::default(),
            looked_up: super::looked_up::LookedUp::default(),
            opens: Mutex::default(),
            errors: ErrorSequence::default(),
            waiting: WaitingPages::default(),
        }
    }

    /// The record whose lease protects what is cached of it.
    #[must_use]
    pub fn record(&self) -> RecordId {
        ino::record(self.ino)
    }

    /// Who is likely to have its lease, if this mount has not.
    #[must_use]
    pub fn peer(&self) -> Option<u16> {
        u16::try_from(self.hints.peer.load(Ordering::Relaxed).checked_sub(1)?).ok()
    }

    /// Another mount was heard of in the matter of its lease.
    pub fn heard_of(&self, node: u16) {
        self.hints.peer.store(u32::from(node) + 1, Ordering::Relaxed);
    }

    /// The lease to look at it under: of a directory in which mounts take turns that which a change of a name is going to need.
    #[must_use]
    pub fn mode_of_look(&self) -> Mode {
        let turns = self.hints.turns.get();
        let changes = turns.is_some_and(|turns| turns.lock().is_contended(Instant::now()));
        if changes { Mode::Exclusive } else { Mode::Shared }
    }

    /// Locks the state while holding a lease of `version`; what is cached for another version is dropped. For what neither reads
    /// data nor changes where it is: that needs a claim.
    ///
    /// # Errors
    /// Park, where another thread has it and waiting is not allowed here.
    pub fn lock(&self, ctx: &Ctx<'_>, version: u64) -> Res<Locked<'_>> {
        let mut locked = self.locked(ctx.lock(&self.state)?);
        self.sync(&mut locked, version);
        Ok(locked)
    }

    /// Locks who has the file open. Whoever opens or closes it has it locked while the lease record is changed, which waits for its storage
    /// node.
    ///
    /// # Errors
    /// Park, where another thread has it and waiting is not allowed here.
    pub fn lock_opens(&self, ctx: &Ctx<'_>) -> Res<MutexGuard<'_, Opens>> {
        ctx.lock(&self.opens)
    }

    /// As [`Inode::lock`], with a range claimed until the guard is dropped: it stays claimed while the guard lets the mutex go.
    ///
    /// # Errors
    /// Park, where another thread is in the way and waiting is not allowed here.
    pub fn claim(&self, ctx: &Ctx<'_>, version: u64, span: Span, purpose: Purpose) -> Res<Locked<'_>> {
        self.lock(ctx, version)?.claiming(ctx, span, purpose)
    }

    /// Locks the state without a lease: for looking at it.
    pub fn lock_raw(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// As [`Inode::lock_raw`], if nobody has it.
    pub fn try_lock_raw(&self) -> Option<MutexGuard<'_, State>> {
        self.state.try_lock()
    }

    /// Claims all of the file without a lease: for revocations.
    pub fn claim_raw(&self) -> Locked<'_> {
        let mut locked = self.locked(self.state.lock());
        locked.wait_for(Span::ALL, Purpose::Change);
        locked
    }

    /// As [`Inode::claim_raw`], if nobody is in the way.
    pub fn try_claim_raw(&self) -> Option<Locked<'_>> {
        let mut locked = self.locked(self.state.try_lock()?);
        let free = locked.claims.as_ref().is_none_or(|c| c.is_empty());
        free.then(|| {
            locked.wait_for(Span::ALL, Purpose::Change);
            locked
        })
    }

    fn locked<'a>(&'a self, state: MutexGuard<'a, State>) -> Locked<'a> {
        Locked {
            inode: self,
            state,
            claim: None,
        }
    }

    /// What an earlier tenure left to be pushed is dirty again in this one. Else attributes of this version
    /// that the metadata server makes in a transaction meanwhile, without what it was not told, would be
    /// taken for newer.
    pub fn reclaim_push(&self, state: &mut State) {
        if self.hints.regained.swap(false, Ordering::SeqCst)
            && let Some(update) = self.transit.push.lock().waiting.take()
        {
            state.attr_dirty |= Some(update.version) == state.version;
        }
    }

    /// Brings the state to a version.
    pub fn sync(&self, state: &mut State, version: u64) {
        if state.version != Some(version) {
            if state
                .version
                .is_some_and(|before| OwnerWord::has_died(before, version))
            {
                // It may have freed frames, and the layout's number that says so went with it.
                state.forget_frames();
                state.forget_names();
            }
            state.forget();
            state.version = Some(version);
        }
        state.lasting.gone |= self.hints.superseded.load(Ordering::SeqCst);
        self.reclaim_push(state);
        if let Some(granted) = self.transit.granted.lock().take()
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
            if let Some(places) = granted.places {
                state.learn_places(places);
            }
        }
    }
}

/// The locked state of an inode, perhaps with a range of the file claimed.
///
/// Nobody waits for a server with the mutex locked: [`Locked::unlocked`] lets it go for that, and the claim stays.
pub struct Locked<'a> {
    inode: &'a Inode,
    state: MutexGuard<'a, State>,
    claim: Option<u64>,
}

impl<'a> Locked<'a> {
    /// Does something that waits, with the mutex unlocked. What was read from the state before may be old then.
    pub fn unlocked<T>(&mut self, act: impl FnOnce() -> T) -> T {
        MutexGuard::unlocked(&mut self.state, act)
    }

    /// Lets the mutex go; what is claimed stays claimed.
    #[must_use]
    pub fn away(mut self) -> Claimed<'a> {
        Claimed {
            inode: self.inode,
            claim: self.claim.take(),
        }
    }

    /// Claims a range until the guard is dropped. The mutex may have been unlocked meanwhile.
    ///
    /// # Errors
    /// Park, where another claim is in the way and waiting is not allowed here.
    pub fn claiming(mut self, ctx: &Ctx<'_>, span: Span, purpose: Purpose) -> Res<Self> {
        if self.claims.as_ref().is_some_and(|c| !c.is_free(span, purpose)) {
            ctx.may_wait()?;
        }
        self.wait_for(span, purpose);
        Ok(self)
    }

    /// Has this operation all of the file to itself?
    #[must_use]
    pub fn claims_all(&self) -> bool {
        let claims = &self.claims;
        self.claim
            .is_some_and(|number| claims.as_ref().is_some_and(|c| c.covers_all(number)))
    }

    fn wait_for(&mut self, span: Span, purpose: Purpose) {
        let number = self.state.claims.get_or_insert_default().ask(span, purpose);
        self.claim = Some(number);
        let given = |state: &State| state.claims.as_ref().is_none_or(|c| c.is_given(number));
        while !given(&self.state) {
            self.inode.landed.wait(&mut self.state);
        }
    }
}

impl std::ops::Deref for Locked<'_> {
    type Target = State;

    fn deref(&self) -> &State {
        &self.state
    }
}

impl std::ops::DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut State {
        &mut self.state
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let Some(number) = self.claim else { return };
        if self.state.claims.as_mut().is_some_and(|c| c.end(number)) {
            self.inode.landed.notify_all();
        } else {
            // Few of a hundred thousand inodes are at work.
            self.state.claims = None;
        }
    }
}

/// A claim, with the mutex unlocked: several inodes can be claimed at a time, where no two may be locked.
pub struct Claimed<'a> {
    inode: &'a Inode,
    claim: Option<u64>,
}

impl<'a> Claimed<'a> {
    /// Whose it is.
    #[must_use]
    pub fn inode(&self) -> &'a Inode {
        self.inode
    }

    /// Does something that waits for nothing, with the state locked.
    pub fn with<T>(&mut self, act: impl FnOnce(&mut Locked<'_>) -> T) -> T {
        let mut locked = self.inode.locked(self.inode.state.lock());
        locked.claim = self.claim.take();
        let result = act(&mut locked);
        self.claim = locked.claim.take();
        result
    }
}

impl Drop for Claimed<'_> {
    fn drop(&mut self) {
        if self.claim.is_some() {
            let mut locked = self.inode.locked(self.inode.state.lock());
            locked.claim = self.claim.take();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_proto::wire::Frame;
    use fsd_proto::wire::Kind;

    #[test]
    fn what_a_look_up_brings_late_does_not_undo_what_was_written() {
        let inode = Inode::new(5);
        let offer = |size| {
            *inode.transit.granted.lock() = Some(Box::new(Granted {
                attr: Attr::of_file(5, 3, size),
                places: None,
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
        assert!(size_of::<Inode>() <= 776, "{} bytes", size_of::<Inode>());
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
    fn where_blocks_are_is_not_believed_when_an_owner_has_died() {
        let inode = Inode::new(5);
        let ctx = Ctx::on_worker();
        let frame = Frame {
            offset: 0,
            size: 4096,
        };
        let learn = |version| inode.lock(&ctx, version).unwrap().frames.learn(0, frame);
        let knows = |version| !inode.lock(&ctx, version).unwrap().frames.known().is_empty();
        learn(7);
        assert!(knows(8));
        let died = OwnerWord::owned(lockmgr::NodeId(1), 1, 8).freed_after_death();
        assert!(!knows(died.version));
        learn(died.version);
        assert!(knows(died.version + 1));
    }
}
