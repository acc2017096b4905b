//! Which faults are done: drawn from a seed.

use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use crate::cluster::Role;

/// What is done to a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// SIGKILL; it is started again after that time.
    Kill(Duration),
    /// SIGSTOP for that time.
    Stop(Duration),
    /// `fsd evict`; nothing is done about it for that time.
    Evict(Duration),
    /// The link to another process is cut for that time.
    Cut(Role, Ways, Duration),
}

/// In which directions a link is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ways {
    /// Both.
    Both,
    /// What the first sends does not arrive.
    There,
    /// What the other sends does not arrive.
    Back,
}

/// What may be drawn.
#[derive(Debug, Clone, Copy)]
pub struct Chances<'a> {
    /// Processes.
    pub roles: &'a [Role],
    /// Those that are never killed.
    pub spared: &'a [Role],
    /// The term.
    pub term: Duration,
    /// Every other fault is a link that is cut.
    pub links: bool,
}

/// A fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Whose.
    pub role: Role,
    /// Which.
    pub kind: Kind,
}

/// A link that is cut; which one, any pair of processes as likely as another.
fn draw_cut(rng: &mut StdRng, chances: Chances<'_>) -> Option<Fault> {
    let pair: Vec<Role> = chances.roles.choose_multiple(rng, 2).copied().collect();
    // A mount, if there is one, is the one that it is done to.
    let (&role, &other) = match &pair[..] {
        [a, b] if matches!(b, Role::Mount(_)) => (b, a),
        [a, b] => (a, b),
        _ => return None,
    };
    let ways = [Ways::Both, Ways::Both, Ways::There, Ways::Back]
        .choose(rng)
        .copied()?;
    let time = chances.term.mul_f64(rng.random_range(0.0..3.0));
    let kind = Kind::Cut(other, ways, time);
    Some(Fault { role, kind })
}

/// One fault, or two at once.
pub fn draw(rng: &mut StdRng, chances: Chances<'_>) -> Vec<Fault> {
    let mut faults: Vec<Fault> = Vec::new();
    let count = if rng.random_range(0..3) == 0 { 2 } else { 1 };
    while faults.len() < count {
        let Some(role) = chances.roles.choose(rng).copied() else {
            break;
        };
        let short = Duration::from_millis(rng.random_range(0..1500));
        let stop = Kind::Stop(chances.term.mul_f64(rng.random_range(0.0..3.0)));
        let kind = match (role, rng.random_range(0..6)) {
            (_, 0..2) => stop,
            (Role::Mount(_), 2..4) => Kind::Evict(short),
            _ if chances.spared.contains(&role) => stop,
            _ => Kind::Kill(short),
        };
        let mut fault = Some(Fault { role, kind });
        if chances.links && rng.random_range(0..2) == 0 {
            fault = draw_cut(rng, chances);
        }
        faults.extend(fault.filter(|new| faults.iter().all(|f| f.role != new.role)));
    }
    faults
}
