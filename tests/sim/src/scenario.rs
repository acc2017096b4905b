//! What happens in one simulation.

use std::sync::Arc;
use std::time::Duration;

use fsd_node::fake_disk::Luck;
use rt::sim::{Report, Settings};

use crate::chance::{below, once_in, one_of, wait};
use crate::content::Content;
use crate::faults::{self, Trouble};
use crate::flaws::Flaws;
use crate::owned::{Owner, Pace};
use crate::shared::Shared;
use crate::task::Task;
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
            phases: 3,
        }
    }
}

/// How a phase of owners ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// All leave in order, the servers as well.
    Order,
    /// The mounts leave in order; then the metadata server's host loses power.
    Left(Luck),
    /// The mounts die, and the metadata server's host loses power.
    MetaPower(Luck),
    /// The mounts die.
    Mounts,
    /// One of them does, and the others go on.
    OneMount,
    /// Everything dies, but no host.
    Processes,
    /// All hosts lose power, with so much left of what was not synced.
    Power(Luck),
    /// The storage nodes' hosts do, and the mounts end with them.
    StoragePower(Luck),
}

impl End {
    /// Is what is there afterwards on disks, all of it?
    fn is_durable(self) -> bool {
        matches!(self, Self::Order | Self::Power(_))
    }
}

/// Runs one.
#[must_use]
pub fn run(seed: u64, size: Size, flaws: Flaws) -> Report {
    let settings = Settings {
        points_between: [1, 3, 10, 40][(seed % 4) as usize],
        longest: Duration::from_secs(3600).as_nanos() as u64,
        ..Settings::new(seed)
    };
    rt::sim::run(settings, move || Play::new(seed, size, flaws).play())
}

struct Play {
    world: Arc<World>,
    size: Size,
    mounts: Vec<Mount>,
    owners: Vec<Arc<Owner>>,
    files: Vec<(usize, Content)>,
}

impl Play {
    fn new(seed: u64, size: Size, flaws: Flaws) -> Self {
        let world = World::new(seed, 1 + (seed % 2) as usize, flaws);
        world.start();
        let owners = (0..size.mounts as u64 * u64::from(size.tasks)).map(|n| Owner::new(n + 1));
        let mut play = Self {
            world,
            size,
            mounts: Vec::new(),
            owners: owners.collect(),
            files: Vec::new(),
        };
        play.mount();
        play
    }

    fn mount(&mut self) {
        let mounts = (0..self.size.mounts).map(|n| self.world.mount(&format!("mount{n}")));
        self.mounts = mounts.collect();
    }

    fn play(&mut self) {
        for phase in 0..self.size.phases {
            if one_of(&[true, false]) {
                self.shared(phase);
            } else {
                self.owned();
            }
        }
        for mount in self.mounts.drain(..) {
            mount.stop();
        }
        // Nothing is open any more. A bit left behind would keep its inode for good, and be set twice by the mount that gets the number.
        let used = self.world.used_records();
        if !used.is_empty() {
            rt::sim::fail(format!("all mounts have left, and files are in use: {used:x?}"));
        }
    }

    /// Starts a thread for each task of each mount; its number begins with the mount's.
    fn tasks(
        &self,
        body: impl Fn(usize, u32) -> Box<dyn FnOnce() + Send>,
    ) -> Vec<rt::thread::JoinHandle<()>> {
        let mut tasks = Vec::new();
        for n in 0..self.size.tasks {
            for (m, mount) in self.mounts.iter().enumerate() {
                let id = 100 * (m as u32 + 1) + n;
                tasks.push(rt::sim::spawn_in(mount.group(), &format!("task{id}"), body(m, n)));
            }
        }
        tasks
    }

    /// Starts a thread that makes trouble for the servers, or between the mounts of now.
    fn beside(
        &self,
        name: &str,
        body: impl FnOnce(&World, &[String]) + Send + 'static,
    ) -> rt::thread::JoinHandle<()> {
        let world = Arc::clone(&self.world);
        let mounts: Vec<String> = self.mounts.iter().map(Mount::addr).collect();
        let thread = rt::thread::Builder::new().name(name.into());
        thread.spawn(move || body(&world, &mounts)).expect("a thread")
    }

