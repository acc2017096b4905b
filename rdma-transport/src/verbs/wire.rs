//! What the two sides of a connection say: queue-pair data while it is set up and control frames after that,
//! both on the TCP stream that the handshake has authenticated; headers of messages. Integers are little-endian.

use crate::Access;

/// Bytes of a receive buffer: a header, and a message or a piece of one.
pub(super) const FRAGMENT: usize = 8 * 1024;
pub(super) const HEADER: usize = 16;
/// Most bytes of a message in one fragment.
pub(super) const PAYLOAD: usize = FRAGMENT - HEADER;

/// How a queue pair is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    pub(super) gid: [u8; 16],
    pub(super) qpn: u32,
    pub(super) psn: u32,
    /// Fragments that may be sent before credits come back.
    pub(super) credits: u32,
    /// Bytes of a fragment.
    pub(super) fragment: u32,
    pub(super) lid: u16,
    pub(super) mtu: u8,
    pub(super) ethernet: bool,
    /// Reads and atomics it takes at once.
    pub(super) rd_atomic: u8,
    /// Reads and atomics it has under way at once.
    pub(super) rd_atomic_source: u8,
}

const INFO: usize = 16 + 4 * 4 + 2 + 4;

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }
}

impl Info {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(INFO);
        out.extend_from_slice(&self.gid);
        for n in [self.qpn, self.psn, self.credits, self.fragment] {
            out.extend_from_slice(&n.to_le_bytes());
        }
        out.extend_from_slice(&self.lid.to_le_bytes());
        out.extend_from_slice(&[
            self.mtu,
            u8::from(self.ethernet),
            self.rd_atomic,
            self.rd_atomic_source,
        ]);
        out
    }

    /// None unless it is well-formed and possible.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut r = Reader(bytes);
        let info = Self {
            gid: r.take()?,
            qpn: u32::from_le_bytes(r.take()?),
            psn: u32::from_le_bytes(r.take()?),
            credits: u32::from_le_bytes(r.take()?),
            fragment: u32::from_le_bytes(r.take()?),
            lid: u16::from_le_bytes(r.take()?),
            mtu: r.take::<1>()?[0],
            ethernet: r.take::<1>()?[0] != 0,
            rd_atomic: r.take::<1>()?[0],
            rd_atomic_source: r.take::<1>()?[0],
        };
        let possible = r.0.is_empty()
            && info.qpn < 1 << 24
            && info.psn < 1 << 24
            && (2..=1 << 16).contains(&info.credits)
            && (1..=5).contains(&info.mtu)
            && info.rd_atomic > 0
            && info.fragment == FRAGMENT as u32;
        possible.then_some(info)
    }
}

/// What a region key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) base: u64,
    pub(super) len: u64,
    pub(super) rkey: u32,
    pub(super) access: Access,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Control {
    /// What does this region key stand for?
    Where(u64),
    /// For this.
    There(u64, Place),
    /// For nothing (any more).
    Nowhere(u64),
}

/// Bytes of a control frame.
pub(super) const CONTROL: usize = 32;

impl Control {
    pub(super) fn encode(&self) -> [u8; CONTROL] {
        let mut out = [0; CONTROL];
        let (kind, key) = match self {
            Self::Where(key) => (1, key),
            Self::There(key, _) => (2, key),
            Self::Nowhere(key) => (3, key),
        };
        out[0] = kind;
        out[8..16].copy_from_slice(&key.to_le_bytes());
        if let Self::There(_, place) = self {
            let a = place.access;
            out[1] = u8::from(a.read) | u8::from(a.write) << 1 | u8::from(a.atomic) << 2;
            out[4..8].copy_from_slice(&place.rkey.to_le_bytes());
            out[16..24].copy_from_slice(&place.base.to_le_bytes());
            out[24..32].copy_from_slice(&place.len.to_le_bytes());
        }
        out
    }

