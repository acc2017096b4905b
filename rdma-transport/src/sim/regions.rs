//! The registered memory of an endpoint, and what operations do to it.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::remote::{RemoteOp, RemoteResult};
use crate::common::remote_access;
use crate::mem::SharedMem;
use crate::regions::place_in;
use crate::{Access, Op, RemoteAddr, TransportError};

/// Registered memory by its key.
#[derive(Default)]
pub struct Regions(pub HashMap<u64, (Arc<SharedMem>, Access)>);

impl Regions {
    /// An operation that was under way takes effect.
    pub fn remote(&self, op: &RemoteOp) -> Result<RemoteResult, TransportError> {
        match op {
            RemoteOp::Read { at, len } => {
                let mut bytes = vec![0; *len];
                self.on_region(*at, *len, |a| a.read, |mem, off| mem.read_at(off, &mut bytes))?;
                Ok(RemoteResult::Bytes(bytes))
            }
            RemoteOp::Write { at, bytes } => {
                self.on_region(*at, bytes.len(), |a| a.write, |mem, off| mem.write_at(off, bytes))?;
                Ok(RemoteResult::Written)
            }
            RemoteOp::ReadWords { at, words } => self.on_region(
                *at,
                *words * 8,
                |a| a.read,
                |mem, off| {
                    let word = |i| Ok(mem.word(off + i * 8)?.load(Ordering::SeqCst));
                    (0..*words)
                        .map(word)
                        .collect::<Result<_, TransportError>>()
                        .map(RemoteResult::Words)
                },
            ),
            RemoteOp::Cas { at, expect, new } => self.cas(*at, *expect, *new).map(RemoteResult::Old),
            RemoteOp::Faa { at, add } => self.faa(*at, *add).map(RemoteResult::Old),
        }
    }

    /// An operation takes effect at once.
    pub fn execute(&self, op: &mut Op<'_>) -> Result<(), TransportError> {
        match op {
            Op::Read { at, into } => {
                self.on_region(*at, into.len(), |a| a.read, |mem, off| mem.read_at(off, into))
            }
            Op::Write { at, from } => {
                self.on_region(*at, from.len(), |a| a.write, |mem, off| mem.write_at(off, from))
            }
            Op::Cas { at, expect, new, old } => self.cas(*at, *expect, *new).map(|v| *old = v),
            Op::Faa { at, add, old } => self.faa(*at, *add).map(|v| *old = v),
        }
    }

    fn cas(&self, at: RemoteAddr, expect: u64, new: u64) -> Result<u64, TransportError> {
        self.on_region(
            at,
            8,
            |a| a.atomic,
            |mem, off| mem.compare_and_swap(off, expect, new),
        )
    }

    fn faa(&self, at: RemoteAddr, add: u64) -> Result<u64, TransportError> {
        self.on_region(
            at,
            8,
            |a| a.atomic,
            |mem, off| Ok(mem.word(off)?.fetch_add(add, Ordering::SeqCst)),
        )
    }

    fn on_region<R>(
        &self,
        at: RemoteAddr,
        len: usize,
        permits: impl Fn(Access) -> bool,
        act: impl FnOnce(&SharedMem, usize) -> Result<R, TransportError>,
    ) -> Result<R, TransportError> {
        let Some((mem, access)) = self.0.get(&at.key.0) else {
            return Err(remote_access(at, len as u64, "no such region"));
        };
        let off = place_in((mem, *access), at, len, permits)?;
        act(mem, off)
    }
}
