//! The key handshake: four messages, the same on every provider.
//!
//! ```text
//! HELLO      magic 8, version u32, provider u8, nonce 32
//! CHALLENGE  magic 8, version u32, nonce 32, instance u64, identity (u16 length, bytes)
//! PROOF      instance u64, serial u64, alive (u16 count, u64 each), identity, MAC 32
//! VERDICT    status u8, reason (u16 length, bytes), MAC 32
//! ```
//! Each MAC is HMAC-SHA256 under the cluster key over a direction label and everything said before it, so it
//! covers both nonces, versions and identities; a proof cannot be replayed, reflected, or moved to another
//! provider. The key itself never travels. All integers are little-endian.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::TransportError;

/// Version of the transport protocol; change it with any change of a wire format or shared layout.
pub(crate) const VERSION: u32 = 2;
const MAGIC: &[u8; 8] = b"DISTFUSE";
const MAC_LEN: usize = 32;
/// Longest identity.
pub(crate) const MAX_IDENTITY: usize = 1024;
const MAX_REASON: usize = 1024;
/// Most connections between two endpoints, one way.
const MAX_ALIVE: usize = 128;
/// Longest handshake message.
pub(crate) const MAX_MESSAGE: usize = 4096;
const LABEL_CLIENT: &[u8] = b"distfuse transport proof of the connecting side";
const LABEL_SERVER: &[u8] = b"distfuse transport verdict of the listening side";

/// Which provider a handshake belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Provider {
    Shm = 1,
    Tcp = 2,
    #[cfg(feature = "verbs")]
    Verbs = 3,
}

/// How handshake messages travel; the provider's side of it (framing, deadline).
pub(crate) trait Pipe {
    fn send(&mut self, message: &[u8]) -> Result<(), TransportError>;
    fn recv(&mut self) -> Result<Vec<u8>, TransportError>;
    /// The other side, for messages to humans.
    fn addr(&self) -> String;
}

/// What this side brings to a handshake.
#[derive(Debug, Clone)]
pub(crate) struct Local {
    pub(crate) provider: Provider,
    pub(crate) key: Vec<u8>,
    pub(crate) identity: Vec<u8>,
    /// Random name of this endpoint's life.
    pub(crate) instance: u64,
}

/// What is known of the other side afterwards.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) identity: Vec<u8>,
    pub(crate) instance: u64,
    /// Number of this connection among those its maker ever made.
    pub(crate) serial: u64,
    /// Serials of the maker's connections to us that it still believes in.
    pub(crate) alive: Vec<u64>,
}

impl Peer {
    /// Whether a connection of `self` is over now that `newer` has connected: the same identity, but of
    /// another life, or of the same life and given up there. What it still has under way must not land.
    /// Peers without an identity cannot be told apart and supersede nobody.
    pub(crate) fn superseded_by(&self, newer: &Self) -> bool {
        !self.identity.is_empty()
            && self.identity == newer.identity
            && (self.instance != newer.instance || !newer.alive.contains(&self.serial))
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn new() -> Self {
        Self(Vec::with_capacity(256))
    }
    fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
    fn sized(self, bytes: &[u8]) -> Self {
        let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
        self.put(&len.to_le_bytes()).put(&bytes[..usize::from(len)])
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }
    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }
    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }
    fn sized(&mut self, most: usize) -> Option<&'a [u8]> {
        let len = usize::from(self.u16()?);
        if len > most { None } else { self.take(len) }
    }
    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

fn mac_of(key: &[u8], label: &[u8], transcript: &[&[u8]]) -> Result<Hmac<Sha256>, TransportError> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key)
        .map_err(|_| TransportError::Invalid("the cluster key cannot be used".to_owned()))?;
    mac.update(label);
    for part in transcript {
        // Length first: no two transcripts run together to the same bytes.
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    Ok(mac)
}

fn protocol(addr: &str, detail: &str) -> TransportError {
    TransportError::Protocol {
        addr: addr.to_owned(),
        detail: detail.to_owned(),
    }
}

