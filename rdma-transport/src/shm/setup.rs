//! Setting up a connection: the handshake, then the exchange of shared memory.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::conn::{Parts, ShmConn};
use super::control::{self, HandshakePipe, Notice};
use super::core::Core;
use super::executor::Executor;
use super::layout::{Channel, Directory, Side};
use super::seat::Seat;
use crate::error::TransportError;
use crate::fabric::Connection;
use crate::handshake::{self, Provider};
use crate::threads::Endpoint;

/// Sent by the connecting side with its directory, doorbell and the channel.
const SETUP: &[u8] = b"setup";

/// Takes an incoming socket: the handshake runs on a thread of its own.
pub(super) fn accept(core: &Arc<Core>, sock: OwnedFd) {
    let sock = Arc::new(sock);
    let executor = Executor::of(sock.as_fd());
    let addr = match rustix::net::sockopt::socket_peercred(&*sock) {
        Ok(cred) => format!("process {}", cred.pid.as_raw_nonzero()),
        Err(_) => "a local process".to_owned(),
    };
    core.shake_hands(Arc::clone(&sock), move |core, deadline, timeout| {
        welcome(
            core,
            HandshakePipe {
                sock,
                addr,
                deadline,
                timeout,
            },
            executor,
        )
    });
}

fn welcome(
    core: &Arc<Core>,
    mut pipe: HandshakePipe,
    executor: Option<Executor>,
) -> Result<(), TransportError> {
    let verified = handshake::server(&mut pipe, &core.host.base.local(Provider::Shm), &|identity| {
        core.host.base.handler.admit(identity)
    })?;
    let seat = core.seat_for(&verified.peer.identity, executor.as_ref())?;
    let mut ours = vec![core.host.directory.mem().fd(), core.host.bell.as_fd()];
    ours.extend(seat.iter().map(|seat| seat.mem().fd()));
    pipe.send_with(&verified.welcome, &ours)?;
    let malformed = || TransportError::Protocol {
        addr: pipe.addr.clone(),
        detail: "connection set-up without its shared memory".to_owned(),
    };
    let packet = pipe.recv_packet()?;
    let Ok([dir, bell, channel]) = <[OwnedFd; 3]>::try_from(packet.fds) else {
        return Err(malformed());
    };
    if packet.bytes != SETUP {
        return Err(malformed());
    }
    let parts = Parts {
        channel: Channel::of_peer(channel, seat)?,
        peer_dir: Directory::of_peer(dir)?,
        peer_bell: bell,
        side: Side::Listening,
        addr: pipe.addr.clone(),
        sock: Arc::clone(&pipe.sock),
        peer: verified.peer,
        executor,
    };
    let conn = ShmConn::new(core.host.base.next_id(), &core.host, parts);
    core.await_former(&conn.base.peer.identity);
    let superseded = core.link(&conn);
    for old in &superseded {
        // Returns when nothing of the old connection can land any more.
        old.close();
    }
    conn.notify(Notice::Ready, None);
    let ready = conn.await_ready(pipe.deadline);
    core.install_if(ready, conn, superseded)
}

pub(super) fn connect(core: &Arc<Core>, path: &str) -> Result<Arc<ShmConn>, TransportError> {
    let timeout = core.host.base.config.timeout;
    let deadline = Instant::now() + timeout;
    let unreachable = |reason: String| TransportError::Unreachable {
        addr: path.to_owned(),
        reason,
    };
    let address = control::address(path)?;
    let sock = control::socket()?;
    loop {
        match rustix::net::connect(&sock, &address) {
            Ok(()) => break,
            Err(Errno::INTR) => {}
            // The backlog is full.
            Err(Errno::AGAIN) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(unreachable(e.to_string())),
        }
    }
    let mut pipe = HandshakePipe {
        sock: Arc::new(sock),
        addr: path.to_owned(),
        deadline,
        timeout,
    };
    let serial = core.host.base.next_id();
    let links_to = |instance: u64| core.links_to(instance);
    let (peer, fds) = {
        let mut taker = FdTaker {
            pipe: &mut pipe,
            fds: Vec::new(),
        };
        let peer = handshake::client(
            &mut taker,
            &core.host.base.local(Provider::Shm),
            serial.0,
            &links_to,
        )?;
        (peer, taker.fds)
    };
    let malformed = |detail: &str| TransportError::Protocol {
        addr: path.to_owned(),
        detail: detail.to_owned(),
    };
    let mut fds = fds.into_iter();
    let (Some(dir), Some(bell), seat, None) = (fds.next(), fds.next(), fds.next(), fds.next()) else {
        return Err(malformed("welcome without its shared memory"));
    };
    let channel = Channel::create(seat.map(Seat::of_peer).transpose()?)?;
    let ours = [
        core.host.directory.mem().fd(),
        core.host.bell.as_fd(),
        channel.mem().fd(),
    ];
    pipe.send_with(SETUP, &ours)?;
    let parts = Parts {
        peer,
        addr: path.to_owned(),
        side: Side::Connecting,
        channel,
        peer_dir: Directory::of_peer(dir)?,
        peer_bell: bell,
        sock: Arc::clone(&pipe.sock),
        executor: None,
    };
    let conn = ShmConn::new(serial, &core.host, parts);
    let ready = conn.await_ready(deadline);
    core.link(&conn);
    conn.notify(Notice::Ready, None);
    core.install_if(ready, Arc::clone(&conn), Vec::new())?;
    Ok(conn)
}

/// Keeps the descriptors that come with handshake messages.
struct FdTaker<'a> {
    pipe: &'a mut HandshakePipe,
    fds: Vec<OwnedFd>,
}

impl handshake::Pipe for FdTaker<'_> {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError> {
        self.pipe.send_with(message, &[])
    }
    fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
        let packet = self.pipe.recv_packet()?;
        self.fds = packet.fds;
        Ok(packet.bytes)
    }
    fn addr(&self) -> String {
        self.pipe.addr.clone()
    }
}
