//! Whatever bytes a peer sends after the handshake: no panic, no memory beyond a bound.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use mio::Poll;
use proptest::prelude::*;

use super::conn::TcpConn;
use super::frame::{DESC, Desc, HEADER, Header};
use super::rx::{Memory, Rx, Turn};
use crate::base::ConnBase;
use crate::buffer::BufferPool;
use crate::handshake::Peer;
use crate::mem::SharedMem;
use crate::stream::{Host, Linked};
use crate::test_util::{Counting, allocating, config};
use crate::{Access, AsyncOp, ConnId, Connection, RegionKey, RemoteAddr};

/// The region that peers may reach has so many bytes.
const REGION: usize = 64 * 1024;
/// Most memory that a connection needs whatever comes: its buffer, results of a full batch of that region, a message.
const BOUND: usize = 8 * 1024 * 1024;

/// One piece of what comes.
#[derive(Debug, Clone)]
enum Piece {
    Junk(Vec<u8>),
    /// Kind, status, index, length, batch.
    Header(u8, u8, u16, u32, u64),
    /// A batch that may well be right: kind and length of operations, whether the key is right, offset.
    Ops(Vec<(u32, u32, bool, u64)>),
}

fn piece() -> impl Strategy<Value = Piece> {
    let small = prop_oneof![Just(0), Just(1), 0u32..200, any::<u32>()];
    let header = (0u8..5, 0u8..3, 0u16..4, small, 0u64..4);
    let len = prop_oneof![Just(8u32), 0u32..70_000, any::<u32>()];
    let off = prop_oneof![Just(0u64), (0u64..9000).prop_map(|n| n * 8), any::<u64>()];
    let op = (0u32..7, len, prop::bool::weighted(0.9), off);
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Piece::Junk),
        header.prop_map(|(k, s, i, l, b)| Piece::Header(k, s, i, l, b)),
        prop::collection::vec(op, 1..5).prop_map(Piece::Ops),
    ]
}

fn bytes(piece: &Piece, key: RegionKey) -> Vec<u8> {
    match piece {
        Piece::Junk(bytes) => bytes.clone(),
        Piece::Header(kind, status, index, len, batch) => {
            let mut out = vec![*kind, *status];
            out.extend(index.to_le_bytes());
            out.extend(len.to_le_bytes());
            out.extend(batch.to_le_bytes());
            out
        }
        Piece::Ops(ops) => {
            let mut out = Header::ops(1, ops.len()).encode().to_vec();
            let mut data = 0;
            for (kind, len, right, offset) in ops {
                out.extend(kind.to_le_bytes());
                out.extend(len.to_le_bytes());
                for word in [key.0 ^ u64::from(!right), *offset, 1, 2] {
                    out.extend(word.to_le_bytes());
                }
                if *kind == 2 {
                    data += (*len as usize).min(REGION);
                }
            }
            out.resize(out.len() + data, 7);
            out
        }
    }
}

/// Feeds a connection that waits for some results; true if it lives.
fn feed(pieces: &[Piece]) -> bool {
    let poll = Poll::new().unwrap();
    let seen = Arc::new(Counting::default());
    let host = Host::new(
        config("none", "victim"),
        Arc::clone(&seen) as _,
        BufferPool::new(None),
        &poll,
    )
    .unwrap();
    let regions = Memory::default();
    let mem = Arc::new(SharedMem::anonymous(REGION).unwrap());
    let key = regions.add(mem, Access::ALL).unwrap();
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    ours.set_nonblocking(true).unwrap();
    let peer = Peer {
        identity: Vec::new(),
        instance: 1,
        serial: 1,
        alive: Vec::new(),
    };
    let base = ConnBase::new(ConnId(1), peer, true, "fuzz".to_owned());
    let conn = TcpConn::new(base, &host, Arc::new(ours.into()));
    let dynamic: Arc<dyn Connection> = Arc::clone(&conn) as _;
    let at = RemoteAddr { key, offset: 0 };
    let done = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for batch in [
        vec![AsyncOp::Faa { at, add: 1 }],
        vec![
            AsyncOp::Read {
                at,
                into: vec![0; 100].into(),
            },
            AsyncOp::Write {
                at,
                from: vec![0; 20_000].into(),
            },
        ],
        vec![AsyncOp::ReadWords { at, words: 64 }],
    ] {
        let done = Arc::clone(&done);
        conn.submit(
            batch,
            Box::new(move |_| {
                done.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }),
        );
    }
    let mut rx = Rx::new();
    'all: for piece in pieces {
        let all = bytes(piece, key);
        let mut rest = &all[..];
        loop {
            // What the socket does not take is lost, which is as good as anything else.
            let sent = theirs.write(rest).unwrap_or(0);
            rest = &rest[sent..];
            match rx.receive_all(&conn, &dynamic, &*seen, &regions) {
                Ok(Turn::Ended) | Err(_) => break 'all,
                Ok(_) if sent == 0 || rest.is_empty() => break,
                Ok(_) => {}
            }
            let mut sink = [0; 65_536];
            while std::io::Read::read(&mut theirs, &mut sink).is_ok_and(|n| n > 0) {}
            conn.writable();
        }
    }
    let lives = conn.alive();
    conn.close();
    conn.finish();
    assert_eq!(
        done.load(std::sync::atomic::Ordering::SeqCst),
        3,
        "each completion once"
    );
    lives
}

proptest! {
    #[test]
    fn frames(pieces in prop::collection::vec(piece(), 0..12)) {
        let (_lives, most) = allocating(|| feed(&pieces));
        prop_assert!(most < BOUND, "{most} bytes");
    }

    #[test]
    fn headers_and_descriptors(head: [u8; HEADER], desc in prop::collection::vec(any::<u8>(), DESC)) {
        let (_any, most) = allocating(|| {
            let desc: [u8; DESC] = desc[..].try_into().unwrap();
            (Header::decode(&head).is_ok(), Desc::decode(&desc).is_ok())
        });
        prop_assert_eq!(most, 0);
    }
}

#[test]
fn what_is_right_is_carried_out() {
    let write = Piece::Ops(vec![(2, 30_000, true, 8), (1, 60_000, true, 0), (4, 8, true, 0)]);
    assert!(feed(&[write.clone(), Piece::Header(3, 0, 0, 0, 0), write]));
    assert!(!feed(&[Piece::Ops(vec![(1, 8, false, 0)])]));
}
