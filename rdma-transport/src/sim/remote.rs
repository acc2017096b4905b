//! Operations and results as they travel: with copies of the bytes, as on a wire. What is under way still arrives when
//! the end that sent it has its buffers back.

use crate::error::TransportError;
use crate::ops::{AsyncOp, BatchError, OpResult, Outcome, RemoteAddr};

pub(super) enum RemoteOp {
    Read { at: RemoteAddr, len: usize },
    Write { at: RemoteAddr, bytes: Box<[u8]> },
    ReadWords { at: RemoteAddr, words: usize },
    Cas { at: RemoteAddr, expect: u64, new: u64 },
    Faa { at: RemoteAddr, add: u64 },
}

impl RemoteOp {
    pub(super) fn of(op: &AsyncOp) -> Self {
        match op {
            AsyncOp::Read { at, into } => Self::Read {
                at: *at,
                len: into.len(),
            },
            AsyncOp::Write { at, from } => Self::Write {
                at: *at,
                bytes: from[..].into(),
            },
            AsyncOp::ReadWords { at, words } => Self::ReadWords {
                at: *at,
                words: *words as usize,
            },
            AsyncOp::Cas { at, expect, new } => Self::Cas {
                at: *at,
                expect: *expect,
                new: *new,
            },
            AsyncOp::Faa { at, add } => Self::Faa { at: *at, add: *add },
        }
    }
}

pub(super) enum RemoteResult {
    Bytes(Vec<u8>),
    Written,
    Words(Vec<u64>),
    Old(u64),
}

/// What the owner of a batch is told, with its buffers.
pub(super) fn outcome(ops: Vec<AsyncOp>, results: Result<Vec<RemoteResult>, TransportError>) -> Outcome {
    let results = match results {
        Ok(results) => results,
        Err(why) => return Err(BatchError::unstarted(why, ops)),
    };
    let told = ops.into_iter().zip(results).map(|pair| match pair {
        (AsyncOp::Read { mut into, .. }, RemoteResult::Bytes(bytes)) => {
            into.copy_from_slice(&bytes);
            OpResult::Read(into)
        }
        (AsyncOp::Read { into: buffer, .. }, _) => OpResult::Read(buffer),
        (AsyncOp::Write { from, .. }, _) => OpResult::Written(from),
        (_, RemoteResult::Words(words)) => OpResult::Words(words),
        (_, RemoteResult::Old(old)) => OpResult::Old(old),
        (_, RemoteResult::Bytes(_) | RemoteResult::Written) => OpResult::Words(Vec::new()),
    });
    Ok(told.collect())
}
