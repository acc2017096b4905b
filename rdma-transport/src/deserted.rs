//! Finding out that a process has ended, without its doing.

use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::FabricKind;

/// Longest wait for an answer: one that is certain comes from the host's kernel, at once.
const PATIENCE: Duration = Duration::from_millis(500);

/// Is it certain that no process has an endpoint at this address any more? Its host must say so itself: one that is silent, or
/// cannot be reached, may have a process that goes on. A process that is merely stopped keeps its endpoint.
#[must_use]
pub fn is_deserted(kind: FabricKind, addr: &str) -> bool {
    match kind {
        FabricKind::Shm => {
            // The kernel gives the lock back when its holder ends, however that happens.
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            match rustix::fs::open(format!("{addr}.lock"), flags, Mode::empty()) {
                Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
                Err(error) => error == rustix::io::Errno::NOENT,
            }
        }
        FabricKind::Tcp | FabricKind::Verbs => {
            let mut addresses = addr.to_socket_addrs().into_iter().flatten().peekable();
            addresses.peek().is_some()
                && addresses.all(|address| {
                    TcpStream::connect_timeout(&address, PATIENCE)
                        .is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused)
                })
        }
        FabricKind::Sim => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_that_is_there_is_not_deserted() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        assert!(!is_deserted(FabricKind::Tcp, &addr));
        drop(listener);
        assert!(is_deserted(FabricKind::Tcp, &addr));
        // Nobody says anything for these.
        for addr in ["no.such.host.invalid:1", "nonsense"] {
            assert!(!is_deserted(FabricKind::Tcp, addr), "{addr}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.sock").display().to_string();
        assert!(is_deserted(FabricKind::Shm, &path));
        let lock = std::fs::File::create(format!("{path}.lock")).unwrap();
        lock.lock().unwrap();
        assert!(!is_deserted(FabricKind::Shm, &path));
        drop(lock);
        assert!(is_deserted(FabricKind::Shm, &path));
    }
}
