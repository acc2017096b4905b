//! A checker of linearizability: Wing and Gong's search with Lowe's memory of states seen.
//!
//! A history is linearizable if every operation can be put at one moment between its call and its return such
//! that the sequence is one that a single copy could have shown. The search takes, again and again, an
//! operation that was called before any other returned, and goes back where the results do not fit; a pair
//! (operations done, state) that was tried once is not tried again.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

/// What a single copy does.
pub trait Model {
    /// An operation together with its result.
    type Op;
    /// State of the single copy.
    type State: Clone + Eq + Hash;
    /// The state at the beginning.
    fn start(&self) -> Self::State;
    /// The state after the operation, or none if a single copy could not have given this result.
    fn step(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;
}

/// One operation of a history.
#[derive(Debug, Clone)]
pub struct Event<Op> {
    /// What was done and what came back.
    pub op: Op,
    /// Before the call.
    pub called: u64,
    /// After the return; none if it is unknown whether it took effect, now or at any later time.
    pub returned: Option<u64>,
}

const NONE: usize = usize::MAX;

/// Calls and returns in the order of time, as a doubly linked list whose first node is a head.
struct Timeline {
    next: Vec<usize>,
    prev: Vec<usize>,
    /// Index of the operation, and whether this is its call.
    what: Vec<(usize, bool)>,
    /// Of each operation: its nodes.
    nodes: Vec<(usize, usize)>,
}

impl Timeline {
    fn new<Op>(history: &[Event<Op>]) -> Self {
        let mut order: Vec<(u64, bool, usize)> = Vec::new();
        for (i, event) in history.iter().enumerate() {
            order.push((event.called, false, i));
            if let Some(returned) = event.returned {
                // One tick of the clock may hold a return and a later call: taken as concurrent, never as order.
                order.push((returned, true, i));
            }
        }
        order.sort_unstable();
        let count = order.len() + 1;
        let mut timeline = Self {
            next: (1..=count).map(|i| if i == count { NONE } else { i }).collect(),
            prev: (0..count).map(|i| i.wrapping_sub(1)).collect(),
            what: vec![(NONE, false)],
            nodes: vec![(NONE, NONE); history.len()],
        };
        for (node, (_, is_return, op)) in order.into_iter().enumerate() {
            timeline.what.push((op, !is_return));
            let nodes = &mut timeline.nodes[op];
            *(if is_return { &mut nodes.1 } else { &mut nodes.0 }) = node + 1;
        }
        timeline
    }

    fn unlink(&mut self, node: usize) {
        if node != NONE {
            let (prev, next) = (self.prev[node], self.next[node]);
            self.next[prev] = next;
            if next != NONE {
                self.prev[next] = prev;
            }
        }
    }

    fn relink(&mut self, node: usize) {
        if node != NONE {
            let (prev, next) = (self.prev[node], self.next[node]);
            self.next[prev] = node;
            if next != NONE {
                self.prev[next] = node;
            }
        }
    }

    fn lift(&mut self, op: usize) {
        let (call, ret) = self.nodes[op];
        self.unlink(call);
        self.unlink(ret);
    }

