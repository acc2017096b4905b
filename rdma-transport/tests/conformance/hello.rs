//! Who gets in, and what happens to the others.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rdma_transport::{FabricConfig, FabricKind, TransportError};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use crate::world::{KEY, World, faa};

pub fn identities(world: &World) {
    let (target, source, conn, back) = world.pair();
    assert_eq!(conn.peer_identity(), b"target");
    assert_eq!(back.peer_identity(), b"source");
    assert!(!conn.peer_addr().is_empty() && !back.peer_addr().is_empty());
    source.fabric.set_identity(b"renamed".to_vec());
    target.fabric.set_identity(vec![9; 1024]);
    let again = source.fabric.connect(&target.fabric.local_addr()).unwrap();
    assert_eq!(again.peer_identity(), [9; 1024]);
    world.until("connected", || target.seen.connected.lock().len() == 2);
    assert_eq!(target.seen.connected.lock()[1].peer_identity(), b"renamed");
}

pub fn useless_configurations(world: &World) {
    for config in [
        FabricConfig {
            key: b"short".to_vec(),
            ..world.config("a")
        },
        FabricConfig {
            identity: vec![0; 1025],
            ..world.config("b")
        },
    ] {
        assert!(matches!(world.try_open(config), Err(TransportError::Invalid(_))));
    }
}

pub fn wrong_key(world: &World) {
    let target = world.endpoint("target");
    let config = FabricConfig {
        key: b"another key of some length".to_vec(),
        ..world.config("thief")
    };
    let thief = world.try_open(config).unwrap();
    for _ in 0..3 {
        let error = thief.fabric.connect(&target.fabric.local_addr()).err();
        assert!(
            matches!(error, Some(TransportError::WrongKey { .. })),
            "{error:?}"
        );
    }
    world.until("counted", || target.fabric.stats().wrong_keys == 3);
    world.settle();
    assert!(target.seen.connected.lock().is_empty() && target.seen.ended.lock().is_empty());
    // And the other way round.
    assert!(matches!(
        target.fabric.connect(&thief.fabric.local_addr()).err(),
        Some(TransportError::WrongKey { .. })
    ));
}

pub fn refused(world: &World) {
    let (target, source) = (world.endpoint("target"), world.endpoint("source"));
    *target.seen.refuse.lock() = Some("node 9 was evicted".to_owned());
    match source.fabric.connect(&target.fabric.local_addr()) {
        Err(TransportError::Refused { reason, .. }) => assert_eq!(reason, "node 9 was evicted"),
        other => panic!("{:?}", other.err()),
    }
    world.settle();
    assert!(target.seen.connected.lock().is_empty() && source.seen.ended.lock().is_empty());
    *target.seen.refuse.lock() = None;
    source.fabric.connect(&target.fabric.local_addr()).unwrap();
}

pub fn unreachable(world: &World) {
    let source = world.endpoint("source");
    let nowhere = match world.kind {
        FabricKind::Tcp | FabricKind::Verbs => "127.0.0.1:1".to_owned(),
        _ => world.name("nobody"),
    };
    let error = source.fabric.connect(&nowhere).err();
    assert!(
        matches!(error, Some(TransportError::Unreachable { .. })),
        "{error:?}"
    );
}

pub fn address_in_use(world: &World) {
    let first = world.endpoint("first");
    let config = || FabricConfig {
        listen: first.fabric.local_addr(),
        ..world.config("second")
    };
    let error = world.try_open(config()).err();
    assert!(
        error.as_ref().is_some_and(|e| e.to_string().contains("in use")),
        "{error:?}"
    );
    first.fabric.shutdown();
    let second = world.try_open(config()).unwrap();
    second.fabric.connect(&second.fabric.local_addr()).unwrap();
}

/// A connection below the protocol.
pub enum Raw {
    Stream(TcpStream),
    Packets(OwnedFd),
}

impl Raw {
    pub fn connect(world: &World, addr: &str) -> Self {
        if world.over_tcp() {
            return Self::Stream(TcpStream::connect(addr).unwrap());
        }
        let sock = packets();
        rustix::net::connect(&sock, &SocketAddrUnix::new(addr).unwrap()).unwrap();
        Self::Packets(sock)
    }

    /// Sends a handshake message.
    fn send(&mut self, message: &[u8]) {
        if let Self::Stream(stream) = self {
            stream.write_all(&(message.len() as u32).to_le_bytes()).unwrap();
        }
        // The listener may have hung up already.
        let _gone = self.send_bytes(message);
    }

    fn send_bytes(&mut self, bytes: &[u8]) -> bool {
        match self {
            Self::Stream(stream) => stream.write_all(bytes).is_ok(),
            Self::Packets(sock) => rustix::net::send(sock, bytes, SendFlags::NOSIGNAL).is_ok(),
        }
    }

