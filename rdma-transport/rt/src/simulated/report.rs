//! What a simulation tells when it has ended.

use std::collections::VecDeque;
use std::fmt::Write;
use std::time::Duration;

use super::task::{Task, TaskId};

/// Notes kept for who looks into a failure.
const KEPT: usize = 400;

/// Why a simulation failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// Nobody can run, and nothing is to come: who waits where.
    Stuck(String),
    /// Longer than it may take: who waits where.
    TooLong(String),
    /// A thread panicked: its name, and what it said.
    Panic(String, String),
    /// The test found something wrong.
    Wrong(String),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stuck(who) => write!(f, "all wait for each other:\n{who}"),
            Self::TooLong(who) => write!(f, "it does not come to an end:\n{who}"),
            Self::Panic(thread, what) => write!(f, "thread {thread} panicked: {what}"),
            Self::Wrong(what) => f.write_str(what),
        }
    }
}

/// How a simulation went.
#[derive(Debug, Clone)]
pub struct Report {
    /// Why it failed, if it did.
    pub failure: Option<Failure>,
    /// The same for the same seed, and for another seed hardly ever.
    pub hash: u64,
    /// Times the baton was passed.
    pub switches: u64,
    /// Virtual time at the end.
    pub time: Duration,
    /// The last notes.
    pub notes: Vec<String>,
}

/// A hash of all that has happened, how often threads were switched, and the last notes.
#[derive(Default)]
pub(super) struct Trace {
    hash: u64,
    switches: u64,
    notes: VecDeque<String>,
}

impl Trace {
    pub(super) fn mix(&mut self, what: u64) {
        self.hash = (self.hash.rotate_left(5) ^ what).wrapping_mul(0x517c_c1b7_2722_0a95);
    }

    pub(super) fn note(&mut self, now: u64, thread: &str, text: &str) {
        for chunk in text.as_bytes().chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.mix(u64::from_le_bytes(word));
        }
        if self.notes.len() == KEPT {
            self.notes.pop_front();
        }
        let micros = now / 1000;
        self.notes.push_back(format!(
            "{:>6}.{:06} {thread}: {text}",
            micros / 1_000_000,
            micros % 1_000_000
        ));
    }

    /// A thread has got its turn.
    pub(super) fn switched(&mut self, to: TaskId, now: u64) {
        self.switches += 1;
        self.mix(to as u64 ^ now << 12);
    }

    pub(super) fn switches(&self) -> u64 {
        self.switches
    }

    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    pub(super) fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes).into()
    }
}

/// A line for each thread that waits.
pub(super) fn who_waits(tasks: &[Task], now: u64) -> String {
    let mut text = String::new();
    for task in tasks.iter().filter(|t| !t.done) {
        let _ = match task.wait {
            Some(wait) => writeln!(
                text,
                "  {} ({}): {:?} at {} for {:?}",
                task.name,
                task.group,
                wait.why,
                wait.at,
                Duration::from_nanos(now - wait.since)
            ),
            None => writeln!(text, "  {} ({}): runs", task.name, task.group),
        };
    }
    text
}
