//! Search over all states, then the search for cycles.
//!
//! States are remembered by 64-bit fingerprints: of 30 million states two would share one with probability
//! 0.00002.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};

use super::options::{Options, Problem};
use super::state::State;

/// A problem, and a way to it; the shortest one, unless the search was depth first.
#[derive(Debug, Clone)]
pub struct Found {
    /// What is wrong.
    pub problem: Problem,
    /// The steps that lead there, each with the state after it.
    pub trace: Vec<String>,
}

/// What an exploration found.
#[derive(Debug, Clone)]
pub struct Report {
    /// States that are not equivalent.
    pub states: usize,
    /// Steps between them.
    pub edges: usize,
    /// States in which nothing happens by itself.
    pub quiescent: usize,
    /// Steps of the longest way taken.
    pub depth: u32,
    /// The first problem.
    pub found: Option<Found>,
}

/// Fingerprints are mixed already.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(b);
        }
    }
    fn write_u64(&mut self, i: u64) {
        self.0 = i;
    }
}

/// How each state was first reached: from which state, by which of its steps.
type Parents = Vec<(u32, u8)>;

/// Where the successors of a state are in the list of edges.
#[derive(Clone, Copy, Default)]
struct Span {
    first: u32,
    n: u32,
}

/// Explores everything.
#[must_use]
pub fn explore(options: &Options, mut progress: impl FnMut(usize, u32)) -> Report {
    let mut seen: HashMap<u64, u32, BuildHasherDefault<Identity>> = HashMap::default();
    let mut parents: Parents = vec![(0, 0)];
    let mut edges: Vec<u32> = Vec::new();
    let mut spans: Vec<Span> = Vec::new();
    let mut frontier = VecDeque::new();
    let mut report = Report {
        states: 0,
        edges: 0,
        quiescent: 0,
        depth: 0,
        found: None,
    };
    let first = State::initial(options);
    seen.insert(first.fingerprint(options), 0);
    frontier.push_back((0u32, first, 0u32));
    let mut next = Vec::new();
    'search: while let Some((index, state, depth)) = if options.depth_first {
        frontier.pop_back()
    } else {
        frontier.pop_front()
    } {
        report.depth = report.depth.max(depth);
        let first_edge = edges.len() as u32;
        next.clear();
        if state.successors(options, &mut next) {
            report.quiescent += 1;
            if let Some(problem) = state.quiescent_problem() {
                report.found = Some(Found {
                    problem,
                    trace: trace(options, &parents, index, None),
                });
                break;
            }
        }
        for (step, state) in next.drain(..).enumerate() {
            if let Some(problem) = state.problem {
                let trace = trace(options, &parents, index, Some(step as u8));
                report.found = Some(Found { problem, trace });
                break 'search;
            }
            let new = parents.len() as u32;
            let id = *seen.entry(state.fingerprint(options)).or_insert(new);
            edges.push(id);
            if id == new {
                parents.push((index, step as u8));
                frontier.push_back((id, state, depth + 1));
                if parents.len().is_multiple_of(1_000_000) {
                    progress(parents.len(), depth);
                }
            }
        }
        if spans.len() <= index as usize {
            spans.resize(parents.len(), Span::default());
        }
        spans[index as usize] = Span {
            first: first_edge,
            n: edges.len() as u32 - first_edge,
        };
        if parents.len() > options.max_states {
            report.found = Some(Found {
                problem: Problem::Limit,
                trace: Vec::new(),
            });
            break;
        }
    }
    report.states = parents.len();
    report.edges = edges.len();
    if report.found.is_none() {
        drop(seen);
        report.found = cycle(&edges, &spans).map(|at| Found {
            problem: Problem::Cycle,
            trace: trace(options, &parents, at, None),
        });
    }
    report
}

/// A state on a cycle or after one: what topological sorting leaves over.
fn cycle(edges: &[u32], spans: &[Span]) -> Option<u32> {
    let n = spans.len();
    let successors = |x: usize| {
        let Span { first, n } = spans[x];
        &edges[first as usize..][..n as usize]
    };
    let mut incoming = vec![0u32; n];
    edges.iter().for_each(|&e| incoming[e as usize] += 1);
    let mut ready: Vec<u32> = (0..n as u32).filter(|&x| incoming[x as usize] == 0).collect();
    while let Some(x) = ready.pop() {
        for &y in successors(x as usize) {
            incoming[y as usize] -= 1;
            if incoming[y as usize] == 0 {
                ready.push(y);
            }
        }
    }
    incoming.iter().position(|&n| n > 0).map(|x| x as u32)
}

fn trace(options: &Options, parents: &Parents, mut index: u32, last: Option<u8>) -> Vec<String> {
    let mut steps: Vec<u8> = last.into_iter().collect();
    while index != 0 {
        let (parent, step) = parents[index as usize];
        steps.push(step);
        index = parent;
    }
    let mut state = State::initial(options);
    let mut lines = Vec::new();
    for &step in steps.iter().rev() {
        let mut next = Vec::new();
        state.successors(options, &mut next);
        let what = state.describe(options, step.into());
        state = next.swap_remove(step.into());
        lines.push(format!("{what}  => {}", state.summary()));
    }
    lines
}