    pub(super) fn decode(bytes: &[u8; CONTROL]) -> Option<Self> {
        let mut r = Reader(bytes);
        let [kind, rights, _, _] = r.take()?;
        let rkey = u32::from_le_bytes(r.take()?);
        let key = u64::from_le_bytes(r.take()?);
        let base = u64::from_le_bytes(r.take()?);
        let len = u64::from_le_bytes(r.take()?);
        let access = Access {
            read: rights & 1 != 0,
            write: rights & 2 != 0,
            atomic: rights & 4 != 0,
        };
        match kind {
            1 => Some(Self::Where(key)),
            2 if base.checked_add(len).is_some() => Some(Self::There(
                key,
                Place {
                    base,
                    len,
                    rkey,
                    access,
                },
            )),
            3 => Some(Self::Nowhere(key)),
            _ => None,
        }
    }
}

/// Heads a fragment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Of a message of so many bytes, of which this fragment has the first.
    First(u32),
    /// More of the message begun.
    More,
    /// Credits only; costs no credit itself.
    Credit,
}

pub(super) fn header(kind: Kind, credits: u32) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    let (tag, len) = match kind {
        Kind::First(len) => (1, len),
        Kind::More => (2, 0),
        Kind::Credit => (3, 0),
    };
    out[0] = tag;
    out[4..8].copy_from_slice(&len.to_le_bytes());
    out[8..12].copy_from_slice(&credits.to_le_bytes());
    out
}

/// The kind and credits of a fragment, and the bytes behind its header.
pub(super) fn parse(fragment: &[u8]) -> Option<(Kind, u32, &[u8])> {
    let (head, body) = fragment.split_first_chunk::<HEADER>()?;
    let mut r = Reader(head);
    let [tag, ..] = r.take::<4>()?;
    let len = u32::from_le_bytes(r.take()?);
    let credits = u32::from_le_bytes(r.take()?);
    let kind = match tag {
        1 => Kind::First(len),
        2 => Kind::More,
        3 => Kind::Credit,
        _ => return None,
    };
    Some((kind, credits, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_util::Junk;

    #[test]
    fn what_is_said_is_understood() {
        let info = Info {
            gid: *b"0123456789abcdef",
            qpn: 17,
            psn: 0xff_ffff,
            credits: 28,
            fragment: FRAGMENT as u32,
            lid: 3,
            mtu: 5,
            ethernet: true,
            rd_atomic: 16,
            rd_atomic_source: 8,
        };
        assert_eq!(Info::decode(&info.encode()), Some(info));
        assert_eq!(info.encode().len(), INFO);
        assert_eq!(Info::decode(&info.encode()[1..]), None);
        for broken in [
            Info { mtu: 6, ..info },
            Info { qpn: 1 << 24, ..info },
            Info { credits: 0, ..info },
        ] {
            assert_eq!(Info::decode(&broken.encode()), None);
        }
        let place = Place {
            base: 4096,
            len: 8192,
            rkey: 77,
            access: Access::READ,
        };
        for control in [
            Control::Where(1),
            Control::There(2, place),
            Control::Nowhere(u64::MAX),
        ] {
            assert_eq!(Control::decode(&control.encode()), Some(control));
        }
        let endless = Control::There(
            2,
            Place {
                base: 1,
                len: u64::MAX,
                ..place
            },
        );
        assert_eq!(Control::decode(&endless.encode()), None);
        for kind in [Kind::First(99), Kind::More, Kind::Credit] {
            let mut fragment = header(kind, 5).to_vec();
            fragment.extend_from_slice(b"body");
            assert_eq!(parse(&fragment), Some((kind, 5, &b"body"[..])));
        }
    }

    #[test]
    fn garbage_is_not_understood_and_does_no_harm() {
        let mut junk = Junk(7);
        for n in 0..2000 {
            let bytes = junk.bytes(n % 64);
            let _any = (Info::decode(&bytes), parse(&bytes));
            if let Some(frame) = junk.bytes(CONTROL).first_chunk() {
                let _any = Control::decode(frame);
            }
        }
    }
}