fn hello(provider: Provider, nonce: &[u8; 32]) -> Vec<u8> {
    Writer::new()
        .put(MAGIC)
        .put(&VERSION.to_le_bytes())
        .put(&[provider as u8])
        .put(nonce)
        .0
}

/// The version announced; the rest is read only if it is ours.
fn opening(message: &[u8], addr: &str) -> Result<u32, TransportError> {
    let mut r = Reader(message);
    if r.take(8) != Some(MAGIC.as_slice()) {
        return Err(protocol(addr, "not a DistFUSE transport"));
    }
    r.u32().ok_or_else(|| protocol(addr, "greeting cut short"))
}

fn challenge(local: &Local, nonce: &[u8; 32]) -> Vec<u8> {
    Writer::new()
        .put(MAGIC)
        .put(&VERSION.to_le_bytes())
        .put(nonce)
        .put(&local.instance.to_le_bytes())
        .sized(&local.identity)
        .0
}

fn parse_challenge(message: &[u8]) -> Option<(u64, Vec<u8>)> {
    let mut r = Reader(message);
    r.take(8 + 4 + 32)?;
    let instance = r.u64()?;
    let identity = r.sized(MAX_IDENTITY)?.to_vec();
    r.end()?;
    Some((instance, identity))
}

fn proof_body(local: &Local, serial: u64, alive: &[u64]) -> Vec<u8> {
    let alive = &alive[..alive.len().min(MAX_ALIVE)];
    let count = u16::try_from(alive.len()).unwrap_or(0);
    let mut w = Writer::new()
        .put(&local.instance.to_le_bytes())
        .put(&serial.to_le_bytes())
        .put(&count.to_le_bytes());
    for serial in alive {
        w = w.put(&serial.to_le_bytes());
    }
    w.sized(&local.identity).0
}

