//! Messages between nodes, and their encoding.
//!
//! Little endian, fixed widths, no padding:
//!
//! ```text
//! tag u8 | record u64 | epoch u64 | incarnation u8 | body
//! waiter: node u16 | incarnation u8 | mode u8 | epoch u64
//! ```
//!
//! Messages between two nodes must arrive in the order they were sent; the protocol depends on it.

use std::sync::Arc;

use crate::LeaseError;
use crate::ids::{MAX_WORDS, Mode, NodeId, NodeSet, RecordId};
use crate::record::OwnerWord;

/// Longest payload of a grant, bytes.
pub const MAX_PAYLOAD: usize = 512;

/// Opaque bytes that travel with a grant (the attributes of the inode).
pub type Payload = Arc<[u8]>;

/// A node in the queue of a record's writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Waiter {
    /// Who waits.
    pub node: NodeId,
    /// Its incarnation, which a hand-over puts into the owner word.
    pub incarnation: u8,
    /// What it waits for.
    pub mode: Mode,
    /// The epoch in which it asked.
    pub epoch: u64,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Body {
    /// To the writer found in the owner word: queue me.
    Want(Mode),
    /// As [`Body::Want`], from a node that has not looked at the record but remembers the receiver as its owner: queue me
    /// if it still is.
    Ask(Mode),
    /// From a writer that has the word but found the receiver's holder bit.
    Revoke,
    /// Answer to [`Body::Revoke`]: no shared lease is held any more.
    Done,
    /// Take a shared lease while the sender still owns the word.
    GrantS {
        /// Version of the data; the word in memory may still show an older one.
        version: u64,
        /// Attributes.
        payload: Option<Payload>,
    },
    /// The word names the receiver now.
    GrantX {
        /// Version of the data.
        version: u64,
        /// Readers the receiver has to revoke.
        granted: NodeSet,
        /// Those that wait behind the receiver.
        queue: Vec<Waiter>,
        /// Attributes.
        payload: Option<Payload>,
    },
    /// Answer to [`Body::GrantS`]: the holder bit is set (or was taken back), the word may move on.
    Ack,
    /// The receiver's request is void; it reads the record and starts again.
    Retry,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LeaseMsg {
    /// The record it is about.
    pub record: RecordId,
    /// The sender's membership epoch.
    pub epoch: u64,
    /// The sender's incarnation.
    pub incarnation: u8,
    /// What it says.
    pub body: Body,
}

impl LeaseMsg {
    /// Encodes the message.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.push(match self.body {
            Body::Want(_) => 1,
            Body::Revoke => 2,
            Body::Done => 3,
            Body::GrantS { .. } => 4,
            Body::GrantX { .. } => 5,
            Body::Ack => 6,
            Body::Retry => 7,
            Body::Ask(_) => 9,
        });
        out.extend_from_slice(&self.record.0.to_le_bytes());
        out.extend_from_slice(&self.epoch.to_le_bytes());
        out.push(self.incarnation);
        match &self.body {
            Body::Want(mode) | Body::Ask(mode) => out.push(mode_byte(*mode)),
            Body::GrantS { version, payload } => {
                out.extend_from_slice(&version.to_le_bytes());
                put_payload(&mut out, payload.as_deref());
            }
            Body::GrantX {
                version,
                granted,
                queue,
                payload,
            } => {
                out.extend_from_slice(&version.to_le_bytes());
                let words: Vec<u64> = granted.words().collect();
                out.push(words.len() as u8);
                words.iter().for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
                out.extend_from_slice(&(queue.len() as u16).to_le_bytes());
                for waiter in queue {
                    out.extend_from_slice(&waiter.node.0.to_le_bytes());
                    out.extend_from_slice(&[waiter.incarnation, mode_byte(waiter.mode)]);
                    out.extend_from_slice(&waiter.epoch.to_le_bytes());
                }
                put_payload(&mut out, payload.as_deref());
            }
            Body::Revoke | Body::Done | Body::Ack | Body::Retry => {}
        }
        out
    }

    /// The record that an encoded message is about; nothing else of it is looked at.
    #[must_use]
    pub fn record_of(bytes: &[u8]) -> Option<RecordId> {
        let record = bytes.get(1..9)?.try_into().ok()?;
        Some(RecordId(u64::from_le_bytes(record)))
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// [`LeaseError::BadMessage`] unless every byte is part of exactly one message. Nothing is allocated
    /// that the message does not itself contain.
    pub fn decode(bytes: &[u8]) -> Result<Self, LeaseError> {
        let mut r = Reader(bytes);
        let tag = r.u8()?;
        let (record, epoch, incarnation) = (RecordId(r.u64()?), r.u64()?, r.u8()?);
        let body = match tag {
            1 => Body::Want(r.mode()?),
            9 => Body::Ask(r.mode()?),
            2 => Body::Revoke,
            3 => Body::Done,
            4 => Body::GrantS {
                version: r.version()?,
                payload: r.payload()?,
            },
            5 => Body::GrantX {
                version: r.version()?,
                granted: r.set()?,
                queue: r.queue()?,
                payload: r.payload()?,
            },
            6 => Body::Ack,
            7 => Body::Retry,
            _ => return bad("unknown kind"),
        };
        if r.0.is_empty() {
            Ok(Self {
                record,
                epoch,
                incarnation,
                body,
            })
        } else {
            bad("trailing bytes")
        }
    }
}

