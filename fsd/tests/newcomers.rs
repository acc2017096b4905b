//! Whom the metadata server lets in: a real server, and peers that say what no release of ours would.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use fsd_client::session::net::{JoinError, Net, NetConfig, Patience};
use fsd_client::session::workers::Workers;
use fsd_meta::MetaServer;
use fsd_node::config::Config;
use fsd_node::endpoint::Endpoint;
use fsd_proto::clock::{Skew, Verdict};
use fsd_proto::rpc::{Errno, Responder, RpcError, Service};
use fsd_proto::wire::{Hello, JoinReply, MetaReply, MetaRequest, PROTOCOL, Role, Time, decode};
use rdma_transport::TransportError;

const KEY: &[u8] = b"a key of the tests, long enough";
const SECOND: i64 = 1_000_000_000;

struct Nobody;

impl Service for Nobody {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Err("nothing is served here".into())
    }
    fn request(&self, _: &Hello, _: &[u8], _: Responder) {}
}

struct World {
    config: Config,
    server: MetaServer,
    dir: tempfile::TempDir,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    // The store has the same number in all tests, so the memory must be each one's own.
    let text = format!(
        "cluster = \"test\"\nkey_file = \"key\"\nfabric = \"shm\"\n\
         [meta]\nlisten = \"meta.sock\"\ndir = \"meta\"\nmemory_dir = \"{}\"\n\
         [[storage]]\nid = 0\nlisten = \"storage.sock\"\ndir = \"storage\"\npool = \"8MiB\"\n",
        dir.path().display()
    );
    let path = dir.path().join("cluster.toml");
    std::fs::write(&path, text).unwrap();
    let config = Config::load(&path).unwrap();
    fsd_meta::server::format(&config, "uuid").unwrap();
    let server = MetaServer::start(&config, KEY.to_vec(), false).unwrap();
    World { config, server, dir }
}

impl World {
    fn peer(&self, name: &str) -> Endpoint {
        let listen = self.dir.path().join(name).to_str().unwrap().to_owned();
        Endpoint::open(
            &self.config,
            Role::Client(None),
            listen,
            KEY.to_vec(),
            Arc::new(Nobody),
        )
        .unwrap()
    }

    fn join(&self, name: &str, skew: Skew) -> Result<MetaReply, RpcError> {
        let peer = self.peer(name);
        let conn = peer.fabric.connect(&self.server.addr()).unwrap();
        let request = MetaRequest::Join {
            again: None,
            life: peer.life,
            listen: peer.fabric.local_addr(),
            name: name.to_owned(),
            skew,
            locks: Vec::new(),
            durable: 0,
        };
        let reply = peer.calls.call(&conn, &request, Duration::from_secs(10));
        peer.fabric.shutdown();
        reply
    }
}

#[test]
fn clocks_apart() {
    let seconds = |least: i64, most: i64| Skew {
        least: least * SECOND,
        most: most * SECOND,
    };
    // The last two are of a host that is too busy to tell: it may be right.
    for (least, most) in [(-1, 1), (0, 5), (-5, 0)] {
        // A world of its own for each: they leave without a word, and others would have to wait for them.
        let world = world();
        let joined = world.join("right", seconds(least, most)).unwrap();
        assert!(matches!(joined, MetaReply::Joined(_)), "{joined:?}");
        world.server.stop().unwrap();
    }
    let world = world();
    for (i, off) in [-3600, -60, 60, 3600].into_iter().enumerate() {
        let refused = world.join(&format!("off{i}"), seconds(off, off + 1));
        assert!(
            matches!(refused, Err(RpcError::Errno(Errno(libc::ETIME)))),
            "{off} s off: {refused:?}"
        );
    }
    world.server.stop().unwrap();
}

/// A metadata server of which only the joining works, with a clock of its own, and slow to answer at first.
struct Slow {
    ahead: Duration,
    slow: usize,
    asked: AtomicUsize,
}

