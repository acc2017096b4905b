//! The control socket of a connection: a Unix socket that keeps packets apart and passes file descriptors.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::common::wait;
use crate::handshake::{MAX_MESSAGE, Pipe};
use crate::{Access, TransportError};

/// Most descriptors in one packet.
const MAX_FDS: usize = 4;

/// A packet and what came with it.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

pub(super) fn socket() -> Result<OwnedFd, TransportError> {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .map_err(|e| TransportError::os("create a Unix socket", &e.into()))
}

pub(super) fn address(path: &str) -> Result<SocketAddrUnix, TransportError> {
    SocketAddrUnix::new(path).map_err(|_| {
        TransportError::Invalid(format!(
            "{path:?} cannot be a Unix socket path (at most 107 bytes)"
        ))
    })
}

/// Sends one packet, waiting for room until the deadline ([`Errno::TIMEDOUT`]).
pub(super) fn send(
    sock: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
    deadline: Instant,
) -> Result<(), Errno> {
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Errno::INVAL);
        }
        match rustix::net::sendmsg(sock, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                if !wait(sock, PollFlags::OUT, deadline)? {
                    return Err(Errno::TIMEDOUT);
                }
            }
            Err(e) => return Err(e),
        }
    }
}

/// Receives one packet if there is one; an empty one is the end of the stream.
pub(super) fn try_recv(sock: BorrowedFd<'_>) -> Result<Option<Packet>, Errno> {
    let mut bytes = [0u8; MAX_MESSAGE];
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match rustix::net::recvmsg(sock, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Ok(got) => {
                let mut fds = Vec::new();
                for message in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(received) = message {
                        fds.extend(received);
                    }
                }
                let len = got.bytes.min(bytes.len());
                return Ok(Some(Packet {
                    bytes: bytes[..len].to_vec(),
                    fds,
                }));
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(e) => return Err(e),
        }
    }
}

/// A socket during the handshake.
#[derive(Debug)]
pub(super) struct HandshakePipe {
    pub(super) sock: Arc<OwnedFd>,
    pub(super) addr: String,
    pub(super) deadline: Instant,
    pub(super) timeout: Duration,
}

impl HandshakePipe {
    fn failed(&self, e: Errno) -> TransportError {
        if e == Errno::TIMEDOUT {
            return crate::common::timed_out(&self.addr, self.timeout);
        }
        // Who dies in the middle of one is away, like one that cannot be reached.
        crate::common::disconnected(&self.addr, &format!("handshake broken off: {e}"))
    }

    pub(super) fn send_with(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), TransportError> {
        send(self.sock.as_fd(), bytes, fds, self.deadline).map_err(|e| self.failed(e))
    }

    pub(super) fn recv_packet(&self) -> Result<Packet, TransportError> {
        loop {
            if let Some(packet) = try_recv(self.sock.as_fd()).map_err(|e| self.failed(e))? {
                if packet.bytes.is_empty() {
                    let why = "handshake broken off by the other side";
                    return Err(crate::common::disconnected(&self.addr, why));
                }
                return Ok(packet);
            }
            if !wait(self.sock.as_fd(), PollFlags::IN, self.deadline).map_err(|e| self.failed(e))? {
                return Err(self.failed(Errno::TIMEDOUT));
            }
        }
    }
}

impl Pipe for HandshakePipe {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError> {
        self.send_with(message, &[])
    }
    fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
        self.recv_packet().map(|p| p.bytes)
    }
    fn addr(&self) -> String {
        self.addr.clone()
    }
}

/// What an established connection says on its control socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Notice {
    /// A region, whose memory comes with the packet.
    Region { key: u64, len: u64, access: Access },
    /// The region is gone.
    Gone { key: u64 },
    /// The sender has told of all its regions so far: the connection may be used.
    Ready,
}

impl Notice {
    pub(super) fn encode(self) -> [u8; 24] {
        let mut out = [0u8; 24];
        match self {
            Self::Region { key, len, access } => {
                out[0] = 1;
                out[1] = u8::from(access.read) | u8::from(access.write) << 1 | u8::from(access.atomic) << 2;
                out[8..16].copy_from_slice(&key.to_le_bytes());
                out[16..24].copy_from_slice(&len.to_le_bytes());
            }
            Self::Gone { key } => {
                out[0] = 2;
                out[8..16].copy_from_slice(&key.to_le_bytes());
            }
            Self::Ready => out[0] = 3,
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; 24] = bytes.try_into().ok()?;
        let word =
            |at: usize| -> Option<u64> { Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?)) };
        let (key, len) = (word(8)?, word(16)?);
        match bytes[0] {
            1 if bytes[1] < 8 => {
                let bit = |n: u8| bytes[1] >> n & 1 == 1;
                let access = Access {
                    read: bit(0),
                    write: bit(1),
                    atomic: bit(2),
                };
                Some(Self::Region { key, len, access })
            }
            2 => Some(Self::Gone { key }),
            3 => Some(Self::Ready),
            _ => None,
        }
    }
}
