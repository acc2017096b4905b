//! The frames of an established connection.
//!
//! Every frame starts with a 16-byte header, all integers little-endian:
//! ```text
//! kind u8, status u8, index u16, length u32, batch u64
//! OPS      length: descriptors (40 bytes each); then, not counted, the bytes of the batch's writes
//! RESULT   of operation `index` of `batch`; length: bytes read, or the sentence if status is not 0
//! MESSAGE  length: the message
//! ```
//! A descriptor: kind u32, length u32, key u64, offset u64, two operands u64.

use crate::common::{LIMITS, MAX_WORDS};
use crate::{AsyncOp, Op, RegionKey, RemoteAddr};

pub(super) const HEADER: usize = 16;
pub(super) const DESC: usize = 40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ops = 1,
    Result = 2,
    Message = 3,
}

pub(super) const OK: u8 = 0;
pub(super) const REFUSED: u8 = 1;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) status: u8,
    pub(super) index: u16,
    pub(super) len: u32,
    pub(super) batch: u64,
}

impl Header {
    pub(super) fn message(len: usize) -> Self {
        Self {
            kind: Kind::Message,
            status: OK,
            index: 0,
            len: len as u32,
            batch: 0,
        }
    }

    pub(super) fn ops(batch: u64, count: usize) -> Self {
        Self {
            kind: Kind::Ops,
            status: OK,
            index: 0,
            len: (count * DESC) as u32,
            batch,
        }
    }

    pub(super) fn result(batch: u64, index: usize, status: u8, len: usize) -> Self {
        Self {
            kind: Kind::Result,
            status,
            index: index as u16,
            len: len as u32,
            batch,
        }
    }

    pub(super) fn encode(self) -> [u8; HEADER] {
        let mut out = [0u8; HEADER];
        out[0] = self.kind as u8;
        out[1] = self.status;
        out[2..4].copy_from_slice(&self.index.to_le_bytes());
        out[4..8].copy_from_slice(&self.len.to_le_bytes());
        out[8..16].copy_from_slice(&self.batch.to_le_bytes());
        out
    }

