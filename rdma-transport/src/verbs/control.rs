//! The TCP stream of a connection after the handshake: control frames, and the sign that the peer is there.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::wire::{CONTROL, Control};

/// Most bytes that wait for a peer that does not read.
const UNREAD: usize = 1024 * 1024;

/// What a read has found.
pub(super) enum Read {
    Frames(Vec<Control>),
    /// Nothing now.
    Nothing,
    /// The peer has hung up, is gone, or says nonsense.
    Ended(String),
    Malformed,
}

pub(super) struct Stream {
    pub(super) sock: Arc<OwnedFd>,
    out: Mutex<Vec<u8>>,
    incoming: Mutex<Vec<u8>>,
}

impl Stream {
    pub(super) fn new(sock: Arc<OwnedFd>) -> Self {
        Self {
            sock,
            out: Mutex::default(),
            incoming: Mutex::default(),
        }
    }

    pub(super) fn send(&self, frame: &Control) -> std::io::Result<()> {
        let mut out = self.out.lock();
        if out.len() > UNREAD {
            return Err(std::io::Error::other("the peer asks for more than it takes"));
        }
        out.extend_from_slice(&frame.encode());
        self.flush_locked(&mut out)
    }

    /// Sends what the socket did not take before.
    pub(super) fn flush(&self) -> std::io::Result<()> {
        self.flush_locked(&mut self.out.lock())
    }

    fn flush_locked(&self, out: &mut Vec<u8>) -> std::io::Result<()> {
        while !out.is_empty() {
            match rustix::net::send(&*self.sock, out, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
                Ok(n) => drop(out.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Reads what there is; to be called until there is nothing.
    pub(super) fn read(&self) -> Read {
        let mut bytes = [0; 4096];
        match rustix::net::recv(&*self.sock, &mut bytes, RecvFlags::DONTWAIT) {
            Ok((0, _)) => Read::Ended("the peer has gone".to_owned()),
            Ok((n, _)) => {
                let mut incoming = self.incoming.lock();
                incoming.extend_from_slice(&bytes[..n]);
                let (frames, rest) = incoming.as_chunks::<CONTROL>();
                let decoded: Option<Vec<Control>> = frames.iter().map(Control::decode).collect();
                let rest = rest.to_vec();
                *incoming = rest;
                decoded.map_or(Read::Malformed, Read::Frames)
            }
            Err(Errno::AGAIN) => Read::Nothing,
            Err(Errno::INTR) => Read::Frames(Vec::new()),
            Err(e) => Read::Ended(format!("the peer has gone: {e}")),
        }
    }

    /// Hangs up.
    pub(super) fn close(&self) {
        // Already gone: fine.
        let _gone = rustix::net::shutdown(&*self.sock, Shutdown::Both);
    }
}
