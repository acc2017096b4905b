use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use super::*;

/// Two ends of a handshake in memory; `spoil` may change any message.
struct Wire {
    out: Sender<Vec<u8>>,
    into: Receiver<Vec<u8>>,
    spoil: Spoil,
    sent: usize,
}

impl Pipe for Wire {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError> {
        let mut message = message.to_vec();
        (self.spoil)(self.sent, &mut message);
        self.sent += 1;
        // The other side may have given up.
        let _gone = self.out.send(message);
        Ok(())
    }
    fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
        let late = || TransportError::Timeout {
            addr: "wire".to_owned(),
            millis: 2000,
        };
        self.into.recv_timeout(Duration::from_secs(2)).map_err(|_| late())
    }
    fn addr(&self) -> String {
        "wire".to_owned()
    }
}

type Spoil = Box<dyn FnMut(usize, &mut Vec<u8>) + Send>;

fn local(key: &[u8], identity: &[u8]) -> Local {
    Local {
        provider: Provider::Tcp,
        key: key.to_vec(),
        identity: identity.to_vec(),
        instance: 42,
    }
}

fn run(
    client_key: &[u8],
    server_key: &[u8],
    spoil_client: Spoil,
    spoil_server: Spoil,
    admit: fn(&[u8]) -> Result<(), String>,
) -> (Result<Peer, TransportError>, Result<Peer, TransportError>) {
    let (to_server, from_client) = channel();
    let (to_client, from_server) = channel();
    let mut c = Wire {
        out: to_server,
        into: from_server,
        spoil: spoil_client,
        sent: 0,
    };
    let mut s = Wire {
        out: to_client,
        into: from_client,
        spoil: spoil_server,
        sent: 0,
    };
    let (ours, theirs) = (local(client_key, b"client"), local(server_key, b"server"));
    let server = std::thread::spawn(move || {
        let verified = server(&mut s, &theirs, &admit)?;
        s.send(&verified.welcome)?;
        Ok(verified.peer)
    });
    let client = client(&mut c, &ours, 7, &|instance| vec![instance, 1, 2]);
    drop(c);
    (client, server.join().unwrap())
}

fn keep() -> Spoil {
    Box::new(|_, _| {})
}

const KEY: &[u8] = b"sixteen bytes key";

#[test]
fn both_learn_who_the_other_is() {
    let (client, server) = run(KEY, KEY, keep(), keep(), |_| Ok(()));
    let (client, server) = (client.unwrap(), server.unwrap());
    assert_eq!(
        (client.identity.as_slice(), client.instance),
        (&b"server"[..], 42)
    );
    assert_eq!(server.identity, b"client");
    assert_eq!((server.serial, server.alive), (7, vec![42, 1, 2]));
}

#[test]
fn another_key_is_told_to_both() {
    let (client, server) = run(KEY, b"another key, also long", keep(), keep(), |_| Ok(()));
    assert!(matches!(client, Err(TransportError::WrongKey { .. })));
    assert!(matches!(server, Err(TransportError::WrongKey { .. })));
}

#[test]
fn refusals_carry_their_reason() {
    let (client, server) = run(KEY, KEY, keep(), keep(), |_| Err("ö".repeat(2000)));
    let Err(TransportError::Refused { reason, .. }) = client else {
        panic!("{client:?}")
    };
    assert!(reason.starts_with("öö") && reason.len() <= MAX_REASON);
    assert!(matches!(server, Err(TransportError::Refused { .. })));
}

