//! The listener of an endpoint.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use parking_lot::Mutex;
use rustix::net::Shutdown;

use super::socket;
use crate::error::TransportError;

pub(crate) struct Listening {
    /// None: shut down.
    listener: Mutex<Option<TcpListener>>,
    addr: SocketAddr,
}

impl Listening {
    /// Listens on `host:port`.
    pub(crate) fn on(on: &str) -> Result<Self, TransportError> {
        let (listener, addr) = socket::listen(on)?;
        Ok(Self {
            listener: Mutex::new(Some(listener)),
            addr,
        })
    }

    /// With the real port.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(super) fn watch(&self, registry: &Registry, token: Token) -> Result<(), TransportError> {
        match &*self.listener.lock() {
            Some(listener) => registry
                .register(&mut SourceFd(&listener.as_raw_fd()), token, Interest::READABLE)
                .map_err(|e| TransportError::os("watch the listener", &e)),
            None => Ok(()),
        }
    }

    /// Takes everybody who waits. False if that failed: events are edges, so it must be tried again.
    pub(super) fn accept(&self, mut take: impl FnMut(TcpStream)) -> bool {
        let listener = self.listener.lock();
        let Some(listener) = &*listener else { return true };
        loop {
            match listener.accept() {
                Ok((stream, _)) => take(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(e) => {
                    // Out of descriptors, most likely; without a pause this would spin.
                    tracing::error!("accept a connection: {e}");
                    std::thread::sleep(Duration::from_millis(10));
                    return false;
                }
            }
        }
    }

    pub(super) fn close(&self) {
        if let Some(listener) = self.listener.lock().take() {
            // Closing alone would not do while a child that has not yet executed its program holds a copy.
            let _freed = rustix::net::shutdown(&listener, Shutdown::Both);
        }
    }
}
