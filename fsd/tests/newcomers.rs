//! Whom the metadata server lets in: a real server, and peers that say what no release of ours would.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::time::Duration;

use fsd::config::Config;
use fsd::endpoint::Endpoint;
use fsd::meta::MetaServer;
use fsd::rpc::{Errno, Responder, RpcError, Service};
use fsd::wire::{Hello, MetaReply, MetaRequest, PROTOCOL, Role, Time};
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
    let text = "cluster = \"test\"\nkey_file = \"key\"\nfabric = \"shm\"\n\
                [meta]\nlisten = \"meta.sock\"\ndir = \"meta\"\n\
                [[storage]]\nid = 0\nlisten = \"storage.sock\"\ndir = \"storage\"\npool = \"8MiB\"\n";
    let path = dir.path().join("cluster.toml");
    std::fs::write(&path, text).unwrap();
    let config = Config::load(&path).unwrap();
    fsd::meta::server::format(&config, "uuid").unwrap();
    let server = MetaServer::start(&config, KEY.to_vec()).unwrap();
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

    fn join(&self, name: &str, now: Time) -> Result<MetaReply, RpcError> {
        let peer = self.peer(name);
        let conn = peer.fabric.connect(&self.server.addr()).unwrap();
        let request = MetaRequest::Join {
            again: None,
            life: peer.life,
            listen: peer.fabric.local_addr(),
            name: name.to_owned(),
            now,
            locks: Vec::new(),
        };
        let reply = peer.calls.call(&conn, &request, Duration::from_secs(10));
        peer.fabric.shutdown();
        reply
    }
}

#[test]
fn clocks_apart() {
    let world = world();
    let joined = world.join("right", Time::now()).unwrap();
    assert!(matches!(joined, MetaReply::Joined(_)), "{joined:?}");
    for (i, off) in [-3600, -60, 60, 3600].into_iter().enumerate() {
        let refused = world.join(&format!("off{i}"), Time(Time::now().0 + off * SECOND));
        assert!(
            matches!(refused, Err(RpcError::Errno(Errno(libc::ETIME)))),
            "{off} s off: {refused:?}"
        );
    }
    world.server.stop().unwrap();
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
