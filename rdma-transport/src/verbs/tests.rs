//! Peers that hold the key and misbehave, and what a device refuses; on an RDMA device.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::endpoint::open;
use super::wire::{CONTROL, Control, FRAGMENT, Info};
use crate::handshake::{self, Local, Pipe, Provider};
use crate::mem::SharedMem;
use crate::stream::{FramedPipe, prepare};
use crate::test_util::{Counting, Junk, KEY, config, until};
use crate::{Access, Fabric, Op, RemoteAddr, TransportError, VerbsOptions};

fn listen() -> String {
    let ip = std::env::var("LAB_IP").unwrap_or_else(|_| "127.0.0.1".to_owned());
    format!("{ip}:0")
}

fn endpoint(name: &str) -> (Arc<dyn Fabric>, Arc<Counting>) {
    let seen = Arc::new(Counting::default());
    let options = VerbsOptions::default().with_env().unwrap();
    let fabric = open(config(&listen(), name), &options, Arc::clone(&seen) as _).unwrap();
    (fabric, seen)
}

/// A stream with the handshake behind it.
fn rogue(addr: &str) -> (TcpStream, FramedPipe) {
    let timeout = Duration::from_secs(5);
    let stream = TcpStream::connect(addr).unwrap();
    prepare(&stream, timeout).unwrap();
    let mut pipe = FramedPipe {
        sock: Arc::new(OwnedFd::from(stream.try_clone().unwrap())),
        addr: "raw".to_owned(),
        deadline: Instant::now() + timeout,
        timeout,
    };
    let local = Local {
        provider: Provider::Verbs,
        key: KEY.to_vec(),
        identity: b"rogue".to_vec(),
        instance: 99,
    };
    handshake::client(&mut pipe, &local, 1, &|_| vec![1; 100]).unwrap();
    (stream, pipe)
}

fn info() -> Info {
    let mut gid = [0; 16];
    gid[10..].copy_from_slice(&[0xff, 0xff, 10, 77, 0, 1]);
    Info {
        gid,
        qpn: 99_999,
        psn: 1,
        credits: 28,
        fragment: FRAGMENT as u32,
        lid: 0,
        mtu: 3,
        ethernet: true,
        rd_atomic: 1,
        rd_atomic_source: 1,
    }
}

/// The endpoint is as before.
fn works(fabric: &Arc<dyn Fabric>) {
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    let at = RemoteAddr {
        key: fabric.register(&mem, Access::ALL).unwrap(),
        offset: 0,
    };
    let conn = fabric.connect(&fabric.local_addr()).unwrap();
    conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap();
    conn.close();
}

#[test]
#[ignore = "needs an RDMA device: make lab"]
fn bad_queue_pair_data_is_turned_away() {
    let (fabric, seen) = endpoint("victim");
    let mut junk = Junk(3);
    let mut misdeeds = vec![
        Vec::new(),
        b"sorry: no device".to_vec(),
        Info {
            fragment: 1,
            ..info()
        }
        .encode(),
        Info {
            ethernet: false,
            ..info()
        }
        .encode(),
        Info {
            credits: u32::MAX,
            ..info()
        }
        .encode(),
    ];
    misdeeds.extend((0..20).map(|n| junk.bytes(n * 3)));
    for said in &misdeeds {
        let (_stream, mut pipe) = rogue(&fabric.local_addr());
        pipe.send(said).unwrap();
        assert!(pipe.recv().is_err(), "{said:?}");
    }
    // Queue-pair data that will do, and then no word that all is well.
    let (_stream, mut pipe) = rogue(&fabric.local_addr());
    pipe.send(&info().encode()).unwrap();
    pipe.recv().unwrap();
    pipe.send(b"redy?").unwrap();
    assert!(pipe.recv().is_err());
    until("counted", || {
        fabric.stats().failed_handshakes == misdeeds.len() as u64 + 1
    });
    assert_eq!(seen.connected.load(Ordering::SeqCst), 0);
    works(&fabric);
}