    fn unlift(&mut self, op: usize) {
        let (call, ret) = self.nodes[op];
        self.relink(ret);
        self.relink(call);
    }
}

/// Checks a history.
///
/// # Errors
/// It is not linearizable: the index of an operation that could not be placed where the search got furthest.
pub fn check<M: Model>(model: &M, history: &[Event<M::Op>]) -> Result<(), usize> {
    let mut timeline = Timeline::new(history);
    let mut open = history.iter().filter(|e| e.returned.is_some()).count();
    let mut done = vec![0u64; history.len().div_ceil(64)];
    let mut seen: HashSet<(Vec<u64>, M::State)> = HashSet::new();
    let mut path: Vec<(usize, M::State)> = Vec::new();
    let mut state = model.start();
    let mut node = timeline.next[0];
    // Where the search was blocked at its deepest.
    let mut furthest = (0, NONE);
    while open > 0 {
        let (op, is_call) = if node == NONE {
            (NONE, false)
        } else {
            timeline.what[node]
        };
        if is_call {
            let taken = model.step(&state, &history[op].op).filter(|next| {
                done[op / 64] |= 1 << (op % 64);
                let new = seen.insert((done.clone(), next.clone()));
                if !new {
                    done[op / 64] &= !(1 << (op % 64));
                }
                new
            });
            if let Some(next) = taken {
                path.push((op, std::mem::replace(&mut state, next)));
                open -= usize::from(history[op].returned.is_some());
                timeline.lift(op);
                node = timeline.next[0];
            } else {
                node = timeline.next[node];
            }
            continue;
        }
        // An operation returned that could not be placed (or nothing is left to try): undo the last choice.
        if path.len() >= furthest.0 && op != NONE {
            furthest = (path.len(), op);
        }
        let Some((last, before)) = path.pop() else {
            return Err(furthest.1);
        };
        state = before;
        done[last / 64] &= !(1 << (last % 64));
        open += usize::from(history[last].returned.is_some());
        timeline.unlift(last);
        node = timeline.next[timeline.nodes[last].0];
    }
    Ok(())
}

/// A block with one value: overwritten and read as a whole.
#[derive(Debug)]
pub struct Register;

/// What can be done to a register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterOp {
    /// A value was written.
    Write(u64),
    /// A value was read.
    Read(u64),
}

impl Model for Register {
    type Op = RegisterOp;
    type State = u64;
    fn start(&self) -> u64 {
        0
    }
    fn step(&self, state: &u64, op: &RegisterOp) -> Option<u64> {
        match op {
            RegisterOp::Write(value) => Some(*value),
            RegisterOp::Read(value) => (value == state).then_some(*state),
        }
    }
}

/// A file of records, each appended once: appended to, truncated, read as a whole.
#[derive(Debug, Default)]
pub struct Records {
    /// What stood before a record when it was appended, where a read tells: nothing before it can change while
    /// it is there. Without this the search would try every order of concurrent appends.
    before: HashMap<u64, Vec<u64>>,
}

impl Records {
    /// For checking this history.
    #[must_use]
    pub fn of(history: &[Event<RecordsOp>]) -> Self {
        let mut before = HashMap::new();
        for event in history {
            if let RecordsOp::Read(records) = &event.op {
                for (i, record) in records.iter().enumerate().filter(|(_, r)| **r != 0) {
                    before.entry(*record).or_insert_with(|| records[..i].to_vec());
                }
            }
        }
        Self { before }
    }
}

/// What can be done to a file of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordsOp {
    /// A record was appended.
    Append(u64),
    /// All but the first so many were cut off; zeros take the place of missing ones.
    Truncate(usize),
    /// All were read.
    Read(Vec<u64>),
    /// The number of records, from the size.
    Count(usize),
}

impl Model for Records {
    type Op = RecordsOp;
    type State = Vec<u64>;
    fn start(&self) -> Vec<u64> {
        Vec::new()
    }
    fn step(&self, state: &Vec<u64>, op: &RecordsOp) -> Option<Vec<u64>> {
        match op {
            RecordsOp::Append(record) => {
                if self.before.get(record).is_some_and(|before| before != state) {
                    return None;
                }
                let mut next = state.clone();
                next.push(*record);
                Some(next)
            }
            RecordsOp::Truncate(count) => {
                let mut next = state.clone();
                next.resize(*count, 0);
                Some(next)
            }
            RecordsOp::Read(records) => (records == state).then(|| state.clone()),
            RecordsOp::Count(count) => (*count == state.len()).then(|| state.clone()),
        }
    }
}

/// A few names for numbered files; none leads anywhere at the beginning.
#[derive(Debug)]
pub struct Names {
    /// How many.
    pub count: usize,
}

