//! Servers that die and come back while tasks are at work.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use fsd_node::fake_disk::Luck;

use crate::chance::{below, once_in, one_of, wait};
use crate::world::World;

/// What happens to servers in a phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// Nothing.
    None,
    /// The metadata server's process dies.
    MetaDies,
    /// The metadata server's host loses power.
    MetaPower,
    /// It does, and the server dies again when the mounts tell it what it has lost.
    MetaTwice,
    /// A storage node's process dies.
    NodeDies,
    /// One after the other, any of these.
    Any,
}

impl Trouble {
    /// As the seed says.
    #[must_use]
    pub fn drawn() -> Self {
        one_of(&[
            Self::None,
            Self::None,
            Self::MetaDies,
            Self::MetaPower,
            Self::MetaTwice,
            Self::NodeDies,
            Self::Any,
        ])
    }

    /// May the metadata server's host lose power? Then what a mount that is dead by then has done to names, and nobody has seen, goes with it.
    #[must_use]
    pub fn loses_names(self) -> bool {
        matches!(self, Self::MetaPower | Self::MetaTwice | Self::Any)
    }

    /// May a storage node die?
    #[must_use]
    pub fn loses_connections(self) -> bool {
        matches!(self, Self::NodeDies | Self::Any)
    }

    /// Makes it, once or a few times.
    pub fn make(self, world: &Arc<World>, longest: Duration) {
        let times = match self {
            Self::None => 0,
            _ => 1 + below(2),
        };
        for _ in 0..times {
            wait(longest);
            let what = match self {
                Self::Any => one_of(&[Self::MetaDies, Self::MetaPower, Self::MetaTwice, Self::NodeDies]),
                one => one,
            };
            rt::sim::note(&format!("{what:?}"));
            match what {
                Self::NodeDies => {
                    let n = below(world.nodes() as u64) as usize;
                    world.crash_node(n, Luck::All);
                    pause();
                    world.start_node(n);
                }
                Self::MetaDies => {
                    world.crash_meta(Luck::All);
                    pause();
                    world.start_meta();
                }
                Self::MetaTwice => {
                    world.crash_meta(one_of(&[Luck::None, Luck::Some]));
                    world.start_meta();
                    wait(Duration::from_millis(120));
                    world.crash_meta(one_of(&[Luck::None, Luck::Some, Luck::All]));
                    pause();
                    world.start_meta();
                }
                _ => {
                    world.crash_meta(one_of(&[Luck::None, Luck::Some]));
                    pause();
                    world.start_meta();
                }
            }
            rt::sim::note(&"it is back");
        }
    }
}

/// For how long a link stays away, at most: the last is longer than a call waits for a lease.
const AWAY: [Duration; 4] = [
    Duration::from_millis(3),
    Duration::from_secs(2),
    Duration::from_secs(20),
    Duration::from_secs(90),
];

/// In one phase of three the links between mounts break, a few times; now and then one stays away for a while, or longer than calls
/// wait for a lease.
pub fn cut_links(world: &World, mounts: &[String], phase: Duration) {
    let times = if once_in(3) && mounts.len() > 1 {
        1 + below(6)
    } else {
        0
    };
    for _ in 0..times {
        wait(phase / 3);
        let one = below(mounts.len() as u64) as usize;
        let other = (one + 1 + below(mounts.len() as u64 - 1) as usize) % mounts.len();
        let both = [mounts[one].as_str(), mounts[other].as_str()];
        rt::sim::note(&format!("no link between {} and {}", both[0], both[1]));
        let away = once_in(3);
        if away {
            world.separate(both);
        }
        // Else connections are up, and silent.
        if !away || once_in(2) {
            world.cut(both);
        }
        if away {
            wait(one_of(&AWAY));
            rt::sim::note(&format!("the link between {} and {} is back", both[0], both[1]));
            world.join(both);
        }
    }
}

/// In one phase of three a disk has no room for a while.
pub fn fill_a_disk(world: &World, phase: Duration) {
    if !once_in(3) {
        return;
    }
    let node = below(world.nodes() as u64) as usize;
    let full = &world.platter(node).faults.full;
    wait(phase / 2);
    full.store(true, Ordering::Relaxed);
    rt::sim::note(&format!("disk {node} is full"));
    wait(phase / 2);
    full.store(false, Ordering::Relaxed);
    rt::sim::note(&format!("disk {node} has room"));
}

/// While nobody is there: often not long enough for anybody to notice.
pub fn pause() {
    if once_in(2) {
        wait(Duration::from_millis(2));
    } else {
        wait(Duration::from_secs(3));
    }
}