#[test]
#[ignore = "needs an RDMA device: make lab"]
fn garbage_on_the_stream_ends_its_connection_only() {
    let (fabric, seen) = endpoint("victim");
    let mut junk = Junk(5);
    let mut misdeeds = vec![
        vec![0; CONTROL],
        b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n".to_vec(),
    ];
    misdeeds.extend((0..10).map(|n| junk.bytes(CONTROL * (n + 1))));
    // Half of a frame, answers that nobody asked for: harmless, until the peer hangs up.
    misdeeds.push(vec![1; 5]);
    misdeeds.push(Control::Nowhere(7).encode().to_vec());
    // More questions than answers are taken.
    misdeeds.push(Control::Where(7).encode().repeat(400_000));
    for (n, said) in misdeeds.iter().enumerate() {
        let (mut stream, mut pipe) = rogue(&fabric.local_addr());
        pipe.send(&info().encode()).unwrap();
        assert!(Info::decode(&pipe.recv().unwrap()).is_some());
        pipe.send(b"ready").unwrap();
        stream.set_nonblocking(false).unwrap();
        stream
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        // The other side may hang up in the middle, or take no more.
        let _gone = stream.write_all(said);
        let _gone = stream.shutdown(std::net::Shutdown::Write);
        until("end", || seen.ended.lock().len() == n + 1);
        let mut rest = Vec::new();
        let _reset = stream.read_to_end(&mut rest);
    }
    assert_eq!(seen.messages.load(Ordering::SeqCst), 0);
    works(&fabric);
}

