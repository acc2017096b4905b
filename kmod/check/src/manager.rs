//! A lease manager for the attachments of two mounts, in one process: what the cluster's does, without
//! the cluster.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use distfuse_abi::{Act, Answer, Attachment, Call, Command, Error, Event, Grant, Mode, Revoked, Time};
use parking_lot::{Condvar, Mutex};

use crate::control::Control;

/// Nothing takes this long.
const LIMIT: Duration = Duration::from_secs(60);

/// Whose caches are good for what.
#[derive(Debug, Clone, Copy, Default)]
struct History {
    version: u64,
    /// The mount that made the versions from `since` on.
    writer: Option<usize>,
    since: u64,
}

/// A flush that is done.
#[derive(Debug, Clone, Copy)]
pub struct Flushed {
    /// Writing back failed.
    pub error: Option<i32>,
    /// Size and mtime in the kernel.
    pub inode: Option<(u64, Time, Time)>,
    /// No file is open.
    pub no_file: bool,
    /// Pages stayed.
    pub kept: bool,
}

#[derive(Default)]
struct Answers {
    flushed: HashMap<u32, Flushed>,
    /// Moves with every event.
    seen: u64,
}

/// The manager.
pub struct Manager {
    control: Arc<Control>,
    mounts: Vec<Attachment>,
    histories: Mutex<HashMap<u64, History>>,
    answers: Mutex<Answers>,
    changed: Condvar,
    /// Requests that the server answers under a lease, by inode: it stays until they are done.
    pins: Mutex<HashMap<u64, u32>>,
    cookie: AtomicU32,
    stop: AtomicBool,
    /// NEEDs are answered by themselves.
    pub automatic: AtomicBool,
    /// And by the thread that reads them, where nobody has to be waited for.
    pub direct: AtomicBool,
    /// NEEDs that have come.
    pub needs: AtomicU64,
    /// Calls that have not been answered.
    pub asked: Mutex<Vec<Call>>,
    /// What grants say can be stored: all, unless a check says less.
    pub space: Mutex<(u64, u64)>,
    /// All events that have come.
    pub events: AtomicU64,
    /// Doorbells and wake-ups are the module's to count; these are revocations that took one step.
    pub clean: AtomicU64,
    /// And those that did not.
    pub flushes: AtomicU64,
    /// DRAINED events.
    pub drained: AtomicU64,
}

/// A running manager; ends, with its attachments, when dropped.
pub struct Running {
    manager: Option<Arc<Manager>>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts threads for the mounts' events.
    pub fn start(control: Arc<Control>, mounts: Vec<Attachment>) -> Running {
        let manager = Arc::new(Manager {
            control,
            mounts,
            histories: Mutex::default(),
            answers: Mutex::default(),
            changed: Condvar::new(),
            pins: Mutex::default(),
            cookie: AtomicU32::new(1),
            stop: AtomicBool::new(false),
            automatic: AtomicBool::new(true),
            direct: AtomicBool::new(false),
            needs: AtomicU64::new(0),
            asked: Mutex::default(),
            space: Mutex::new((0, u64::MAX)),
            events: AtomicU64::new(0),
            clean: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        });
        let (sender, receiver) = channel();
        let mut threads = Vec::new();
        for mount in 0..manager.mounts.len() {
            let (manager, sender) = (Arc::clone(&manager), sender.clone());
            threads.push(std::thread::spawn(move || manager.listen(mount, &sender)));
        }
        let worker = Arc::clone(&manager);
        threads.push(std::thread::spawn(move || worker.answer(&receiver)));
        Running {
            manager: Some(manager),
            threads,
        }
    }