impl Service for Slow {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Ok(())
    }
    fn request(&self, _: &Hello, body: &[u8], responder: Responder) {
        let reply = match decode::<MetaRequest>(body).unwrap() {
            MetaRequest::Clock => {
                let late = self.asked.fetch_add(1, Ordering::SeqCst) < self.slow;
                std::thread::sleep(Duration::from_millis(if late { 2500 } else { 0 }));
                let clock = Time(Time::now().0 + self.ahead.as_nanos() as i64);
                std::thread::sleep(Duration::from_millis(if late { 100 } else { 0 }));
                Ok(MetaReply::Clock(clock))
            }
            MetaRequest::Join { skew, .. } if skew.verdict() == Verdict::Apart => Err(Errno(libc::ETIME)),
            MetaRequest::Join { .. } => Ok(MetaReply::Joined(JoinReply {
                node: 0,
                incarnation: 0,
                epoch: 0,
                terms: fsd_proto::wire::Terms {
                    term_ms: 10_000,
                    margin_ms: 2_000,
                    heartbeat_ms: 1_000,
                },
                record_bytes: 64,
                storage: Vec::new(),
                executed: 0,
                durable: 0,
                awaited: false,
            })),
            _ => Ok(MetaReply::Done),
        };
        responder.reply(&reply);
    }
}

/// What a mount finds out by itself that joins where the first answers are so slow; and how often it asked.
fn join_slow(ahead: Duration, slow: usize) -> (Result<JoinReply, JoinError>, usize) {
    let world = world();
    let service = Arc::new(Slow {
        ahead,
        slow,
        asked: AtomicUsize::new(0),
    });
    let path = |name: &str| world.dir.path().join(name).to_str().unwrap().to_owned();
    let server = Endpoint::open(
        &world.config,
        Role::Meta,
        path("slow"),
        KEY.to_vec(),
        Arc::clone(&service) as Arc<dyn Service>,
    )
    .unwrap();
    let peer = world.peer("mount");
    let config = NetConfig {
        cluster: "test".into(),
        meta_addr: server.fabric.local_addr(),
        patience: Patience::new(Duration::from_secs(10), None),
        name: "slow".into(),
    };
    let joined = Net::new(config, &peer, Workers::new("test", 4))
        .join()
        .map(|joined| joined.reply);
    peer.fabric.shutdown();
    server.fabric.shutdown();
    world.server.stop().unwrap();
    (joined, service.asked.load(Ordering::SeqCst))
}

#[test]
fn a_slow_answer_is_no_wrong_clock() {
    let (joined, asked) = join_slow(Duration::ZERO, 1);
    assert!(joined.is_ok(), "{joined:?}");
    assert_eq!(asked, 2);
}

#[test]
fn a_server_that_is_slow_for_good_is_joined() {
    let (joined, asked) = join_slow(Duration::ZERO, usize::MAX);
    assert!(joined.is_ok(), "{joined:?}");
    assert!((2..=5).contains(&asked), "{asked}");
}

#[test]
fn a_slow_answer_does_not_hide_a_wrong_clock() {
    match join_slow(Duration::from_secs(10), usize::MAX) {
        (Err(JoinError::Clocks(skew)), 1) => assert!(skew.to_string().ends_with("behind"), "{skew}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn another_protocol_version() {
    let world = world();
    let peer = world.peer("older");
    for protocol in [PROTOCOL - 1, PROTOCOL + 1] {
        let hello = Hello {
            protocol,
            ..Hello::new("test", Role::Client(None), peer.life)
        };
        peer.fabric.set_identity(hello.encode());
        match peer.fabric.connect(&world.server.addr()) {
            Err(TransportError::Refused { reason, .. }) => {
                let versions =
                    reason.contains(&protocol.to_string()) && reason.contains(&PROTOCOL.to_string());
                assert!(versions && reason.contains("same release"), "{reason}");
            }
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("version {protocol} was let in"),
        }
    }
    peer.fabric
        .set_identity(Hello::new("test", Role::Client(None), peer.life).encode());
    assert!(peer.fabric.connect(&world.server.addr()).is_ok());
    peer.fabric.shutdown();
    world.server.stop().unwrap();
}
