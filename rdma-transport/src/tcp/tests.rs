//! A peer that holds the key and then misbehaves.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::endpoint::open;
use super::frame::{Desc, DescKind, Header, OK, REFUSED};
use crate::common::LIMITS;
use crate::handshake::{self, Local, Pipe, Provider};
use crate::mem::SharedMem;
use crate::stream::{FramedPipe, prepare};
use crate::test_util::{Counting, Junk, KEY, config, until};
use crate::{Access, AsyncOp, Op, RegionKey, RemoteAddr, TransportError};

fn pipe(stream: &TcpStream) -> FramedPipe {
    let timeout = Duration::from_secs(5);
    prepare(stream, timeout).unwrap();
    let sock = Arc::new(OwnedFd::from(stream.try_clone().unwrap()));
    FramedPipe {
        sock,
        addr: "raw".to_owned(),
        deadline: Instant::now() + timeout,
        timeout,
    }
}

fn local() -> Local {
    Local {
        provider: Provider::Tcp,
        key: KEY.to_vec(),
        identity: b"rogue".to_vec(),
        instance: 99,
    }
}

/// A socket with the handshake behind it.
fn rogue(addr: &str) -> TcpStream {
    let stream = TcpStream::connect(addr).unwrap();
    handshake::client(&mut pipe(&stream), &local(), 1, &|_| Vec::new()).unwrap();
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stream
}

fn desc(kind: DescKind, len: usize, key: u64, offset: u64) -> Vec<u8> {
    let mut out = Header::ops(1, 1).encode().to_vec();
    let at = RemoteAddr {
        key: RegionKey(key),
        offset,
    };
    Desc {
        kind,
        len,
        at,
        a: 0,
        b: 0,
    }
    .encode(&mut out);
    out
}

#[test]
fn garbage_from_a_peer_ends_its_connection_only() {
    let seen = Arc::new(Counting::default());
    let fabric = open(config("127.0.0.1:0", "victim"), Arc::clone(&seen) as _).unwrap();
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    let key = fabric.register(&mem, Access::ALL).unwrap();
    let too_long = Header {
        len: u32::MAX,
        ..Header::message(0)
    };
    let mut misdeeds: Vec<Vec<u8>> = vec![
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec(),
        too_long.encode().to_vec(),
        Header {
            len: 41,
            ..Header::ops(1, 1)
        }
        .encode()
        .to_vec(),
        Header {
            len: 65 * 40,
            ..Header::ops(1, 1)
        }
        .encode()
        .to_vec(),
        Header::result(1, 0, OK, 8).encode().to_vec(),
        Header::result(7, 3, REFUSED, 5).encode().to_vec(),
        desc(DescKind::Read, LIMITS.max_transfer + 1, key.0, 0),
        desc(DescKind::Cas, 8, key.0, 4),
        desc(DescKind::Words, 520, key.0, 0),
        desc(DescKind::Write, 8192, key.0, 0),
        desc(DescKind::Write, 8, key.0, u64::MAX),
        desc(DescKind::Read, 8, 1, 0),
        Vec::new(),
        Header::message(1000).encode().to_vec(),
        desc(DescKind::Write, 4096, key.0, 0),
    ];
    let mut junk = Junk(1);
    for n in 0..40usize {
        misdeeds.push(junk.bytes(1 + n * n * 10));
    }
    for (n, bytes) in misdeeds.iter().enumerate() {
        let mut stream = rogue(&fabric.local_addr());
        // The other side may hang up in the middle.
        let _gone = stream.write_all(bytes);
        let _gone = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _reset = stream.read_to_end(&mut rest);
        assert!(rest.len() < 1000);
        until("end", || seen.ended.lock().len() == n + 1);
    }
    assert_eq!(seen.connected.load(Ordering::SeqCst) as usize, misdeeds.len());
    assert_eq!(seen.messages.load(Ordering::SeqCst), 0);
    let conn = fabric.connect(&fabric.local_addr()).unwrap();
    let at = RemoteAddr { key, offset: 0 };
    conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap();
}

/// Connects to a rogue that answers operations with `answer`.
fn answered(answer: &[u8], hang: bool) -> (TransportError, TransportError) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let answer = answer.to_vec();
    let (end, over) = std::sync::mpsc::channel();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut pipe = pipe(&stream);
        let verified = handshake::server(&mut pipe, &local(), &|_| Ok(())).unwrap();
        pipe.send(&verified.welcome).unwrap();
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        // The beginning of the request, then the answer, long before all of it has come.
        let mut some = [0; 16];
        stream.read_exact(&mut some).unwrap();
        let _gone = stream.write_all(&answer);
        if !hang {
            let _gone = stream.shutdown(std::net::Shutdown::Write);
        }
        // The connection stays until the other side has had its errors.
        let _over = over.recv_timeout(Duration::from_secs(5));
    });
    let seen = Arc::new(Counting::default());
    let fabric = open(config("127.0.0.1:0", "victim"), Arc::clone(&seen) as _).unwrap();
    let conn = fabric.connect(&addr).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let at = RemoteAddr {
        key: RegionKey(1),
        offset: 0,
    };
    // Lent for sending and for receiving.
    let (big, mut into) = (vec![1u8; 16 << 20], vec![0u8; 1 << 20]);
    let error = conn
        .execute(&mut [Op::Write { at, from: &big }, Op::Read { at, into: &mut into }])
        .unwrap_err();
    drop((big, into));
    conn.submit(
        vec![AsyncOp::Faa { at, add: 1 }],
        Box::new(move |r| tell.send(r.unwrap_err().why).unwrap()),
    );
    let second = told.recv_timeout(Duration::from_secs(5)).unwrap();
    until("end", || seen.ended.lock().len() == 1);
    end.send(()).unwrap();
    server.join().unwrap();
    (error, second)
}

#[test]
fn garbage_as_results_is_an_error_for_the_caller() {
    let result = |batch, index, status, len: usize, body: usize| {
        let mut out = Header::result(batch, index, status, len).encode().to_vec();
        out.resize(out.len() + body, b'x');
        out
    };
    let mut early = result(1, 0, OK, 0, 0);
    early.extend(result(1, 1, OK, 1 << 20, 1 << 20));
    let answers = [
        Vec::new(),
        b"nonsense, more than sixteen bytes of it".to_vec(),
        result(2, 0, OK, 0, 0),
        result(1, 1, OK, 0, 0),
        result(1, 0, OK, 8, 8),
        result(1, 0, REFUSED, 2000, 0),
        result(1, 0, OK, 0, 0),
        early,
    ];
    for answer in answers {
        let (first, second) = answered(&answer, false);
        assert!(
            matches!(
                first,
                TransportError::Disconnected { .. } | TransportError::Protocol { .. }
            ),
            "{first:?}"
        );
        assert!(
            matches!(second, TransportError::Disconnected { .. }),
            "{second:?}"
        );
    }
    let (first, _) = answered(&result(1, 0, REFUSED, 5, 5), true);
    assert!(
        matches!(first, TransportError::RemoteAccess { ref reason, .. } if reason == "xxxxx"),
        "{first:?}"
    );
}