    /// Receives a handshake message; None at the end.
    fn recv(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Stream(stream) => {
                let mut len = [0; 4];
                stream.read_exact(&mut len).ok()?;
                let mut message = vec![0; u32::from_le_bytes(len) as usize];
                stream.read_exact(&mut message).ok()?;
                Some(message)
            }
            Self::Packets(sock) => {
                let mut message = vec![0; 8192];
                let (n, _) = rustix::net::recv(sock, &mut message[..], RecvFlags::empty()).ok()?;
                message.truncate(n);
                (n > 0).then_some(message)
            }
        }
    }
}

fn packets() -> OwnedFd {
    rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
    .unwrap()
}

fn greeting(world: &World, version: u32) -> Vec<u8> {
    let mut hello = b"DISTFUSE".to_vec();
    hello.extend_from_slice(&version.to_le_bytes());
    hello.push(world.number());
    hello.extend_from_slice(&[7; 32]);
    hello
}

pub fn wrong_version(world: &World) {
    // A stranger connects to us: it is told our version, and let go.
    let target = world.endpoint("target");
    let mut raw = Raw::connect(world, &target.fabric.local_addr());
    raw.send(&greeting(world, 99));
    let answer = raw.recv().unwrap();
    assert_eq!(answer[..12], greeting(world, 2)[..12]);
    assert!(raw.recv().is_none());
    world.until("counted", || target.fabric.stats().failed_handshakes == 1);
    // We connect to a stranger.
    let listen = world.name("stranger");
    let challenge = {
        let mut c = b"DISTFUSE".to_vec();
        c.extend_from_slice(&99u32.to_le_bytes());
        c
    };
    let (addr, serve): (String, Box<dyn FnOnce() + Send>) = if world.over_tcp() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        (
            addr,
            Box::new(move || {
                let mut raw = Raw::Stream(listener.accept().unwrap().0);
                raw.recv().unwrap();
                raw.send(&challenge);
            }),
        )
    } else {
        let sock = packets();
        rustix::net::bind(&sock, &SocketAddrUnix::new(&*listen).unwrap()).unwrap();
        rustix::net::listen(&sock, 1).unwrap();
        (
            listen,
            Box::new(move || {
                let mut raw = Raw::Packets(rustix::net::accept(&sock).unwrap());
                raw.recv().unwrap();
                raw.send(&challenge);
            }),
        )
    };
    let stranger = std::thread::spawn(serve);
    match target.fabric.connect(&addr) {
        Err(TransportError::VersionMismatch { ours, theirs, .. }) => assert_eq!((ours, theirs), (2, 99)),
        other => panic!("{:?}", other.err()),
    }
    stranger.join().unwrap();
}

pub fn garbage_and_half_greetings(world: &World) {
    let target = world
        .try_open(FabricConfig {
            timeout: Duration::from_millis(500),
            ..world.config("t")
        })
        .unwrap();
    let addr = target.fabric.local_addr();
    let good = greeting(world, 1);
    let mut random = 12345u64;
    let mut attempts = 0;
    for n in 0..60usize {
        let mut raw = Raw::connect(world, &addr);
        attempts += 1;
        match n % 6 {
            0 => raw.send(&good[..n % good.len()]),
            1 => {
                let junk: Vec<u8> = (0..n * 50 + 1)
                    .map(|_| {
                        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        (random >> 56) as u8
                    })
                    .collect();
                raw.send_bytes(&junk);
            }
            2 => {
                // A true greeting, then a proof of nothing.
                raw.send(&good);
                raw.recv().unwrap();
                raw.send(&vec![n as u8; n * 3]);
                raw.recv();
            }
            3 => {
                let mut other = good.clone();
                other[12] = 9;
                raw.send(&other);
            }
            // Gone at once; gone after the greeting.
            4 => {}
            _ => raw.send(&good),
        }
        drop(raw);
    }
    world.until("all turned away", || {
        let stats = target.fabric.stats();
        stats.failed_handshakes + stats.wrong_keys == attempts
    });
    assert!(target.seen.connected.lock().is_empty());
    // The listener is as before.
    let source = world.endpoint("source");
    let (_mem, at) = target.memory(4096);
    faa(&*source.fabric.connect(&addr).unwrap(), at, 1).unwrap();
    assert_eq!(KEY.len(), 32, "the key is long enough to be one");
}

pub fn slow_greeting_blocks_nobody(world: &World) {
    let target = world.endpoint("target");
    let source = world.endpoint("source");
    let addr = target.fabric.local_addr();
    // More than there are threads for handshakes; they say nothing, or half of something.
    let idle: Vec<Raw> = (0..100)
        .map(|n| {
            let mut raw = Raw::connect(world, &addr);
            if n % 2 == 0 && world.over_tcp() {
                raw.send_bytes(&greeting(world, 1)[..5]);
            }
            raw
        })
        .collect();
    let start = Instant::now();
    for _ in 0..5 {
        source.fabric.connect(&addr).unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    drop(idle);
}