    /// The manager.
    pub fn get(&self) -> Result<&Arc<Manager>> {
        self.manager.as_ref().context("the manager has ended")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(manager) = self.manager.take() {
            manager.stop.store(true, SeqCst);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Manager {
    fn listen(&self, mount: usize, needs: &Sender<(usize, u64, Mode)>) {
        while !self.stop.load(SeqCst) {
            let event = match self
                .mount(mount)
                .map(|a| a.next_event(Some(Duration::from_millis(100))))
            {
                Ok(Ok(Some(event))) => event,
                Ok(Ok(None)) => continue,
                Ok(Err(Error::Gone)) | Err(_) => return,
                Ok(Err(error)) => {
                    eprintln!("events of mount {mount}: {error}");
                    return;
                }
            };
            self.events.fetch_add(1, SeqCst);
            match event {
                Event::Need { ino, mode } => {
                    self.needs.fetch_add(1, SeqCst);
                    if self.direct.load(SeqCst) {
                        self.answer_one(mount, ino, mode);
                    } else {
                        let _ = needs.send((mount, ino, mode));
                    }
                }
                Event::Call(call) => {
                    self.asked.lock().push(call);
                    if self.automatic.load(SeqCst)
                        && let Err(error) = self.carry_out(mount)
                    {
                        eprintln!("call on {} of mount {mount}: {error:#}", call.ino);
                    }
                }
                Event::Drained { .. } => {
                    self.drained.fetch_add(1, SeqCst);
                    self.answers.lock().seen += 1;
                    self.changed.notify_all();
                }
                Event::Flushed {
                    cookie,
                    error,
                    inode,
                    no_file,
                    kept,
                    ..
                } => {
                    let done = Flushed {
                        error,
                        inode,
                        no_file,
                        kept,
                    };
                    let mut answers = self.answers.lock();
                    answers.flushed.insert(cookie, done);
                    answers.seen += 1;
                    self.changed.notify_all();
                }
            }
        }
    }

    fn answer(&self, needs: &Receiver<(usize, u64, Mode)>) {
        while !self.stop.load(SeqCst) {
            let Ok((mount, ino, mode)) = needs.recv_timeout(Duration::from_millis(100)) else {
                continue;
            };
            if self.automatic.load(SeqCst) {
                self.answer_one(mount, ino, mode);
            }
        }
    }

    fn answer_one(&self, mount: usize, ino: u64, mode: Mode) {
        if let Err(error) = self.give(mount, ino, mode) {
            eprintln!("lease {mode:?} on {ino} for mount {mount}: {error:#}");
            let refusal = Command::Wake {
                ino,
                error: Some(libc::EIO),
            };
            let _ = self.mount(mount).map(|mount| mount.command(refusal));
        }
    }

    /// Does what a mount's tasks want done, and answers.
    pub fn carry_out(&self, mount: usize) -> Result<()> {
        let asked = std::mem::take(&mut *self.asked.lock());
        for call in asked {
            let kernel = self.mount(mount)?;
            let done = match call.act {
                Act::Read => {
                    let data = self.control.read(call.ino, call.offset, call.len as usize)?;
                    kernel.fill_buffer(call.number, &data);
                    data.len()
                }
                Act::Write { .. } => {
                    let mut data = vec![0; call.len as usize];
                    kernel.read_buffer(call.number, &mut data);
                    self.control.write(call.ino, call.offset, &data)?;
                    self.changed(call.ino);
                    data.len()
                }
                Act::Space => {
                    kernel.table().set_space(call.ino, (0, u64::MAX));
                    call.len as usize
                }
            };
            let answer = Answer::Done(u32::try_from(done)?);
            let call = call.number;
            kernel.command(Command::Answer { call, answer })?;
        }
        Ok(())
    }

    /// An attachment.
    pub fn mount(&self, mount: usize) -> Result<&Attachment> {
        self.mounts.get(mount).context("no such mount")
    }

    /// What a mount holds.
    pub fn held(&self, mount: usize, ino: u64) -> Result<Mode> {
        Ok(self
            .mount(mount)?
            .table()
            .word(ino)
            .map_or(Mode::None, |word| word.mode()))
    }

    /// Gives a mount a lease, takes it from others first, wakes.
    pub fn give(&self, mount: usize, ino: u64, mode: Mode) -> Result<()> {
        let mut histories = self.histories.lock();
        if self.held(mount, ino)? < mode {
            let others = if mode == Mode::Exclusive {
                Mode::None
            } else {
                Mode::Shared
            };
            for other in (0..self.mounts.len()).filter(|other| *other != mount) {
                if self.held(other, ino)? > others {
                    self.take_locked(&mut histories, other, ino, others)?;
                }
            }
            let history = histories.entry(ino).or_default();
            if mode == Mode::Exclusive && history.writer != Some(mount) {
                history.writer = Some(mount);
                history.since = history.version;
            }
            self.grant_locked(&mut histories, mount, ino, mode)?;
        }
        drop(histories);
        self.mount(mount)?.command(Command::Wake { ino, error: None })?;
        Ok(())
    }

    fn grant_locked(
        &self,
        histories: &mut HashMap<u64, History>,
        mount: usize,
        ino: u64,
        mode: Mode,
    ) -> Result<()> {
        let history = *histories.entry(ino).or_default();
        let own = history.writer == Some(mount);
        let grant = Grant {
            version: history.version,
            since: if own { history.since } else { history.version },
            attributes: self.control.attributes(ino).unwrap_or_default(),
            space: *self.space.lock(),
        };
        let table = self.mount(mount)?.table();
        loop {
            match table.grant(ino, mode, &grant) {
                Ok(_) => return Ok(()),
                Err(Error::Full(_)) => {
                    let (victim, _) = table
                        .neighbours(ino)
                        .into_iter()
                        .min_by_key(|(_, word)| (word.has(distfuse_abi::word::DIRTY), word.count()))
                        .context("a full set without entries")?;
                    self.take_locked(histories, mount, victim, Mode::None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Takes a lease down, and waits until it is.
    pub fn take(&self, mount: usize, ino: u64, target: Mode) -> Result<Option<Flushed>> {
        self.take_locked(&mut self.histories.lock(), mount, ino, target)
    }

    /// Takes a lease away, and has the contents changed by somebody else before it can be given again.
    pub fn replace(&self, mount: usize, ino: u64, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut histories = self.histories.lock();
        self.take_locked(&mut histories, mount, ino, Mode::None)?;
        change()?;
        let history = histories.entry(ino).or_default();
        history.version += 1;
        history.since = history.version;
        history.writer = None;
        Ok(())
    }

    /// Says that somebody else has changed the contents.
    pub fn changed(&self, ino: u64) {
        let mut histories = self.histories.lock();
        let history = histories.entry(ino).or_default();
        history.version += 1;
        history.since = history.version;
        history.writer = None;
    }

    fn take_locked(
        &self,
        histories: &mut HashMap<u64, History>,
        mount: usize,
        ino: u64,
        target: Mode,
    ) -> Result<Option<Flushed>> {
        let writing = self.held(mount, ino)? == Mode::Exclusive;
        let done = self.lower(mount, ino, target)?;
        if writing {
            histories.entry(ino).or_default().version += 1;
        }
        if let Some(done) = done
            && let Some((size, mtime, _)) = done.inode
            && done.error.is_none()
        {
            let meta = self.control.meta(ino);
            let known = meta.map_or(size, |meta| meta.size.load(SeqCst));
            if known != size {
                bail!("inode {ino} has {size} bytes in the kernel, {known} at the server after its flush");
            }
            self.control.set_mtime(ino, mtime);
        }
        Ok(done)
    }

    /// Before a server changes attributes: gets its mount the exclusive lease, or finds that it has it,
    /// being revoked or not, for what comes with the inode locked must not wait for a revocation.
    pub fn pin(&self, mount: usize, ino: u64) -> Result<()> {
        loop {
            {
                let mut pins = self.pins.lock();
                if self.held(mount, ino)? == Mode::Exclusive {
                    *pins.entry(ino).or_default() += 1;
                    return Ok(());
                }
            }
            self.give(mount, ino, Mode::Exclusive)?;
        }
    }

    /// After it, and before it answers.
    pub fn unpin(&self, mount: usize, ino: u64) -> Result<()> {
        if let Some(attributes) = self.control.attributes(ino) {
            self.mount(mount)?.table().set_attributes(ino, &attributes)?;
        }
        if let Some(pins) = self.pins.lock().get_mut(&ino) {
            *pins -= 1;
        }
        self.answers.lock().seen += 1;
        self.changed.notify_all();
        Ok(())
    }

    /// A step of a revocation, unless a request is being answered under the lease.
    fn step(&self, ino: u64, step: impl FnOnce() -> Revoked) -> Option<Revoked> {
        let pins = self.pins.lock();
        (pins.get(&ino).copied().unwrap_or(0) == 0).then(step)
    }

    fn lower(&self, mount: usize, ino: u64, target: Mode) -> Result<Option<Flushed>> {
        let attachment = self.mount(mount)?;
        let table = attachment.table();
        let end = Instant::now() + LIMIT;
        let mut flushed = None;
        let mut seen = self.answers.lock().seen;
        let mut revoked = self.step(ino, || table.revoke(ino, target, true));
        loop {
            let pending = match revoked {
                None => None,
                Some(Revoked::Done { wake }) => {
                    let counter = if flushed.is_some() {
                        &self.flushes
                    } else {
                        &self.clean
                    };
                    counter.fetch_add(1, SeqCst);
                    if wake {
                        attachment.command(Command::Wake { ino, error: None })?;
                    }
                    return Ok(flushed);
                }
                Some(Revoked::Unused) => bail!("forced, and refused"),
                Some(Revoked::Pending(pending)) => Some(pending),
            };
            if pending.is_some_and(|pending| pending.needs_flush(target)) {
                let cookie = self.cookie.fetch_add(1, SeqCst);
                attachment.command(Command::Flush {
                    ino,
                    cookie,
                    unmap: target == Mode::None,
                    drop: false,
                })?;
                let done = self.flushed(cookie, end)?;
                if done.no_file {
                    self.wait_for_release(mount, ino, end)?;
                }
                flushed = Some(done);
            } else {
                let mut answers = self.answers.lock();
                while answers.seen == seen && Instant::now() < end {
                    self.changed.wait_for(&mut answers, Duration::from_secs(1));
                }
                if answers.seen == seen {
                    bail!("inode {ino} is not drained: {pending:?}");
                }
                seen = answers.seen;
            }
            revoked = self.step(ino, || table.finish(ino, target));
        }
    }

    fn flushed(&self, cookie: u32, end: Instant) -> Result<Flushed> {
        let mut answers = self.answers.lock();
        loop {
            if let Some(done) = answers.flushed.remove(&cookie) {
                return Ok(done);
            }
            if Instant::now() > end {
                bail!("no answer to flush {cookie}");
            }
            self.changed.wait_for(&mut answers, Duration::from_secs(1));
        }
    }

    /// The last handle's RELEASE comes after the answers to all writes.
    fn wait_for_release(&self, mount: usize, ino: u64, end: Instant) -> Result<()> {
        while self
            .control
            .meta(ino)
            .and_then(|meta| meta.opens.get(mount))
            .is_some_and(|opens| opens.load(SeqCst) > 0)
        {
            if Instant::now() > end {
                bail!("inode {ino} is not released");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}