#[test]
fn no_bit_can_be_changed() {
    // Every bit of every message, in both directions: never a connection that both believe in.
    for from_client in [true, false] {
        for message in 0..2 {
            let mut bits = VecDeque::from_iter((0..8 * 600).step_by(13));
            while let Some(bit) = bits.pop_front() {
                let (tell, told) = channel();
                let spoil: Spoil = Box::new(move |n, bytes| {
                    if n == message {
                        let inside = bit / 8 < bytes.len();
                        if inside {
                            bytes[bit / 8] ^= 1 << (bit % 8);
                        }
                        tell.send(inside).unwrap();
                    }
                });
                let (client, server) = match from_client {
                    true => run(KEY, KEY, spoil, keep(), |_| Ok(())),
                    false => run(KEY, KEY, keep(), spoil, |_| Ok(())),
                };
                if !told.recv().unwrap_or(false) {
                    break;
                }
                assert!(
                    client.is_err(),
                    "{from_client} {message} {bit}: {client:?} {server:?}"
                );
                if !from_client && message == 1 {
                    // The verdict comes last: the server cannot know that it was spoilt.
                    continue;
                }
                assert!(
                    server.is_err(),
                    "{from_client} {message} {bit}: {client:?} {server:?}"
                );
            }
        }
    }
}

#[test]
fn who_replaces_whom() {
    let peer = |identity: &[u8], instance, serial, alive: &[u64]| Peer {
        identity: identity.to_vec(),
        instance,
        serial,
        alive: alive.to_vec(),
    };
    let old = peer(b"a", 1, 5, &[]);
    assert!(old.superseded_by(&peer(b"a", 2, 1, &[])), "another life");
    assert!(old.superseded_by(&peer(b"a", 1, 6, &[])), "given up over there");
    assert!(!old.superseded_by(&peer(b"a", 1, 6, &[5])), "a second connection");
    assert!(!old.superseded_by(&peer(b"b", 2, 1, &[])), "somebody else");
    assert!(
        !peer(b"", 1, 5, &[]).superseded_by(&peer(b"", 2, 1, &[])),
        "nobody in particular"
    );
}

mod fuzz {
    use proptest::prelude::*;

    use super::*;
    use crate::test_util::allocating;

    /// Says what it was given, whatever it is told.
    struct Parrot(Vec<Vec<u8>>);

    impl Pipe for Parrot {
        fn send(&mut self, _message: &[u8]) -> Result<(), TransportError> {
            Ok(())
        }
        fn recv(&mut self) -> Result<Vec<u8>, TransportError> {
            self.0.pop().ok_or(TransportError::Shutdown)
        }
        fn addr(&self) -> String {
            "parrot".to_owned()
        }
    }

    /// Bytes that may begin like a message.
    fn message() -> impl Strategy<Value = Vec<u8>> {
        let tail = prop::collection::vec(any::<u8>(), 0..300);
        (any::<bool>(), prop::option::of(Just(VERSION)), 0u8..5, tail).prop_map(
            |(magic, version, byte, tail)| {
                let mut out = Vec::new();
                if magic {
                    out.extend_from_slice(MAGIC);
                    version.into_iter().for_each(|v| out.extend(v.to_le_bytes()));
                    out.push(byte);
                }
                out.extend(tail);
                out
            },
        )
    }

    proptest! {
        #[test]
        fn whatever_the_other_side_says(said in prop::collection::vec(message(), 0..4)) {
            let local = Local {
                provider: Provider::Tcp,
                key: vec![7; 32],
                identity: b"fuzzed".to_vec(),
                instance: 1,
            };
            let (passed, most) = allocating(|| {
                let served = server(&mut Parrot(said.clone()), &local, &|_| Ok(())).is_ok();
                let connected = client(&mut Parrot(said.clone()), &local, 1, &|_| Vec::new()).is_ok();
                served || connected
            });
            prop_assert!(!passed, "without the key");
            prop_assert!(most < 64 * 1024, "{most} bytes");
        }

        #[test]
        fn bodies(bytes in prop::collection::vec(any::<u8>(), 0..400), count in 0u16..200) {
            let mut proof = vec![1; 16];
            proof.extend(count.to_le_bytes());
            proof.extend(&bytes);
            let (_any, most) = allocating(|| {
                (parse_challenge(&bytes), parse_proof(&bytes), parse_proof(&proof), opening(&bytes, "x").is_ok())
            });
            prop_assert!(most < 16 * 1024, "{most} bytes");
        }
    }
}