/// What can be done to names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamesOp {
    /// A rename of another file over whatever was there.
    Replace(usize, u64),
    /// A rename to somewhere else; what was moved, none for "no such file".
    Take(usize, Option<u64>),
    /// A new file; false for "exists".
    Create(usize, u64, bool),
    /// A name taken away; false for "no such file".
    Unlink(usize, bool),
    /// What a name leads to.
    Stat(usize, Option<u64>),
}

impl Model for Names {
    type Op = NamesOp;
    type State = Vec<Option<u64>>;
    fn start(&self) -> Self::State {
        vec![None; self.count]
    }
    fn step(&self, state: &Self::State, op: &NamesOp) -> Option<Self::State> {
        let mut next = state.clone();
        let fits = match op {
            NamesOp::Replace(name, id) => {
                next[*name] = Some(*id);
                true
            }
            NamesOp::Take(name, id) => {
                next[*name] = None;
                *id == state[*name]
            }
            NamesOp::Create(name, id, ok) => {
                if *ok {
                    next[*name] = Some(*id);
                }
                *ok == state[*name].is_none()
            }
            NamesOp::Unlink(name, ok) => {
                next[*name] = None;
                *ok == state[*name].is_some()
            }
            NamesOp::Stat(name, id) => *id == state[*name],
        };
        fits.then_some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event<Op>(op: Op, called: u64, returned: u64) -> Event<Op> {
        Event {
            op,
            called,
            returned: Some(returned),
        }
    }

    fn registers(events: &[(RegisterOp, u64, u64)]) -> Result<(), usize> {
        let history: Vec<_> = events
            .iter()
            .map(|(op, c, r)| event(op.clone(), *c, *r))
            .collect();
        check(&Register, &history)
    }

    use RegisterOp::{Read, Write};

    #[test]
    fn sequences_of_a_single_copy_are_accepted() {
        assert_eq!(registers(&[]), Ok(()));
        assert_eq!(
            registers(&[(Read(0), 0, 1), (Write(1), 2, 3), (Read(1), 4, 5)]),
            Ok(())
        );
    }

    #[test]
    fn a_stale_read_is_rejected() {
        assert_eq!(registers(&[(Write(1), 0, 1), (Read(0), 2, 3)]), Err(1));
        assert!(registers(&[(Write(1), 0, 1), (Write(2), 2, 3), (Read(1), 4, 5)]).is_err());
    }

    #[test]
    fn a_read_beside_a_write_may_see_either() {
        assert_eq!(
            registers(&[(Write(1), 0, 9), (Read(0), 1, 2), (Read(1), 3, 4)]),
            Ok(())
        );
    }

    #[test]
    fn what_was_seen_once_stays() {
        assert!(registers(&[(Write(1), 0, 9), (Read(1), 1, 2), (Read(0), 3, 4)]).is_err());
    }

    #[test]
    fn two_readers_must_agree_on_the_order_of_writes() {
        let writes = [(Write(1), 0, 9), (Write(2), 0, 9)];
        let one = [(Read(1), 10, 11), (Read(2), 12, 13)];
        assert!(registers(&[writes.clone(), one].concat()).is_err());
        let inside = [(Read(1), 1, 2), (Read(2), 3, 4), (Read(2), 10, 11)];
        assert_eq!(registers(&[writes.to_vec(), inside.to_vec()].concat()), Ok(()));
        let undone = [(Read(1), 1, 2), (Read(2), 3, 4), (Read(1), 5, 6)];
        assert!(registers(&[writes.to_vec(), undone.to_vec()].concat()).is_err());
    }

    #[test]
    fn a_value_from_nowhere_is_rejected() {
        assert!(registers(&[(Write(1), 0, 1), (Read(7), 2, 3)]).is_err());
    }

    #[test]
    fn an_operation_of_unknown_outcome_may_take_effect_late_or_never() {
        let unknown = Event {
            op: Write(1),
            called: 0,
            returned: None,
        };
        let late = [unknown.clone(), event(Read(0), 1, 2), event(Read(1), 3, 4)];
        assert_eq!(check(&Register, &late), Ok(()));
        let never = [unknown.clone(), event(Read(0), 1, 2), event(Read(0), 3, 4)];
        assert_eq!(check(&Register, &never), Ok(()));
        let undone = [unknown, event(Read(1), 1, 2), event(Read(0), 3, 4)];
        assert!(check(&Register, &undone).is_err());
    }

    #[test]
    fn equal_times_count_as_concurrent() {
        assert_eq!(registers(&[(Write(1), 0, 5), (Read(0), 5, 6)]), Ok(()));
    }

    fn records(history: &[Event<RecordsOp>]) -> Result<(), usize> {
        let quick = check(&Records::of(history), history);
        // What is left out of the search never decides.
        assert_eq!(quick.is_ok(), check(&Records::default(), history).is_ok());
        quick
    }

    #[test]
    fn many_concurrent_appends_are_quick() {
        let append = |n: u64| event(RecordsOp::Append(n), 0, 100);
        let mut history: Vec<_> = (1..=60).map(append).collect();
        history.push(event(RecordsOp::Read((1..=60).rev().collect()), 200, 201));
        assert_eq!(check(&Records::of(&history), &history), Ok(()));
        history.push(event(RecordsOp::Count(59), 300, 301));
        assert!(check(&Records::of(&history), &history).is_err());
    }

    #[test]
    fn lost_and_doubled_records_are_rejected() {
        let append = |n, c, r| event(RecordsOp::Append(n), c, r);
        let read = |v: &[u64]| event(RecordsOp::Read(v.to_vec()), 10, 11);
        assert_eq!(
            records(&[append(1, 0, 5), append(2, 0, 5), read(&[2, 1])]),
            Ok(())
        );
        assert!(records(&[append(1, 0, 5), append(2, 0, 5), read(&[2])]).is_err());
        assert!(records(&[append(1, 0, 1), append(2, 2, 3), read(&[2, 1])]).is_err());
        let cut = event(RecordsOp::Truncate(0), 0, 9);
        assert_eq!(records(&[append(1, 0, 5), cut.clone(), read(&[1])]), Ok(()));
        assert_eq!(records(&[append(1, 0, 5), cut, read(&[])]), Ok(()));
    }

    #[test]
    fn a_name_is_never_absent_during_a_rename_over_it() {
        let names = Names { count: 2 };
        let first = event(NamesOp::Create(1, 7, true), 0, 1);
        let replace = event(NamesOp::Replace(1, 8), 2, 9);
        let stat = |id, c, r| event(NamesOp::Stat(1, id), c, r);
        let fine = [
            first.clone(),
            replace.clone(),
            stat(Some(7), 3, 4),
            stat(Some(8), 5, 6),
        ];
        assert_eq!(check(&names, &fine), Ok(()));
        assert!(check(&names, &[first.clone(), replace.clone(), stat(None, 3, 4)]).is_err());
        assert!(
            check(
                &names,
                &[first, replace, stat(Some(8), 3, 4), stat(Some(7), 5, 6)]
            )
            .is_err()
        );
    }

    #[test]
    fn only_one_takes_a_name_away() {
        let names = Names { count: 1 };
        let first = event(NamesOp::Create(0, 7, true), 0, 1);
        let take = event(NamesOp::Take(0, Some(7)), 2, 9);
        let lost = event(NamesOp::Unlink(0, false), 2, 9);
        let won = event(NamesOp::Unlink(0, true), 2, 9);
        assert_eq!(check(&names, &[first.clone(), take.clone(), lost]), Ok(()));
        assert!(check(&names, &[first, take, won]).is_err());
    }

    /// Many threads, one register: the memory of states keeps the search short.
    #[test]
    fn long_concurrent_histories_are_quick() {
        let mut events = Vec::new();
        for i in 0..2000u64 {
            let op = if i % 4 == 0 {
                Write(i + 1)
            } else {
                Read(i - i % 4 + 1)
            };
            events.push((op, i * 10, i * 10 + 35));
        }
        assert_eq!(registers(&events), Ok(()));
        events[1500].0 = Read(3);
        assert!(registers(&events).is_err());
    }
}
