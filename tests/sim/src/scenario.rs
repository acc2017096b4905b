//! What happens in one simulation.

use std::sync::Arc;
use std::time::Duration;

use rt::sim::{Report, Settings};

use crate::faults::Trouble;
use crate::flaws::Flaws;
use crate::shared::Shared;
use crate::world::{Mount, World};

/// How large a simulation is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Mounts.
    pub mounts: usize,
    /// Tasks of each.
    pub tasks: u32,
    /// Calls of each task in a phase.
    pub calls: u32,
    /// Phases.
    pub phases: u32,
}

impl Default for Size {
    fn default() -> Self {
        Self {
            mounts: 2,
            tasks: 2,
            calls: 25,
            phases: 2,
        }
    }
}

/// Runs one.
#[must_use]
pub fn run(seed: u64, size: Size, flaws: Flaws) -> Report {
    let settings = Settings {
        points_between: [1, 3, 10, 40][(seed % 4) as usize],
        longest: Duration::from_secs(1800).as_nanos() as u64,
        ..Settings::new(seed)
    };
    rt::sim::run(settings, move || play(seed, size, flaws))
}

fn play(seed: u64, size: Size, flaws: Flaws) {
    let world = World::new(seed, 1 + (seed % 2) as usize, flaws);
    world.start();
    let mounts: Vec<Mount> = (0..size.mounts)
        .map(|n| world.mount(&format!("mount{n}")))
        .collect();
    let mut files = Vec::new();
    for phase in 0..size.phases {
        let trouble = Trouble::drawn();
        let shared = Shared::new(
            &files,
            1 + u64::from(phase) * 1_000_000,
            trouble.loses_connections(),
        );
        let mut tasks = Vec::new();
        for n in 0..size.tasks {
            for (m, mount) in mounts.iter().enumerate() {
                let (shared, mounted) = (Arc::clone(&shared), mount.mounted.clone());
                let id = 100 * (m as u32 + 1) + n;
                tasks.push(rt::sim::spawn_in(
                    mount.group(),
                    &format!("task{id}"),
                    move || {
                        shared.play(&mounted, id, size.calls);
                    },
                ));
            }
        }
        trouble.make(&world, Duration::from_millis(6));
        for task in tasks {
            let _ = task.join();
        }
        files = shared.settle(&mounts[phase as usize % mounts.len()].mounted);
    }
    for mount in mounts {
        mount.stop();
    }
}