fn mode_byte(mode: Mode) -> u8 {
    match mode {
        Mode::Shared => 1,
        Mode::Exclusive => 2,
    }
}

/// 0xffff: none; else the length and the bytes. Senders never have more than [`MAX_PAYLOAD`] bytes.
fn put_payload(out: &mut Vec<u8>, payload: Option<&[u8]>) {
    match payload {
        None => out.extend_from_slice(&u16::MAX.to_le_bytes()),
        Some(p) => {
            let p = &p[..p.len().min(MAX_PAYLOAD)];
            out.extend_from_slice(&(p.len() as u16).to_le_bytes());
            out.extend_from_slice(p);
        }
    }
}

fn bad<T>(why: &'static str) -> Result<T, LeaseError> {
    Err(LeaseError::BadMessage { why })
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8], LeaseError> {
        let Some((head, tail)) = self.0.split_at_checked(n) else {
            return bad("cut short");
        };
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], LeaseError> {
        let mut a = [0; N];
        a.copy_from_slice(self.bytes(N)?);
        Ok(a)
    }

    fn u8(&mut self) -> Result<u8, LeaseError> {
        Ok(self.array::<1>()?[0])
    }

    fn u16(&mut self) -> Result<u16, LeaseError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, LeaseError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn version(&mut self) -> Result<u64, LeaseError> {
        let version = self.u64()?;
        if version > OwnerWord::MAX_VERSION {
            bad("version out of range")
        } else {
            Ok(version)
        }
    }

    fn mode(&mut self) -> Result<Mode, LeaseError> {
        match self.u8()? {
            1 => Ok(Mode::Shared),
            2 => Ok(Mode::Exclusive),
            _ => bad("unknown mode"),
        }
    }

    fn set(&mut self) -> Result<NodeSet, LeaseError> {
        let n = usize::from(self.u8()?);
        if n > MAX_WORDS {
            return bad("set too large");
        }
        let mut words = [0; MAX_WORDS];
        for word in &mut words[..n] {
            *word = self.u64()?;
        }
        Ok(NodeSet::from_words(&words[..n]))
    }

    fn queue(&mut self) -> Result<Vec<Waiter>, LeaseError> {
        let n = usize::from(self.u16()?);
        if n > usize::from(NodeSet::MAX_NODES) {
            return bad("queue too long");
        }
        let mut queue = Vec::new();
        let mut seen = NodeSet::new();
        for _ in 0..n {
            let node = NodeId(self.u16()?);
            if !seen.insert(node) {
                return bad("node out of range or queued twice");
            }
            let incarnation = self.u8()?;
            queue.push(Waiter {
                node,
                incarnation,
                mode: self.mode()?,
                epoch: self.u64()?,
            });
        }
        Ok(queue)
    }

    fn payload(&mut self) -> Result<Option<Payload>, LeaseError> {
        match self.u16()? {
            u16::MAX => Ok(None),
            n if usize::from(n) > MAX_PAYLOAD => bad("payload too long"),
            n => Ok(Some(self.bytes(usize::from(n))?.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mode() -> impl Strategy<Value = Mode> {
        prop::sample::select(vec![Mode::Shared, Mode::Exclusive])
    }

    fn payload() -> impl Strategy<Value = Option<Payload>> {
        prop::option::of(prop::collection::vec(any::<u8>(), 0..=MAX_PAYLOAD).prop_map(Into::into))
    }

    fn body() -> impl Strategy<Value = Body> {
        let set = prop::collection::vec(0..NodeSet::MAX_NODES, 0..20)
            .prop_map(|v| v.into_iter().map(NodeId).collect::<NodeSet>());
        let queue =
            prop::collection::btree_map(0..NodeSet::MAX_NODES, (any::<u8>(), mode(), any::<u64>()), 0..20)
                .prop_map(|m| {
                    m.into_iter()
                        .map(|(n, (incarnation, mode, epoch))| Waiter {
                            node: NodeId(n),
                            incarnation,
                            mode,
                            epoch,
                        })
                        .collect::<Vec<_>>()
                });
        prop_oneof![
            mode().prop_map(Body::Want),
            mode().prop_map(Body::Ask),
            Just(Body::Revoke),
            Just(Body::Done),
            (0..=OwnerWord::MAX_VERSION, payload())
                .prop_map(|(version, payload)| Body::GrantS { version, payload }),
            (0..=OwnerWord::MAX_VERSION, set, queue, payload()).prop_map(
                |(version, granted, queue, payload)| {
                    Body::GrantX {
                        version,
                        granted,
                        queue,
                        payload,
                    }
                }
            ),
            Just(Body::Ack),
            Just(Body::Retry),
        ]
    }

    proptest! {
        #[test]
        fn round_trip(record: u64, epoch: u64, incarnation: u8, body in body(), cut in any::<prop::sample::Index>()) {
            let msg = LeaseMsg { record: RecordId(record), epoch, incarnation, body };
            let bytes = msg.encode();
            prop_assert_eq!(LeaseMsg::decode(&bytes).unwrap(), msg);
            prop_assert!(LeaseMsg::decode(&bytes[..cut.index(bytes.len())]).is_err());
            let mut longer = bytes;
            longer.push(0);
            prop_assert!(LeaseMsg::decode(&longer).is_err());
        }

        #[test]
        fn garbage_is_an_error_or_a_message(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(msg) = LeaseMsg::decode(&bytes) {
                prop_assert_eq!(LeaseMsg::decode(&msg.encode()).unwrap(), msg);
            }
        }
    }
}
