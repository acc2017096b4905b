//! What the frames and reservations of a file come to, for the kernel: one range around a place.

use crate::cache::state::State;
use fsd_proto::layout::BLOCK;

/// So much is reserved at most beyond what is asked for, bytes; and so far apart lie the windows of a file with holes.
const AHEAD: u64 = 64 << 20;
/// Blocks looked at on each side of a place: of files that are longer, and have holes, less is told than is there.
const LOOK: u64 = 1 << 16;

/// What is set aside for a block: all of its frame, for a larger one is made before the one it replaces is free.
pub(crate) fn reserved_in(state: &State, block: u64) -> u64 {
    state.frames.reserved.get(&block).copied().unwrap_or(0).into()
}

/// So much of a block, from its beginning, is there or set aside.
pub(crate) fn covered(state: &State, block: u64) -> u64 {
    let frame = state.frames.known().get(&block).map_or(0, |f| f.size);
    reserved_in(state, block).max(frame.into())
}

/// What can be stored around a place in a file, which is nothing where that place itself cannot.
pub(crate) fn range_at(state: &State, at: u64) -> (u64, u64) {
    let layout = state.attr.map(|a| a.layout);
    if layout.is_none() || state.frames.layout != layout {
        return (0, 0);
    }
    let block = at / BLOCK;
    if at % BLOCK >= covered(state, block) {
        return (0, 0);
    }
    // Files without holes, however long, need no look at each block.
    let full = |block: u64| covered(state, block) == BLOCK;
    let (mut first, mut last) = match state.frames.whole_up_to().filter(|last| block <= *last) {
        Some(last) => (0, last),
        None => (block, block),
    };
    while first > 0 && block - first < LOOK && full(first - 1) {
        first -= 1;
    }
    let from = last;
    while last - from < LOOK && full(last) && covered(state, last + 1) > 0 {
        last += 1;
    }
    (first * BLOCK, last * BLOCK + covered(state, last))
}

/// What an entry says of a file that is delegated without anybody's having asked for a place in it.
pub(crate) fn range_of(state: &State) -> (u64, u64) {
    match range_at(state, 0) {
        (_, 0) => range_at(state, state.attr.map_or(0, |a| a.size.saturating_sub(1))),
        range => range,
    }
}

/// Blocks (first, end) worth promising beyond those of a write, and of how many of them: what is written to its end is
/// likely to go on as far as it has come, of what has holes the neighbourhood will be wanted.
pub(crate) fn beyond(offset: u64, end: u64, size: u64, begin: u64) -> (u64, u64, u64) {
    if end >= size {
        if end < BLOCK / 2 {
            // A small file costs its own size.
            return (0, 0, 0);
        }
        let next = end.div_ceil(BLOCK);
        let blocks = end.saturating_sub(begin).clamp(BLOCK, AHEAD) / BLOCK;
        return (next, next + blocks, blocks);
    }
    let window = offset / AHEAD * AHEAD;
    let last = (window + AHEAD).min(size).max(end);
    (window / BLOCK, last.div_ceil(BLOCK), AHEAD / BLOCK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_proto::wire::{Attr, Frame};

    fn state(frames: &[(u64, u32)], promised: &[(u64, u32)]) -> State {
        let attr = Attr::of_file(1, 0, 0);
        let mut state = State {
            attr: Some(attr),
            ..State::default()
        };
        state.frames.layout = Some(attr.layout);
        let frame = |&(block, size)| (block, Frame { offset: 0, size });
        for (block, frame) in frames.iter().map(frame) {
            state.frames.learn(block, frame);
        }
        state.frames.reserved.extend(promised.iter().copied());
        state
    }

    const WHOLE: u32 = BLOCK as u32;

    #[test]
    fn a_range_ends_where_something_is_neither_there_nor_promised() {
        assert_eq!(range_at(&state(&[], &[]), 0), (0, 0));
        // The first block may have less than a whole frame, and more may be reserved for it.
        assert_eq!(range_at(&state(&[(0, 4096)], &[]), 100), (0, 4096));
        assert_eq!(range_at(&state(&[(0, 4096)], &[]), 4096), (0, 0));
        assert_eq!(range_at(&state(&[(0, 4096)], &[(0, 16384)]), 4096), (0, 16384));
        let holes = state(&[(0, WHOLE), (1, WHOLE), (5, WHOLE)], &[(2, WHOLE), (7, WHOLE)]);
        for (at, range) in [
            (0, (0, 3)),
            (2, (0, 3)),
            (3, (0, 0)),
            (5, (5, 6)),
            (7, (7, 8)),
            (9, (0, 0)),
        ] {
            assert_eq!(range_at(&holes, at * BLOCK), (range.0 * BLOCK, range.1 * BLOCK));
        }
        // What lies behind a short first block does not follow on it.
        let short = state(&[(0, 4096), (1, WHOLE)], &[]);
        assert_eq!(range_at(&short, 0), (0, 4096));
        assert_eq!(range_at(&short, BLOCK), (BLOCK, 2 * BLOCK));
    }

    #[test]
    fn a_file_without_holes_is_one_range_however_long() {
        let blocks: Vec<(u64, u32)> = (0..3 * LOOK).map(|block| (block, WHOLE)).collect();
        let long = state(&blocks, &[(3 * LOOK, WHOLE)]);
        for at in [0, LOOK * BLOCK, 3 * LOOK * BLOCK - 1] {
            assert_eq!(range_at(&long, at), (0, (3 * LOOK + 1) * BLOCK));
        }
    }

    #[test]
    fn frames_of_another_layout_say_nothing() {
        let mut old = state(&[(0, WHOLE)], &[]);
        old.frames.layout = Some(1);
        assert_eq!(range_at(&old, 0), (0, 0));
    }

    #[test]
    fn the_longer_a_file_gets_the_more_is_promised() {
        assert_eq!(beyond(0, 4096, 0, 0), (0, 0, 0));
        assert_eq!(beyond(0, BLOCK, 0, 0), (1, 2, 1));
        assert_eq!(beyond(9 * BLOCK, 10 * BLOCK, 9 * BLOCK, 0), (10, 20, 10));
        let far = 10 * AHEAD;
        assert_eq!(beyond(far, far + 1, far, 0).2, AHEAD / BLOCK);
        // Not what was never written, before a place far beyond the end.
        assert_eq!(
            beyond(far, far + BLOCK, BLOCK, far),
            (far / BLOCK + 1, far / BLOCK + 2, 1)
        );
    }

    #[test]
    fn a_hole_is_promised_with_its_neighbourhood() {
        assert_eq!(
            beyond(5 * BLOCK, 6 * BLOCK, 20 * BLOCK, 0),
            (0, 20, AHEAD / BLOCK)
        );
        let (first, end, most) = beyond(AHEAD + 5, AHEAD + 6, 10 * AHEAD, 0);
        assert_eq!(
            (first, end, most),
            (AHEAD / BLOCK, 2 * AHEAD / BLOCK, AHEAD / BLOCK)
        );
    }
}
