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
use crate::shared::{Bears, Part, Shared};
use crate::strain::{Strain, TERM};
use crate::task::{Mounted, Task};
use crate::world::{Mount, Node, World};

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
    /// One of them is stopped, or cut off, and comes back while the others go on.
    OneAway,
    /// Everything dies, but no host.
    Processes,
    /// All hosts lose power, with so much left of what was not synced.
    Power(Luck),
    /// The storage nodes' hosts do, and the mounts, whose leases went with them, begin anew one after the other.
    StorageLost(Luck),
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
        if once_in(3) && self.mounts.len() > 1 {
            return self.strained(phase);
        }
        let trouble = Trouble::drawn();
        let victim = (once_in(2) && self.mounts.len() > 1).then(|| below(self.mounts.len() as u64) as usize);
        let bears = Bears {
            storage: trouble.loses_connections(),
            forgets: victim.is_some() && (trouble.loses_names() || once_in(2)),
            ..Bears::default()
        };
        let (shared, tasks) = self.meet(phase, (bears, Pace::Fast), victim);
        let longest = Duration::from_millis(6);
        let links = self.beside("links", move |world, mounts| {
            faults::cut_links(world, mounts, longest)
        });
        if let Some(victim) = victim {
            wait(longest);
            rt::sim::note(&format!("mount {victim} dies"));
            let mount = self.mounts.remove(victim);
            if trouble.loses_names() {
                // Together with the only other one that knows what it has done.
                self.world.crash_meta(one_of(&[Luck::None, Luck::Some]));
                self.world.kill_mount(mount);
                faults::pause();
                self.world.start_meta();
            } else {
                self.world.kill_mount(mount);
            }
        }
        if victim.is_none() || !trouble.loses_names() {
            trouble.make(&self.world, longest);
        }
        links.join().expect("no panic");
        for task in tasks {
            let _ = task.join();
        }
        if let Some(victim) = victim {
            let mount = self.world.mount(&format!("mount{victim}"));
            self.mounts.insert(victim, mount);
        }
        let mount = &self.mounts[phase as usize % self.mounts.len()];
        self.files = mount.run(move |mounted| shared.settle(mounted));
    }

    /// All mounts' tasks on the same files. Those of a `victim` change nothing that goes with it.
    fn meet(
        &self,
        phase: u32,
        (bears, pace): (Bears, Pace),
        victim: Option<usize>,
    ) -> (Arc<Shared>, Vec<rt::thread::JoinHandle<()>>) {
        let stamp = 1 + u64::from(phase) * 1_000_000;
        let shared = Shared::new(&self.files, stamp, bears);
        if let Some(victim) = victim {
            self.mounts[victim].sync();
            if bears.forgets {
                // Sizes, too: it may be the only one to know them.
                let synced = self.mounts[victim].run(|mounted| Task::new(mounted, 99).fsync_dir());
                assert_eq!(synced, Ok(()), "the servers are there");
            }
        }
        let tasks = self.tasks(|m, n| {
            let (shared, mounted) = (Arc::clone(&shared), self.mounts[m].mounted.clone());
            let part = Part {
                id: 100 * (m as u32 + 1) + n,
                calls: if pace == Pace::Slow { 2 } else { 1 } * self.size.calls,
                doomed: victim == Some(m),
                pace,
            };
            Box::new(move || shared.play(&mounted, part))
        });
        (shared, tasks)
    }

    /// A node is stopped for a while, or links are silent; a server may die besides.
    fn strained(&mut self, phase: u32) {
        let mounts = self.mounts.len();
        let one = below(mounts as u64) as usize;
        let strain = Strain::drawn(&self.world, one, mounts);
        let trouble = one_of(&[Trouble::None, Trouble::None, Trouble::MetaDies, Trouble::NodeDies]);
        let victim = Some(one).filter(|n| strain.may_kill(Node::Mount(*n)));
        let bears = Bears {
            storage: strain.is_storage() || trouble.loses_connections(),
            away: 4 * TERM,
            late: strain.is_long(),
            forgets: victim.is_some() && once_in(2),
        };
        let (shared, tasks) = self.meet(phase, (bears, Pace::Slow), victim);
        let straining = self.strain(strain);
        trouble.make(&self.world, Pace::Slow.phase());
        straining.join().expect("no panic");
        for task in tasks {
            let _ = task.join();
        }
        self.all_but_live(victim);
        if shared.has_given_up() {
            // All of them may know names wrongly.
            for (n, mount) in std::mem::take(&mut self.mounts).into_iter().enumerate() {
                if mount.is_over() || victim == Some(n) {
                    self.world.kill_mount(mount);
                } else {
                    mount.stop();
                }
            }
            self.mount();
            self.files = self.mounts[0].run(Shared::look);
            return;
        }
        let other = (one + 1 + below(mounts as u64 - 1) as usize) % mounts;
        self.files = self.mounts[other].run(move |mounted| shared.settle(mounted));
        if let Some(victim) = victim
            && self.is_dead(victim)
        {
            self.world.kill_mount(self.mounts.remove(victim));
            let mount = self.world.mount(&format!("mount{victim}"));
            self.mounts.insert(victim, mount);
        }
    }

    /// Has a strain begin soon.
    fn strain(&self, strain: Strain) -> rt::thread::JoinHandle<()> {
        let world = Arc::clone(&self.world);
        let mounts: Vec<(String, u32)> = self.mounts.iter().map(|m| (m.addr(), m.group())).collect();
        let thread = rt::thread::Builder::new().name("strain".into());
        let body = move || strain.make(&world, &mounts, Duration::from_secs(4));
        thread.spawn(body).expect("a thread")
    }

    /// Nobody has been declared dead but a victim.
    fn all_but_live(&self, victim: Option<usize>) {
        for (n, mount) in self.mounts.iter().enumerate() {
            if victim != Some(n) && mount.is_over() {
                rt::sim::fail(format!("mount {n} was declared dead, and it was never away"));
            }
        }
    }

    /// Was a mount declared dead? When all nodes run and all links are there it learns that, or that it was not.
    fn is_dead(&self, n: usize) -> bool {
        let began = rt::sim::elapsed();
        while !self.mounts[n].is_over() {
            if self.mounts[n].run(|mounted| mounted.client.session.term.is_valid()) {
                return false;
            }
            if rt::sim::elapsed() - began > Duration::from_secs(60) {
                rt::sim::fail(format!("mount {n} learns nothing of its fate"));
            }
            rt::thread::sleep(Duration::from_millis(10));
        }
        rt::sim::note(&format!("mount {n} was declared dead"));
        true
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
            End::OneAway,
            End::OneAway,
            End::Processes,
            End::Power(Luck::None),
            End::Power(Luck::Some),
            End::Power(Luck::Some),
            End::StoragePower(Luck::None),
            End::StoragePower(Luck::Some),
            End::StorageLost(Luck::None),
            End::StorageLost(Luck::Some),
        ]);
        if end == End::OneAway && self.mounts.len() > 1 {
            return self.away();
        }
        let pace = one_of(&[Pace::Fast, Pace::Fast, Pace::Slow]);
        let tasks = self.own(pace, None);
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
        if matches!(end, End::Order | End::Left(_) | End::OneMount | End::OneAway) {
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
        self.check(end.is_durable());
        self.files = self.mounts[0].run(Shared::look);
    }

    /// All mounts' tasks, each on its own files; but for those of one mount.
    fn own(&self, pace: Pace, without: Option<usize>) -> Vec<rt::thread::JoinHandle<()>> {
        let (calls, owners) = (self.size.calls, Arc::new(self.owners.clone()));
        self.tasks(|m, n| {
            let (owners, mounted) = (Arc::clone(&owners), self.mounts[m].mounted.clone());
            let mine = m * self.size.tasks as usize + n as usize;
            Box::new(move || {
                if without != Some(m) {
                    owners[mine].play(&mounted, &owners, calls, pace);
                }
            })
        })
    }

    /// Looks at everything.
    fn check(&self, durable: bool) {
        let owners = self.owners.clone();
        self.mounts[0].run(move |mounted| {
            let task = Task::new(mounted, 1);
            owners.iter().for_each(|owner| owner.check(&task, durable));
        });
    }

    /// A mount is stopped or cut off while the others go on, and comes back: perhaps it was declared dead.
    fn away(&mut self) {
        let mounts = self.mounts.len();
        let victim = below(mounts as u64) as usize;
        let strain = loop {
            let drawn = Strain::drawn(&self.world, victim, mounts);
            if drawn.may_kill(Node::Mount(victim)) {
                break drawn;
            }
        };
        let tasks = self.own(Pace::Slow, None);
        let straining = self.strain(strain);
        let mut theirs = Vec::new();
        for (n, task) in tasks.into_iter().enumerate() {
            if n % mounts == victim {
                theirs.push(task);
            } else {
                let _ = task.join();
            }
        }
        // What the dead had is used by others before it comes back, and while it does.
        let mut last = false;
        while !last {
            last = straining.is_finished();
            wait(Duration::from_secs(4));
            let pace = one_of(&[Pace::Fast, Pace::Slow]);
            self.own(pace, Some(victim))
                .into_iter()
                .for_each(|task| drop(task.join()));
        }
        straining.join().expect("no panic");
        theirs.into_iter().for_each(|task| drop(task.join()));
        self.all_but_live(Some(victim));
        let dead = self.is_dead(victim);
        let tasks = self.size.tasks as usize;
        let mine: Vec<Arc<Owner>> = self.owners[victim * tasks..(victim + 1) * tasks].to_vec();
        let gone = self.mounts.remove(victim);
        if dead {
            let look = |owners: Vec<Arc<Owner>>| {
                self.mounts[0].run(move |mounted| {
                    let task = Task::new(mounted, 1);
                    owners
                        .iter()
                        .map(|owner| owner.contents(&task))
                        .collect::<Vec<_>>()
                })
            };
            let before = look(mine.clone());
            rt::thread::sleep(Duration::from_secs(3));
            if before != look(mine) {
                rt::sim::fail(format!("what mount {victim} had has changed after its death"));
            }
            self.world.kill_mount(gone);
        } else {
            gone.stop();
        }
        self.end(End::OneMount);
        self.mount();
        self.check(false);
        self.files = self.mounts[0].run(Shared::look);
    }

    /// Mounts whose leases are lost find that out by themselves; each then ends, and another one mounts.
    /// Nobody who has mounted anew may meet one who still answers from what it cached before.
    fn begin_anew(&self, mut mounts: Vec<Mount>) -> Vec<Mount> {
        let (mut joining, began) = (Vec::new(), rt::sim::elapsed());
        let former: Arc<Vec<Mounted>> = Arc::new(mounts.iter().map(|mount| mount.mounted.clone()).collect());
        while !mounts.is_empty() {
            rt::thread::sleep(Duration::from_millis(100));
            let (over, left): (Vec<_>, Vec<_>) = mounts.into_iter().partition(Mount::is_over);
            mounts = left;
            for mount in over {
                self.world.kill_mount(mount);
                let (world, name) = (Arc::clone(&self.world), format!("anew{}", joining.len()));
                let thread = rt::thread::Builder::new().name(name.clone());
                let former = Arc::clone(&former);
                let mount = move || {
                    let mount = world.mount(&name);
                    if former.iter().any(Mounted::answers) {
                        rt::sim::fail(
                            "a mount trusts leases that are lost when another one leases anew".into(),
                        );
                    }
                    mount
                };
                joining.push(thread.spawn(mount).expect("a thread"));
            }
            if rt::sim::elapsed() - began > Duration::from_secs(60) {
                rt::sim::fail("a mount does not find out that its leases are lost".into());
            }
        }
        let joined = joining.into_iter().map(|thread| thread.join().expect("no panic"));
        joined.collect()
    }

    fn end(&mut self, end: End) {
        let mounts = std::mem::take(&mut self.mounts);
        if let End::StorageLost(luck) = end {
            // One may hear nothing of it for a while, and has nobody to ask.
            let away = (once_in(2) && mounts.len() > 1).then(|| mounts[0].addr());
            let links: Vec<[String; 2]> = (0..self.world.nodes())
                .filter_map(|n| {
                    let node = self.world.whereabouts(Node::Storage(n), &[])?.0;
                    Some([node, away.clone()?])
                })
                .collect();
            for [node, mount] in &links {
                self.world.separate([node, mount]);
            }
            for n in 0..self.world.nodes() {
                self.world.crash_node(n, luck);
                self.world.start_node(n);
            }
            let joining = self.beside("links", move |world, _| {
                wait(Duration::from_secs(30));
                for [node, mount] in &links {
                    world.join([node, mount]);
                }
            });
            self.begin_anew(mounts).into_iter().for_each(Mount::stop);
            joining.join().expect("no panic");
            return;
        }
        if end == End::OneMount {
            // The others have seen what there is, and see that it stays.
            let owners = self.owners.clone();
            mounts[0].run(move |mounted| {
                let task = Task::new(mounted, 1);
                owners.iter().for_each(|owner| owner.check(&task, false));
            });
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
            End::Order | End::OneMount | End::OneAway | End::Mounts | End::StorageLost(_) => return,
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
