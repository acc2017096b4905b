//! An open file of the device, attached to a mount.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::counters::{self, Counters};
use crate::device::{self, Options};
use crate::error::Error;
use crate::layout::{self, Attach};
use crate::messages::{Command, Event, decode, encode};
use crate::pace::Pace;
use crate::ring::Ends;
use crate::sync::Ordering;
use crate::sys::{self, Map};
use crate::table::Table;

/// So long the kernel may take to make room in the command ring, which it reads in the daemon's own call.
const PATIENCE: Duration = Duration::from_secs(10);

/// The attachment. When it goes, all leases do, and the kernel's tasks that wait fail with ENOTCONN.
#[derive(Debug)]
pub struct Attachment {
    device: File,
    map: Arc<Map>,
    table: Table,
    spin: Duration,
    reader: Mutex<Pace>,
    writer: Mutex<()>,
}

impl Attachment {
    /// Attaches to the mount that `root` is the root of.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(root: BorrowedFd<'_>, options: &Options) -> Result<Attachment, Error> {
        let (device, layout) = device::attach(root, options)?;
        Attachment::over(device, layout, options.spin)
    }

    /// Over a device that is attached.
    pub(crate) fn over(device: File, layout: Attach, spin: Duration) -> Result<Attachment, Error> {
        let map = Arc::new(Map::new(&device, layout)?);
        Ok(Attachment {
            device,
            table: Table::new(Arc::clone(&map)),
            map,
            spin,
            reader: Mutex::default(),
            writer: Mutex::new(()),
        })
    }

    /// As the kernel would: the ends of the events' ring, and the types of what is in it.
    #[cfg(test)]
    pub(crate) fn set_events(&self, tail: u64, head: u64, kinds: &[u32]) {
        use crate::ring::Slots;
        let (ends, slots) = (self.events(), self.map.events());
        for (at, kind) in kinds.iter().enumerate() {
            let mut event: layout::Event = slots.take(at as u64);
            event.r#type = *kind;
            slots.put(at as u64, event);
        }
        ends.tail.store(tail, Ordering::Relaxed);
        ends.head.store(head, Ordering::Relaxed);
    }

    /// The lease table.
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// What the kernel has counted.
    pub fn counters(&self) -> Counters {
        counters::read(&self.map)
    }

    /// Whether the mount has ended: nothing is held any more.
    pub fn is_gone(&self) -> bool {
        self.map.shared().state.load(Ordering::Acquire) == layout::STATE_GONE
    }

    /// Until when this daemon may act, in nanoseconds of `CLOCK_BOOTTIME`: from then on the kernel answers nothing from its caches,
    /// but has its tasks ask, and takes pages out of page tables. To be said before anything is granted, and again whenever it is
    /// renewed; 0 ends it at once. Tasks that asked meanwhile are to be woken only when a later end has been said.
    pub fn set_term(&self, end: u64) {
        self.map.shared().term_end.store(end, Ordering::Release);
    }

    /// The device, for polling along with others: readable when there are events, after
    /// [`Attachment::try_event`] had none.
    pub fn device(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// What a call's buffer has, to fill `into`.
    pub fn read_buffer(&self, call: u32, into: &mut [u8]) {
        for (part, word) in into.chunks_mut(8).zip(self.map.buffer(call)) {
            let bytes = word.load(Ordering::Relaxed).to_ne_bytes();
            part.copy_from_slice(bytes.get(..part.len()).unwrap_or(&[]));
        }
    }

    /// Fills a call's buffer.
    pub fn fill_buffer(&self, call: u32, from: &[u8]) {
        for (part, word) in from.chunks(8).zip(self.map.buffer(call)) {
            let mut bytes = [0; 8];
            bytes.iter_mut().zip(part).for_each(|(to, from)| *to = *from);
            word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
        }
    }

    fn kick(&self) -> Result<(), Error> {
        sys::kick(&self.device).map_err(|source| match source.raw_os_error() {
            Some(libc::ENODEV) => Error::Gone,
            _ => Error::System {
                what: "ring the kernel extension",
                source,
            },
        })
    }

    fn events(&self) -> Ends<'_> {
        let shared = self.map.shared();
        Ends {
            head: &shared.event_head,
            tail: &shared.event_tail,
            sleeping: &shared.event_need_wakeup,
        }
    }

    fn pop(&self) -> Result<Option<Event>, Error> {
        loop {
            let Some(raw) = self.events().pop::<layout::Event>(&self.map.events()) else {
                let shared = self.map.shared();
                if shared.event_overflow.load(Ordering::Acquire) == 0 {
                    return Ok(None);
                }
                self.kick()?;
                continue;
            };
            // Of a kind that this version does not know: nothing to be done about it.
            if let Some(event) = decode(&raw) {
                return Ok(Some(event));
            }
        }
    }

    /// The next event, if there is one; the kernel is told to wake whoever polls [`Attachment::device`] if not.
    ///
    /// # Errors
    /// [`Error::Gone`] when the mount has ended.
    pub fn try_event(&self) -> Result<Option<Event>, Error> {
        let _guard = self.reader.lock();
        self.events().awake();
        loop {
            if let Some(event) = self.pop()? {
                return Ok(Some(event));
            }
            if self.is_gone() {
                return Err(Error::Gone);
            }
            if self.events().sleep() {
                return Ok(None);
            }
        }
    }

    /// The next event, if it comes soon: the kernel does not wake anybody for it.
    fn look(&self) -> Result<Option<Event>, Error> {
        let mut pace = self.reader.lock();
        self.events().awake();
        let first = self.pop()?;
        if first.is_some() || self.spin.is_zero() || !pace.is_worth_looking() {
            return Ok(first);
        }
        let end = Instant::now() + self.spin;
        loop {
            if let Some(event) = self.pop()? {
                pace.looked(true);
                return Ok(Some(event));
            }
            if Instant::now() >= end {
                pace.looked(false);
                return Ok(None);
            }
            std::hint::spin_loop();
        }
    }

    /// The next event; sleeps for it, for ever without a time. Without one after that time: `None`.
    ///
    /// # Errors
    /// [`Error::Gone`] when the mount has ended.
    pub fn next_event(&self, timeout: Option<Duration>) -> Result<Option<Event>, Error> {
        let end = timeout.map(|time| Instant::now() + time);
        loop {
            if let Some(event) = self.look()? {
                return Ok(Some(event));
            }
            if let Some(event) = self.try_event()? {
                return Ok(Some(event));
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            let since = Instant::now();
            sys::poll(&self.device, left).map_err(|source| Error::System {
                what: "wait for the kernel extension",
                source,
            })?;
            if since.elapsed() < self.spin {
                self.reader.lock().slept_shortly();
            }
        }
    }

    /// Sends a command.
    ///
    /// # Errors
    /// The mount has ended, or the kernel does not read its ring.
    pub fn command(&self, command: Command) -> Result<(), Error> {
        self.commands(&[command])
    }

    /// Sends commands, with one doorbell at most. May be called by threads that answer FUSE requests: the
    /// kernel only takes note.
    ///
    /// # Errors
    /// The mount has ended, or the kernel does not read its ring.
    pub fn commands(&self, commands: &[Command]) -> Result<(), Error> {
        let shared = self.map.shared();
        let ends = Ends {
            head: &shared.command_head,
            tail: &shared.command_tail,
            sleeping: &shared.command_need_kick,
        };
        let end = Instant::now() + PATIENCE;
        {
            let _guard = self.writer.lock();
            for command in commands {
                let raw = encode(*command);
                while !ends.push(&self.map.commands(), raw) {
                    if Instant::now() > end {
                        return Err(Error::Stuck);
                    }
                    self.kick()?;
                }
            }
        }
        if ends.ring() { self.kick() } else { Ok(()) }
    }
}
