//! The lab's side of the connection to a guest's agent.

use std::collections::HashMap;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::error::{At, Error, Result};
use crate::process::lock;
use crate::proto::{self, Ending, FromGuest, Program, Size, Stream, ToGuest};

/// Most that is kept of what a program prints, per stream; the rest is passed on but not kept.
const KEPT: usize = 16 << 20;

/// What comes from a program in a guest.
#[derive(Debug)]
enum Event {
    Output(Stream, Vec<u8>),
    Ended(Ending),
}

/// Who waits for what; `None` when the connection is gone.
type Waiting = Arc<Mutex<Option<HashMap<u32, Sender<Event>>>>>;

/// A connection to an agent.
#[derive(Debug)]
pub struct Link {
    guest: String,
    out: Mutex<UnixStream>,
    waiting: Waiting,
    ready: Mutex<Receiver<u64>>,
    next: AtomicU32,
}

impl Link {
    /// Takes over the socket and asks the agent for a sign of life, which [`Link::ready`] waits for.
    ///
    /// # Errors
    /// The socket is broken.
    pub fn new(guest: &str, socket: UnixStream) -> Result<Arc<Link>> {
        let mut input = socket.try_clone().at(|| "share a socket".into())?;
        let waiting: Waiting = Arc::new(Mutex::new(Some(HashMap::new())));
        let (ready_tx, ready) = channel();
        let routes = Arc::clone(&waiting);
        std::thread::spawn(move || {
            while let Ok(message) = proto::receive::<FromGuest>(&mut input) {
                // Whoever started the program may not wait for it any more.
                match message {
                    FromGuest::Ready { uptime_ms, .. } => drop(ready_tx.send(uptime_ms)),
                    FromGuest::Output { id, stream, data } => {
                        if let Some(to) = lock(&routes).as_ref().and_then(|routes| routes.get(&id)) {
                            let _ = to.send(Event::Output(stream, data));
                        }
                    }
                    FromGuest::Ended { id, ending } => {
                        if let Some(to) = lock(&routes).as_mut().and_then(|routes| routes.remove(&id)) {
                            let _ = to.send(Event::Ended(ending));
                        }
                    }
                }
            }
            // All that wait learn that the guest is gone.
            lock(&routes).take();
        });
        let link = Arc::new(Link {
            guest: guest.to_owned(),
            out: Mutex::new(socket),
            waiting,
            ready: Mutex::new(ready),
            next: AtomicU32::new(1),
        });
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        link.send(&ToGuest::Hello {
            nonce: 1,
            unix_ms: u64::try_from(unix.as_millis()).unwrap_or(0),
        })?;
        Ok(link)
    }

