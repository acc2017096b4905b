//! What operations do at their target.

use std::sync::atomic::Ordering;

use super::remote::{RemoteOp, RemoteResult};
use super::state::{End, EndpointId, PairId, Parcel, State};
use crate::common::remote_access;
use crate::mem::SharedMem;
use crate::regions::place_in;
use crate::{Access, Op, RemoteAddr, TransportError};

impl State {
    /// An operation takes effect at the target.
    pub(super) fn take_op(&mut self, pair: PairId, from: End, op: &RemoteOp, batch: u64, last: bool) {
        let Some(state) = self.pairs.get(&pair) else {
            return;
        };
        let target = state.ends[1 - from].endpoint;
        let result = self.remote(target, op);
        let Some(state) = self.pairs.get_mut(&pair) else {
            return;
        };
        let end = &mut state.ends[1 - from];
        match result {
            Ok(result) => {
                end.gathering.push(result);
                if last {
                    let results = std::mem::take(&mut end.gathering);
                    self.ship(
                        pair,
                        1 - from,
                        Parcel::Results {
                            batch,
                            results: Ok(results),
                        },
                    );
                }
            }
            Err(error) => {
                // In error from now on: nothing behind the failed operation arrives.
                end.alive = false;
                end.why = Some(error.clone());
                self.ship(
                    pair,
                    1 - from,
                    Parcel::Results {
                        batch,
                        results: Err(error),
                    },
                );
            }
        }
    }

    fn remote(&self, target: EndpointId, op: &RemoteOp) -> Result<RemoteResult, TransportError> {
        match op {
            RemoteOp::Read { at, len } => {
                let mut bytes = vec![0; *len];
                self.on_region(
                    target,
                    *at,
                    *len,
                    |a| a.read,
                    |mem, off| mem.read_at(off, &mut bytes),
                )?;
                Ok(RemoteResult::Bytes(bytes))
            }
            RemoteOp::Write { at, bytes } => {
                self.on_region(
                    target,
                    *at,
                    bytes.len(),
                    |a| a.write,
                    |mem, off| mem.write_at(off, bytes),
                )?;
                Ok(RemoteResult::Written)
            }
            RemoteOp::ReadWords { at, words } => self.on_region(
                target,
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
            RemoteOp::Cas { at, expect, new } => self.cas(target, *at, *expect, *new).map(RemoteResult::Old),
            RemoteOp::Faa { at, add } => self.faa(target, *at, *add).map(RemoteResult::Old),
        }
    }

    pub(super) fn execute_one(
        &mut self,
        pair: PairId,
        end: End,
        op: &mut Op<'_>,
    ) -> Result<(), TransportError> {
        let dead = self.dead(pair, end);
        let Some(state) = self.pairs.get(&pair) else {
            return Err(dead);
        };
        let target = state.ends[1 - end].endpoint;
        // A target that has closed or died cannot be told from one whose end has already been seen.
        if !state.ends[end].alive || !state.ends[1 - end].alive || !self.endpoints[target].up {
            return Err(dead);
        }
        match op {
            Op::Read { at, into } => self.on_region(
                target,
                *at,
                into.len(),
                |a| a.read,
                |mem, off| mem.read_at(off, into),
            ),
            Op::Write { at, from } => self.on_region(
                target,
                *at,
                from.len(),
                |a| a.write,
                |mem, off| mem.write_at(off, from),
            ),
            Op::Cas { at, expect, new, old } => self.cas(target, *at, *expect, *new).map(|v| *old = v),
            Op::Faa { at, add, old } => self.faa(target, *at, *add).map(|v| *old = v),
        }
    }

    pub(super) fn cas(
        &self,
        target: EndpointId,
        at: RemoteAddr,
        expect: u64,
        new: u64,
    ) -> Result<u64, TransportError> {
        self.on_region(
            target,
            at,
            8,
            |a| a.atomic,
            |mem, off| {
                Ok(
                    match mem
                        .word(off)?
                        .compare_exchange(expect, new, Ordering::SeqCst, Ordering::SeqCst)
                    {
                        Ok(old) | Err(old) => old,
                    },
                )
            },
        )
    }

    pub(super) fn faa(&self, target: EndpointId, at: RemoteAddr, add: u64) -> Result<u64, TransportError> {
        self.on_region(
            target,
            at,
            8,
            |a| a.atomic,
            |mem, off| Ok(mem.word(off)?.fetch_add(add, Ordering::SeqCst)),
        )
    }

    pub(super) fn on_region<R>(
        &self,
        target: EndpointId,
        at: RemoteAddr,
        len: usize,
        permits: impl Fn(Access) -> bool,
        act: impl FnOnce(&SharedMem, usize) -> Result<R, TransportError>,
    ) -> Result<R, TransportError> {
        let Some((mem, access)) = self.endpoints[target].regions.get(&at.key.0) else {
            return Err(remote_access(at, len as u64, "no such region"));
        };
        let off = place_in((mem, *access), at, len, permits)?;
        act(mem, off)
    }
}