fn parse_proof(body: &[u8]) -> Option<Peer> {
    let mut r = Reader(body);
    let instance = r.u64()?;
    let serial = r.u64()?;
    let count = usize::from(r.u16()?);
    if count > MAX_ALIVE {
        return None;
    }
    let mut alive = Vec::with_capacity(count);
    for _ in 0..count {
        alive.push(r.u64()?);
    }
    let identity = r.sized(MAX_IDENTITY)?.to_vec();
    r.end()?;
    Some(Peer {
        identity,
        instance,
        serial,
        alive,
    })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Status {
    Welcome = 0,
    WrongKey = 1,
    Refused = 2,
}

fn verdict(key: &[u8], said: &[&[u8]], status: Status, reason: &str) -> Result<Vec<u8>, TransportError> {
    let mut cut = reason.len().min(MAX_REASON);
    while !reason.is_char_boundary(cut) {
        cut -= 1;
    }
    let body = Writer::new()
        .put(&[status as u8])
        .sized(&reason.as_bytes()[..cut])
        .0;
    let mut transcript = said.to_vec();
    transcript.push(&body);
    let mac = mac_of(key, LABEL_SERVER, &transcript)?.finalize().into_bytes();
    Ok(Writer(body.clone()).put(&mac).0)
}

/// The connecting side. `alive` are the serials of the connections it still believes in to the endpoint
/// instance it is given.
pub(crate) fn client(
    pipe: &mut dyn Pipe,
    local: &Local,
    serial: u64,
    alive: &dyn Fn(u64) -> Vec<u64>,
) -> Result<Peer, TransportError> {
    let addr = pipe.addr();
    let hello = hello(local.provider, &crate::common::random()?);
    pipe.send(&hello)?;
    let challenge = pipe.recv()?;
    let theirs = opening(&challenge, &addr)?;
    if theirs != VERSION {
        return Err(TransportError::VersionMismatch {
            addr,
            ours: VERSION,
            theirs,
        });
    }
    let (instance, identity) =
        parse_challenge(&challenge).ok_or_else(|| protocol(&addr, "malformed challenge"))?;
    let body = proof_body(local, serial, &alive(instance));
    let mac = mac_of(&local.key, LABEL_CLIENT, &[&hello, &challenge, &body])?
        .finalize()
        .into_bytes();
    pipe.send(&Writer(body.clone()).put(&mac).0)?;
    let verdict = pipe.recv()?;
    let (said, mac) = verdict
        .len()
        .checked_sub(MAC_LEN)
        .map(|at| verdict.split_at(at))
        .ok_or_else(|| protocol(&addr, "verdict cut short"))?;
    let mut r = Reader(said);
    let (Some([status]), Some(reason), Some(())) = (r.array::<1>(), r.sized(MAX_REASON), r.end()) else {
        return Err(protocol(&addr, "malformed verdict"));
    };
    if status == Status::WrongKey as u8 {
        return Err(TransportError::WrongKey { addr });
    }
    mac_of(&local.key, LABEL_SERVER, &[&hello, &challenge, &body, said])?
        .verify_slice(mac)
        .map_err(|_| TransportError::WrongKey { addr: addr.clone() })?;
    if status == Status::Welcome as u8 {
        // Asked again: others may have connected meanwhile.
        if alive(instance).len() >= MAX_ALIVE {
            return Err(TransportError::Invalid(format!(
                "more than {MAX_ALIVE} connections to {addr}"
            )));
        }
        Ok(Peer {
            identity,
            instance,
            serial,
            alive: Vec::new(),
        })
    } else if status == Status::Refused as u8 {
        Err(TransportError::Refused {
            addr,
            reason: String::from_utf8_lossy(reason).into_owned(),
        })
    } else {
        Err(protocol(&addr, "unknown verdict"))
    }
}

/// A peer that has proved the key and was admitted; `welcome` is to be sent when its connection is in place.
#[derive(Debug)]
pub(crate) struct Verified {
    pub(crate) peer: Peer,
    pub(crate) welcome: Vec<u8>,
}

/// The listening side, up to the verdict of the application. Says no itself, leaves the yes to the caller.
pub(crate) fn server(
    pipe: &mut dyn Pipe,
    local: &Local,
    admit: &dyn Fn(&[u8]) -> Result<(), String>,
) -> Result<Verified, TransportError> {
    let addr = pipe.addr();
    let hello = pipe.recv()?;
    let theirs = opening(&hello, &addr)?;
    let challenge = challenge(local, &crate::common::random()?);
    if theirs != VERSION {
        // The challenge carries our version: the other side can say what is wrong, too.
        pipe.send(&challenge)?;
        return Err(TransportError::VersionMismatch {
            addr,
            ours: VERSION,
            theirs,
        });
    }
    if hello.len() != 8 + 4 + 1 + 32 || hello[12] != local.provider as u8 {
        return Err(protocol(&addr, "malformed greeting"));
    }
    pipe.send(&challenge)?;
    let proof = pipe.recv()?;
    let (body, mac) = proof
        .len()
        .checked_sub(MAC_LEN)
        .map(|at| proof.split_at(at))
        .ok_or_else(|| protocol(&addr, "proof cut short"))?;
    let said: [&[u8]; 3] = [&hello, &challenge, body];
    if mac_of(&local.key, LABEL_CLIENT, &said)?
        .verify_slice(mac)
        .is_err()
    {
        pipe.send(&verdict(&local.key, &said, Status::WrongKey, "")?)?;
        return Err(TransportError::WrongKey { addr });
    }
    let peer = parse_proof(body).ok_or_else(|| protocol(&addr, "malformed proof"))?;
    if let Err(reason) = admit(&peer.identity) {
        pipe.send(&verdict(&local.key, &said, Status::Refused, &reason)?)?;
        return Err(TransportError::Refused { addr, reason });
    }
    Ok(Verified {
        peer,
        welcome: verdict(&local.key, &said, Status::Welcome, "")?,
    })
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