#[test]
#[ignore = "needs an RDMA device: make lab"]
fn what_is_not_there_cannot_be_chosen() {
    let open_with = |options: VerbsOptions| {
        let seen = Arc::new(Counting::default());
        open(config(&listen(), "chooser"), &options, seen).err().unwrap()
    };
    for (options, part) in [
        (
            VerbsOptions {
                device: Some("nosuch0".to_owned()),
                ..VerbsOptions::default()
            },
            "nosuch0",
        ),
        (
            VerbsOptions {
                port: Some(9),
                ..VerbsOptions::default()
            },
            "port 9",
        ),
        (
            VerbsOptions {
                gid_index: Some(200),
                ..VerbsOptions::default()
            },
            "200",
        ),
    ] {
        let error = open_with(options);
        assert!(matches!(error, TransportError::Os { .. }), "{error:?}");
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// A peer that does not answer at all: its queue pair has never existed.
#[test]
#[ignore = "needs an RDMA device: make lab"]
fn a_peer_that_does_not_acknowledge_is_given_up() {
    let seen = Arc::new(Counting::default());
    let options = VerbsOptions {
        timeout: 12,
        retry: 2,
        ..VerbsOptions::default().with_env().unwrap()
    };
    let fabric = open(config(&listen(), "patient"), &options, Arc::clone(&seen) as _).unwrap();
    let (_stream, mut pipe) = rogue(&fabric.local_addr());
    pipe.send(&info().encode()).unwrap();
    pipe.recv().unwrap();
    pipe.send(b"ready").unwrap();
    until("connected", || seen.connected.load(Ordering::SeqCst) == 1);
    let conn = seen.conns.lock()[0].clone();
    let start = Instant::now();
    let error = loop {
        if let Err(e) = conn.send(&[1; 100]) {
            break e;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    assert!(matches!(error, TransportError::Disconnected { .. }), "{error:?}");
    assert!(error.to_string().contains("retry"), "{error}");
    until("end", || seen.ended.lock().len() == 1);
    works(&fabric);
}

#[test]
#[ignore = "needs an RDMA device: make lab"]
fn a_low_limit_of_locked_memory_is_explained() {
    let (fabric, _seen) = endpoint("limited");
    let mem = Arc::new(SharedMem::anonymous(16 << 20).unwrap());
    let before = getrlimit(Resource::Memlock);
    let caps = rustix::thread::capabilities(None).unwrap();
    let mut fewer = caps;
    // With it there is no limit.
    fewer.effective.remove(rustix::thread::CapabilitySet::IPC_LOCK);
    let low = Rlimit {
        current: Some(64 << 10),
        ..before
    };
    setrlimit(Resource::Memlock, low).unwrap();
    rustix::thread::set_capabilities(None, fewer).unwrap();
    let result = fabric.register(&mem, Access::ALL);
    rustix::thread::set_capabilities(None, caps).unwrap();
    setrlimit(Resource::Memlock, before).unwrap();
    let error = result.err().unwrap();
    assert!(matches!(error, TransportError::Os { .. }), "{error:?}");
    let text = error.to_string();
    for part in ["16777216 bytes", "64 KiB", "ulimit -l", "LimitMEMLOCK"] {
        assert!(text.contains(part), "{text}");
    }
    fabric.register(&mem, Access::ALL).unwrap();
}

/// Packets of the node's card vanish for as long as this lives.
struct Silence(String);

impl Silence {
    fn tc(verb: &str, card: &str) {
        let status = std::process::Command::new("/sbin/tc")
            .args(["qdisc", verb, "dev", card, "root", "netem", "loss", "100%"])
            .status();
        assert!(status.is_ok_and(|s| s.success()), "tc {verb} {card}");
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        Self::tc("del", &self.0);
    }
}

#[test]
#[ignore = "needs the lab: make lab"]
fn a_silent_network_ends_operations_with_an_error() {
    let ips: Vec<String> = std::env::var("LAB_IPS")
        .expect("LAB_IPS: run in the lab")
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    let options = VerbsOptions {
        timeout: 16,
        retry: 2,
        ..VerbsOptions::default()
    };
    let end = |ip: &str, name: &str| {
        let seen = Arc::new(Counting::default());
        let fabric = open(config(&format!("{ip}:0"), name), &options, Arc::clone(&seen) as _).unwrap();
        (fabric, seen)
    };
    let ((target, _), (source, seen)) = (end(&ips[0], "target"), end(&ips[1], "source"));
    let mem = Arc::new(SharedMem::anonymous(4096).unwrap());
    let at = RemoteAddr {
        key: target.register(&mem, Access::ALL).unwrap(),
        offset: 0,
    };
    let conn = source.connect(&target.local_addr()).unwrap();
    conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap();
    let card = std::env::var("LAB_CARD").expect("LAB_CARD: run in the lab");
    let silence = {
        Silence::tc("add", &card);
        Silence(card)
    };
    let start = Instant::now();
    let error = conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap_err();
    assert!(matches!(error, TransportError::Disconnected { .. }), "{error:?}");
    assert!(error.to_string().contains("retry"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    until("end", || seen.ended.lock().len() == 1);
    drop(silence);
    // The same two endpoints can connect again.
    let conn = source.connect(&target.local_addr()).unwrap();
    conn.execute(&mut [Op::Faa { at, add: 1, old: 0 }]).unwrap();
}

/// A card without a carrier for as long as this lives; its routes are put back.
struct Unplugged(String, String);

impl Unplugged {
    fn shell(script: &str, card: &str, input: &str) -> String {
        let mut child = std::process::Command::new("sh")
            .args(["-c", script, "sh", card])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap()
    }

    fn new(card: &str) -> Self {
        let routes = Self::shell(
            r#"ip -4 route show table all dev "$1"; ip link set "$1" down"#,
            card,
            "",
        );
        Self(card.to_owned(), routes)
    }
}

impl Drop for Unplugged {
    fn drop(&mut self) {
        let script =
            r#"ip link set "$1" up; while read -r r; do ip route replace $r dev "$1" 2>/dev/null; done"#;
        Self::shell(script, &self.0, &self.1);
    }
}

#[test]
#[ignore = "needs the lab: make lab"]
fn a_port_that_is_down_is_named() {
    let device = std::env::var("LAB_DEVICE").expect("LAB_DEVICE: run in the lab");
    let card = std::env::var("LAB_CARD").expect("LAB_CARD: run in the lab");
    let (fabric, _seen) = endpoint("unplugged");
    let unplugged = Unplugged::new(&card);
    let addr = fabric.local_addr();
    until("the port is down", || {
        let error = fabric.connect(&addr).err().map(|e| e.to_string());
        error.is_some_and(|e| e.contains("is down") && e.contains(&device))
    });
    let options = VerbsOptions {
        device: Some(device.clone()),
        ..VerbsOptions::default()
    };
    let another = open(
        config(&listen(), "another"),
        &options,
        Arc::new(Counting::default()),
    );
    let said = another.err().unwrap().to_string();
    assert!(said.contains("not active") && said.contains(&device), "{said}");
    drop(unplugged);
    until("the port is up", || fabric.connect(&addr).is_ok());
    works(&fabric);
}