    fn shared(&mut self, phase: u32) {
        let trouble = Trouble::drawn();
        let stamp = 1 + u64::from(phase) * 1_000_000;
        let shared = Shared::new(&self.files, stamp, trouble.loses_connections());
        let calls = self.size.calls;
        let victim = (once_in(2) && self.mounts.len() > 1 && !trouble.loses_names())
            .then(|| below(self.mounts.len() as u64) as usize);
        if let Some(victim) = victim {
            self.mounts[victim].sync();
        }
        let tasks = self.tasks(|m, n| {
            let (shared, mounted) = (Arc::clone(&shared), self.mounts[m].mounted.clone());
            let id = 100 * (m as u32 + 1) + n;
            let doomed = victim == Some(m);
            Box::new(move || shared.play(&mounted, id, calls, doomed))
        });
        let longest = Duration::from_millis(6);
        let links = self.beside("links", move |world, mounts| {
            faults::cut_links(world, mounts, longest)
        });
        if let Some(victim) = victim {
            wait(longest);
            rt::sim::note(&format!("mount {victim} dies"));
            self.world.kill_mount(self.mounts.remove(victim));
        }
        trouble.make(&self.world, longest);
        links.join().expect("no panic");
        for task in tasks {
            let _ = task.join();
        }
        if let Some(victim) = victim {
            let mount = self.world.mount(&format!("mount{victim}"));
            self.mounts.insert(victim, mount);
        }
        self.files = shared.settle(&self.mounts[phase as usize % self.mounts.len()].mounted);
    }

    fn owned(&mut self) {
        let end = one_of(&[
            End::Order,
            End::Left(Luck::None),
            End::MetaPower(Luck::None),
            End::MetaPower(Luck::Some),
            End::Mounts,
            End::OneMount,
            End::OneMount,
            End::Processes,
            End::Power(Luck::None),
            End::Power(Luck::Some),
            End::Power(Luck::Some),
            End::StoragePower(Luck::None),
            End::StoragePower(Luck::Some),
        ]);
        let pace = one_of(&[Pace::Fast, Pace::Fast, Pace::Slow]);
        let (calls, owners) = (self.size.calls, Arc::new(self.owners.clone()));
        let tasks = self.tasks(|m, n| {
            let (owners, mounted) = (Arc::clone(&owners), self.mounts[m].mounted.clone());
            let mine = m * self.size.tasks as usize + n as usize;
            Box::new(move || owners[mine].play(&mounted, &owners, calls, pace))
        });
        let disks = self.beside("disks", move |world, _| faults::fill_a_disk(world, pace.phase()));
        let links = self.beside("links", move |world, mounts| {
            faults::cut_links(world, mounts, pace.phase());
        });
        if end == End::OneMount {
            wait(pace.phase());
            let victim = below(self.mounts.len() as u64) as usize;
            rt::sim::note(&format!("mount {victim} dies"));
            self.world.kill_mount(self.mounts.remove(victim));
        }
        if matches!(end, End::Order | End::Left(_) | End::OneMount) {
            for task in tasks {
                let _ = task.join();
            }
        } else {
            wait(pace.phase());
        }
        for thread in [disks, links] {
            thread.join().expect("no panic");
        }
        rt::sim::note(&format!("{end:?}"));
        self.end(end);
        self.mount();
        let task = Task::new(&self.mounts[0].mounted, 1);
        for owner in &self.owners {
            owner.check(&task, end.is_durable());
        }
        self.files = Shared::look(&self.mounts[0].mounted);
    }

    fn end(&mut self, end: End) {
        let mounts = std::mem::take(&mut self.mounts);
        if end == End::OneMount {
            // The others have seen what there is, and see that it stays.
            let task = Task::new(&mounts[0].mounted, 1);
            self.owners.iter().for_each(|owner| owner.check(&task, false));
            return mounts.into_iter().for_each(Mount::stop);
        }
        if end == End::Order {
            mounts.into_iter().for_each(Mount::stop);
            self.owners.iter().for_each(|owner| owner.settle());
            self.world.stop();
            return self.world.start();
        }
        if let End::Left(_) = end {
            mounts.into_iter().for_each(Mount::stop);
            self.owners.iter().for_each(|owner| owner.settle_names());
        } else {
            mounts.into_iter().for_each(|mount| self.world.kill_mount(mount));
        }
        let (meta, nodes) = match end {
            End::Order | End::OneMount | End::Mounts => return,
            End::Processes => (Some(Luck::All), Some(Luck::All)),
            End::Power(luck) => (Some(luck), Some(luck)),
            End::Left(luck) | End::MetaPower(luck) => (Some(luck), None),
            End::StoragePower(luck) => (None, Some(luck)),
        };
        if let Some(luck) = meta {
            self.world.crash_meta(luck);
        }
        for n in 0..self.world.nodes() {
            if let Some(luck) = nodes {
                self.world.crash_node(n, luck);
            }
        }
        if meta.is_some() {
            self.world.start_meta();
        }
        for n in 0..nodes.map_or(0, |_| self.world.nodes()) {
            while once_in(2) {
                self.world.start_node_in_vain(n);
            }
            self.world.start_node(n);
        }
    }
}