    /// Waits until the agent listens; returns how long the guest has been up.
    ///
    /// # Errors
    /// Not in time, or it has ended.
    pub fn ready(&self, limit: Duration) -> Result<Duration> {
        match lock(&self.ready).recv_timeout(limit) {
            Ok(uptime) => Ok(Duration::from_millis(uptime)),
            Err(RecvTimeoutError::Timeout) => Err(Error::TimeOut {
                what: format!("the boot of {}", self.guest),
                seconds: limit.as_secs(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(self.gone("booting")),
        }
    }

    /// Starts a program.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn start(self: &Arc<Self>, program: Program) -> Result<Running> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tx, events) = channel();
        let label = program.argv.join(" ");
        match lock(&self.waiting).as_mut() {
            Some(waiting) => waiting.insert(id, tx),
            None => return Err(self.gone(&format!("starting `{label}`"))),
        };
        self.send(&ToGuest::Start { id, program })?;
        Ok(Running {
            handle: Handle {
                link: Arc::clone(self),
                id,
            },
            events,
            label,
        })
    }

    /// Switches the guest off, without waiting for it.
    ///
    /// # Errors
    /// It is gone.
    pub fn power_off(&self) -> Result<()> {
        self.send(&ToGuest::PowerOff)
    }

    fn send(&self, message: &ToGuest) -> Result<()> {
        proto::send(&mut *lock(&self.out), message).map_err(|_| self.gone("talking to its agent"))
    }

    fn gone(&self, doing: &str) -> Error {
        Error::Gone {
            guest: self.guest.clone(),
            doing: doing.to_owned(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // Ends the thread that reads; it fails only where the other side has.
        let _ = lock(&self.out).shutdown(Shutdown::Both);
    }
}

/// What a program has printed, and how it ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// How it ended.
    pub ending: Ending,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// By which a program that runs in a guest is acted on.
#[derive(Debug, Clone)]
pub struct Handle {
    link: Arc<Link>,
    id: u32,
}

/// A program that runs in a guest.
#[derive(Debug)]
pub struct Running {
    handle: Handle,
    events: Receiver<Event>,
    label: String,
}

impl Running {
    /// Waits for its end and returns what it printed.
    ///
    /// # Errors
    /// It takes too long, and is ended for that; the guest is gone.
    pub fn wait(&self, limit: Duration) -> Result<Finished> {
        self.wait_with(limit, |_, _| {})
    }

    /// As [`Running::wait`]; `sink` gets what it prints as it comes.
    ///
    /// # Errors
    /// As [`Running::wait`].
    pub fn wait_with(&self, limit: Duration, mut sink: impl FnMut(Stream, &[u8])) -> Result<Finished> {
        let deadline = Instant::now() + limit;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        loop {
            match self
                .events
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(Event::Output(stream, data)) => {
                    sink(stream, &data);
                    let kept = match stream {
                        Stream::Out => &mut out,
                        Stream::Err => &mut err,
                    };
                    let room = KEPT.saturating_sub(kept.len()).min(data.len());
                    kept.extend_from_slice(data.get(..room).unwrap_or_default());
                }
                Ok(Event::Ended(ending)) => {
                    return Ok(Finished {
                        ending,
                        out: text(&out),
                        err: text(&err),
                    });
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.kill();
                    let shown = crate::tools::tail(&text(&[out, err].concat()), 400)
                        .trim()
                        .to_owned();
                    return Err(Error::TimeOut {
                        what: format!(
                            "`{}` on {} (it printed: {shown})",
                            self.label, self.handle.link.guest
                        ),
                        seconds: limit.as_secs(),
                    });
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(self.handle.link.gone(&format!("running `{}`", self.label)));
                }
            }
        }
    }

    /// By which it can be acted on while another waits for it.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Ends it, with its process group.
    pub fn kill(&self) {
        // Where that fails there is nothing left to end.
        let _ = self.handle.link.send(&ToGuest::Kill { id: self.handle.id });
    }
}

impl Handle {
    /// Types something on its terminal.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn input(&self, data: &[u8]) -> Result<()> {
        self.link.send(&ToGuest::Input {
            id: self.id,
            data: data.to_vec(),
        })
    }

    /// Tells it that its terminal has another size.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn resize(&self, size: Size) -> Result<()> {
        self.link.send(&ToGuest::Resize { id: self.id, size })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(id: u32, text: &str) -> FromGuest {
        FromGuest::Output {
            id,
            stream: Stream::Out,
            data: text.as_bytes().to_vec(),
        }
    }

    #[test]
    fn programs_are_told_apart_and_a_lost_guest_is_noticed() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let link = Link::new("guest 1", ours).unwrap();
        assert!(matches!(
            proto::receive(&mut theirs).unwrap(),
            ToGuest::Hello { .. }
        ));
        proto::send(
            &mut theirs,
            &FromGuest::Ready {
                nonce: 1,
                uptime_ms: 1500,
            },
        )
        .unwrap();
        assert_eq!(
            link.ready(Duration::from_secs(5)).unwrap(),
            Duration::from_millis(1500)
        );

        let a = link.start(Program::default()).unwrap();
        let b = link.start(Program::default()).unwrap();
        proto::send(&mut theirs, &output(b.handle.id, "b")).unwrap();
        proto::send(&mut theirs, &output(a.handle.id, "a")).unwrap();
        proto::send(
            &mut theirs,
            &FromGuest::Ended {
                id: b.handle.id,
                ending: Ending::Code(4),
            },
        )
        .unwrap();
        let done = b.wait(Duration::from_secs(5)).unwrap();
        assert_eq!((done.ending, done.out.as_str()), (Ending::Code(4), "b"));
        assert!(matches!(
            a.wait(Duration::from_millis(20)),
            Err(Error::TimeOut { .. })
        ));
        drop(theirs);
        assert!(matches!(a.wait(Duration::from_secs(5)), Err(Error::Gone { .. })));
        assert!(matches!(link.start(Program::default()), Err(Error::Gone { .. })));
    }
}
