//! TCP streams, for the providers that set connections up over them.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::common;
use crate::error::TransportError;
use crate::handshake::{MAX_MESSAGE, Pipe};

/// After so long another attempt to connect is begun.
const AGAIN: Duration = Duration::from_secs(1);
/// Attempts at a time: what takes longer than they wait for an answer is too far away.
const ATTEMPTS: usize = 6;

/// Listens on `host:port`, without blocking; also the address with the real port.
pub(crate) fn listen(on: &str) -> Result<(TcpListener, SocketAddr), TransportError> {
    let os = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::AddrInUse => TransportError::AddressInUse { addr: on.to_owned() },
        _ => TransportError::os(format!("listen on {on}"), &e),
    };
    let listener = TcpListener::bind(on).map_err(os)?;
    listener.set_nonblocking(true).map_err(os)?;
    let addr = listener.local_addr().map_err(os)?;
    Ok((listener, addr))
}

/// Connects to `host:port`, from the address `from` where that is possible.
pub(crate) fn dial(
    addr: &str,
    from: Option<IpAddr>,
    deadline: Instant,
    timeout: Duration,
) -> Result<TcpStream, TransportError> {
    let unreachable = |reason: String| TransportError::Unreachable {
        addr: addr.to_owned(),
        reason,
    };
    let mut last = "the name has no address".to_owned();
    for candidate in addr.to_socket_addrs().map_err(|e| unreachable(e.to_string()))? {
        let from = from.filter(|f| f.is_ipv4() == candidate.is_ipv4() && !candidate.ip().is_loopback());
        match connect(from, &candidate, deadline) {
            Ok(stream) => {
                prepare(&stream, timeout).map_err(|e| TransportError::os("set up a socket", &e))?;
                return Ok(stream);
            }
            Err(e) => last = e.to_string(),
        }
    }
    Err(unreachable(last))
}

/// Begins to connect, from an address where that is said.
fn begin(from: Option<IpAddr>, to: &SocketAddr) -> std::io::Result<OwnedFd> {
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let sock = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    if let Some(from) = from {
        rustix::net::bind(&sock, &SocketAddr::new(from, 0))?;
    }
    match rustix::net::connect(&sock, to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(sock),
        Err(e) => Err(e.into()),
    }
}

/// Connects. A host that was away, and is back, must be reached soon: but the kernel, whose first packets were lost, waits twice as long
/// before each of the next ones. So other attempts are begun meanwhile, beside those that may still get an answer.
fn connect(from: Option<IpAddr>, to: &SocketAddr, deadline: Instant) -> std::io::Result<TcpStream> {
    let mut attempts: Vec<OwnedFd> = Vec::new();
    loop {
        if attempts.len() == ATTEMPTS {
            attempts.remove(0);
        }
        attempts.push(begin(from, to)?);
        let now = Instant::now();
        let until = deadline.min(now + AGAIN);
        if let Some(i) = common::wait_any(&attempts, PollFlags::OUT, until)? {
            let sock = attempts.swap_remove(i);
            rustix::net::sockopt::socket_error(&sock)??;
            return Ok(sock.into());
        }
        if until == deadline {
            return Err(Errno::TIMEDOUT.into());
        }
    }
}

/// Small frames at once; a peer that vanished is noticed.
pub(crate) fn prepare(stream: &TcpStream, timeout: Duration) -> std::io::Result<()> {
    stream.set_nonblocking(true)?;
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(stream, true)?;
    let millis = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    rustix::net::sockopt::set_tcp_user_timeout(stream, millis)?;
    Ok(())
}

/// As [`FramedPipe`] sends it.
pub(crate) fn framed(message: &[u8]) -> Vec<u8> {
    let mut out = (message.len() as u32).to_le_bytes().to_vec();
    out.extend_from_slice(message);
    out
}

/// Handshake messages on a stream: a length (u32), then the message.
#[derive(Clone)]
pub(crate) struct FramedPipe {
    pub(crate) sock: Arc<OwnedFd>,
    pub(crate) addr: String,
    pub(crate) deadline: Instant,
    pub(crate) timeout: Duration,
}

impl FramedPipe {
    fn failed(&self, e: Errno) -> TransportError {
        if e == Errno::TIMEDOUT {
            return common::timed_out(&self.addr, self.timeout);
        }
        // Who dies in the middle of one is away, like one that cannot be reached.
        common::disconnected(&self.addr, &format!("handshake broken off: {e}"))
    }

    fn malformed(&self, detail: &str) -> TransportError {
        TransportError::Protocol {
            addr: self.addr.clone(),
            detail: detail.to_owned(),
        }
    }