    /// Checks the lengths, too: nothing is allocated for a frame that cannot be right.
    pub(super) fn decode(b: &[u8; HEADER]) -> Result<Self, &'static str> {
        let kind = match b[0] {
            1 => Kind::Ops,
            2 => Kind::Result,
            3 => Kind::Message,
            _ => return Err("unknown kind of frame"),
        };
        let header = Self {
            kind,
            status: b[1],
            index: u16::from_le_bytes([b[2], b[3]]),
            len: u32::from_le_bytes([b[4], b[5], b[6], b[7]]),
            batch: u64::from_le_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]),
        };
        let len = header.len as usize;
        let fits = match kind {
            Kind::Ops => len.is_multiple_of(DESC) && len > 0 && len <= LIMITS.max_batch * DESC,
            Kind::Result if header.status == OK => len <= LIMITS.max_transfer,
            Kind::Result => len <= 1024,
            Kind::Message => len <= LIMITS.max_message,
        };
        if fits {
            Ok(header)
        } else {
            Err("impossible length of a frame")
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DescKind {
    Read = 1,
    Write = 2,
    Cas = 3,
    Faa = 4,
    Words = 5,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Desc {
    pub(super) kind: DescKind,
    pub(super) len: usize,
    pub(super) at: RemoteAddr,
    pub(super) a: u64,
    pub(super) b: u64,
}

impl Desc {
    pub(super) fn of(op: &Op<'_>) -> Self {
        match op {
            Op::Read { at, into } => Self {
                kind: DescKind::Read,
                len: into.len(),
                at: *at,
                a: 0,
                b: 0,
            },
            Op::Write { at, from } => Self {
                kind: DescKind::Write,
                len: from.len(),
                at: *at,
                a: 0,
                b: 0,
            },
            Op::Cas { at, expect, new, .. } => Self {
                kind: DescKind::Cas,
                len: 8,
                at: *at,
                a: *expect,
                b: *new,
            },
            Op::Faa { at, add, .. } => Self {
                kind: DescKind::Faa,
                len: 8,
                at: *at,
                a: *add,
                b: 0,
            },
        }
    }

    pub(super) fn of_async(op: &AsyncOp) -> Self {
        match op {
            AsyncOp::Read { at, into } => Self {
                kind: DescKind::Read,
                len: into.len(),
                at: *at,
                a: 0,
                b: 0,
            },
            AsyncOp::Write { at, from } => Self {
                kind: DescKind::Write,
                len: from.len(),
                at: *at,
                a: 0,
                b: 0,
            },
            AsyncOp::ReadWords { at, words } => Self {
                kind: DescKind::Words,
                len: *words as usize * 8,
                at: *at,
                a: 0,
                b: 0,
            },
            AsyncOp::Cas { at, expect, new } => Self {
                kind: DescKind::Cas,
                len: 8,
                at: *at,
                a: *expect,
                b: *new,
            },
            AsyncOp::Faa { at, add } => Self {
                kind: DescKind::Faa,
                len: 8,
                at: *at,
                a: *add,
                b: 0,
            },
        }
    }

    pub(super) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.kind as u32).to_le_bytes());
        out.extend_from_slice(&(self.len as u32).to_le_bytes());
        for word in [self.at.key.0, self.at.offset, self.a, self.b] {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    pub(super) fn decode(bytes: &[u8; DESC]) -> Result<Self, &'static str> {
        let (words, _) = bytes.as_chunks::<8>();
        let word = |i: usize| u64::from_le_bytes(words[i]);
        let kind = match word(0) as u32 {
            1 => DescKind::Read,
            2 => DescKind::Write,
            3 => DescKind::Cas,
            4 => DescKind::Faa,
            5 => DescKind::Words,
            _ => return Err("unknown kind of operation"),
        };
        let len = (word(0) >> 32) as usize;
        let desc = Self {
            kind,
            len,
            at: RemoteAddr {
                key: RegionKey(word(1)),
                offset: word(2),
            },
            a: word(3),
            b: word(4),
        };
        let aligned = desc.at.offset.is_multiple_of(8);
        let right = match kind {
            DescKind::Read | DescKind::Write => len <= LIMITS.max_transfer,
            DescKind::Cas | DescKind::Faa => aligned && len == 8,
            DescKind::Words => aligned && len.is_multiple_of(8) && len <= MAX_WORDS as usize * 8,
        };
        if right {
            Ok(desc)
        } else {
            Err("impossible operation")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_and_nonsense_does_not() {
        for header in [
            Header::message(0),
            Header::message(LIMITS.max_message),
            Header::ops(7, 64),
            Header::result(u64::MAX, 63, OK, LIMITS.max_transfer),
            Header::result(1, 0, REFUSED, 80),
        ] {
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
        for header in [
            Header::message(LIMITS.max_message + 1),
            Header::ops(7, 65),
            Header::ops(7, 0),
            Header::result(1, 0, OK, LIMITS.max_transfer + 1),
            Header::result(1, 0, REFUSED, 80_000),
        ] {
            assert!(Header::decode(&header.encode()).is_err());
        }
        assert!(Header::decode(b"GET / HTTP/1.1\r\n").is_err());
    }

    #[test]
    fn descriptors_survive_and_nonsense_does_not() {
        let at = RemoteAddr {
            key: RegionKey(0x8123),
            offset: 64,
        };
        let good = Desc {
            kind: DescKind::Cas,
            len: 8,
            at,
            a: 1,
            b: 2,
        };
        let bytes = |d: Desc| {
            let mut out = Vec::new();
            d.encode(&mut out);
            <[u8; DESC]>::try_from(out).unwrap()
        };
        assert_eq!(Desc::decode(&bytes(good)), Ok(good));
        assert!(Desc::decode(&bytes(Desc { len: 9, ..good })).is_err());
        assert!(
            Desc::decode(&bytes(Desc {
                at: at.plus(4),
                ..good
            }))
            .is_err()
        );
        let read = Desc {
            kind: DescKind::Read,
            len: LIMITS.max_transfer + 1,
            at,
            a: 0,
            b: 0,
        };
        assert!(Desc::decode(&bytes(read)).is_err());
        assert!(Desc::decode(&[0xff; DESC]).is_err());
    }
}
