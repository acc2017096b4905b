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
        let left = deadline
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        let from = from.filter(|f| f.is_ipv4() == candidate.is_ipv4() && !candidate.ip().is_loopback());
        let connected = match from {
            Some(from) => connect_from(from, &candidate, deadline),
            None => TcpStream::connect_timeout(&candidate, left),
        };
        match connected {
            Ok(stream) => {
                prepare(&stream, timeout).map_err(|e| TransportError::os("set up a socket", &e))?;
                return Ok(stream);
            }
            Err(e) => last = e.to_string(),
        }
    }
    Err(unreachable(last))
}

fn connect_from(from: IpAddr, to: &SocketAddr, deadline: Instant) -> std::io::Result<TcpStream> {
    let family = if to.is_ipv4() {
        AddressFamily::INET
    } else {
        AddressFamily::INET6
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let sock = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&sock, &SocketAddr::new(from, 0))?;
    match rustix::net::connect(&sock, to) {
        Ok(()) => {}
        Err(Errno::INPROGRESS) => {
            if !common::wait(sock.as_fd(), PollFlags::OUT, deadline)? {
                return Err(Errno::TIMEDOUT.into());
            }
            rustix::net::sockopt::socket_error(&sock)??;
        }
        Err(e) => return Err(e.into()),
    }
    Ok(sock.into())
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