    fn wait(&self, what: PollFlags) -> Result<(), TransportError> {
        match common::wait(self.sock.as_fd(), what, self.deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.failed(Errno::TIMEDOUT)),
            Err(e) => Err(self.failed(e)),
        }
    }

    fn recv_exact(&self, into: &mut [u8]) -> Result<(), TransportError> {
        let mut got = 0;
        while got < into.len() {
            match rustix::net::recv(&*self.sock, &mut into[got..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    let why = "handshake broken off by the other side";
                    return Err(common::disconnected(&self.addr, why));
                }
                Ok((n, _)) => got += n,
                Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }
}

impl Pipe for FramedPipe {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError> {
        let bytes = framed(message);
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match rustix::net::send(&*self.sock, rest, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(e) => return Err(self.failed(e)),
            }
        }
        Ok(())
    }

    fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
        let mut len = [0u8; 4];
        self.recv_exact(&mut len)?;
        let len = u32::from_le_bytes(len) as usize;
        if len > MAX_MESSAGE {
            return Err(self.malformed("impossible length of a handshake message"));
        }
        let mut message = vec![0; len];
        self.recv_exact(&mut message)?;
        Ok(message)
    }

    fn addr(&self) -> String {
        self.addr.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;
    use crate::test_util::allocating;

    #[test]
    fn who_dies_in_the_middle_of_a_handshake_is_away() {
        for said in [&[][..], &[9, 0, 0, 0, 1]] {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            theirs.write_all(said).unwrap();
            drop(theirs);
            let timeout = Duration::from_secs(5);
            let mut pipe = FramedPipe {
                sock: Arc::new(ours.into()),
                addr: "dying".to_owned(),
                deadline: Instant::now() + timeout,
                timeout,
            };
            let (received, sent) = (pipe.recv().unwrap_err(), pipe.send(b"hello").unwrap_err());
            for error in [received, sent] {
                assert!(matches!(error, TransportError::Disconnected { .. }), "{error}");
            }
        }
    }

    /// A listener whose kernel drops what asks it to connect, and those that fill its queue.
    fn deaf() -> (OwnedFd, SocketAddr, Vec<OwnedFd>) {
        let sock = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&sock, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&sock, 0).unwrap();
        let to = SocketAddr::try_from(rustix::net::getsockname(&sock).unwrap()).unwrap();
        let mut queued = Vec::new();
        loop {
            let one = begin(None, &to).unwrap();
            let soon = Instant::now() + Duration::from_millis(300);
            let is_queued = common::wait(one.as_fd(), PollFlags::OUT, soon).unwrap();
            queued.push(one);
            if !is_queued {
                return (sock, to, queued);
            }
        }
    }

    /// Sockets of this host that wait for an answer of a port.
    fn asking(port: u16) -> usize {
        const SYN_SENT: &str = "02";
        let to = format!(":{port:04X}");
        let text = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let asks = |line: &&str| {
            let mut fields = line.split_whitespace().skip(2);
            fields.next().is_some_and(|remote| remote.ends_with(&to)) && fields.next() == Some(SYN_SENT)
        };
        text.lines().filter(asks).count()
    }

    #[test]
    fn a_host_that_comes_back_is_not_asked_ever_more_seldom() {
        let (listener, to, queued) = deaf();
        let before = asking(to.port());
        let end = Instant::now() + Duration::from_secs(60);
        let dialled = std::thread::spawn(move || connect(None, &to, end));
        while asking(to.port()) < before + 3 {
            assert!(Instant::now() < end, "{} attempts", asking(to.port()) - before);
            std::thread::sleep(Duration::from_millis(10));
        }
        // It listens again.
        let accepted = std::thread::spawn(move || {
            (0..=queued.len()).for_each(|_| {
                let _ = rustix::net::accept(&listener);
            });
            drop(queued);
        });
        dialled.join().unwrap().unwrap();
        accepted.join().unwrap();
    }

    proptest! {
        #[test]
        fn whatever_length_is_announced(len in prop_oneof![0u32..5000, any::<u32>()], body in 0usize..6000) {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            theirs.write_all(&len.to_le_bytes()).unwrap();
            theirs.write_all(&vec![1; body]).unwrap();
            drop(theirs);
            let timeout = Duration::from_secs(5);
            let mut pipe = FramedPipe {
                sock: Arc::new(ours.into()),
                addr: "fuzz".to_owned(),
                deadline: Instant::now() + timeout,
                timeout,
            };
            let (message, most) = allocating(|| pipe.recv());
            prop_assert_eq!(message.is_ok(), len as usize <= body.min(MAX_MESSAGE));
            prop_assert!(most < 2 * MAX_MESSAGE, "{most} bytes");
        }
    }
}
