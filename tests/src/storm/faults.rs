//! Who does the faults, and looks whether all go on.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rustix::process::Signal;

use super::board::{Board, Phase};
use super::draw::{Chances, Fault, Kind, Ways, draw};
use super::leaks::Watch;
use super::{MOUNTS, TASKS, now};
use crate::cluster::{Cache, Cluster, Role, nodes};
use crate::guard::patience;
use crate::process::tail;

/// Longest time of a call beside the term and the margin: restarts, and a machine that is busy.
const LONGEST: Duration = Duration::from_secs(30);
/// How long all work without a fault at first.
const WARM: Duration = Duration::from_secs(5);
/// After so long nobody holds what was needed for the work only.
const IDLE: Duration = Duration::from_secs(25);
/// Pause while something is awaited.
const PAUSE: Duration = Duration::from_millis(10);

/// The programs that work; killed when dropped.
struct Workers(Vec<Child>);

impl Drop for Workers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A storm on a cluster.
pub struct Storm<'a> {
    cluster: &'a Cluster,
    board: Board,
    workers: Workers,
    rng: StdRng,
    watch: Watch,
    started: Instant,
    faults: usize,
}

impl<'a> Storm<'a> {
    /// Starts the programs; `seed` is for them.
    ///
    /// # Errors
    /// One does not start.
    pub fn start(cluster: &'a Cluster, rng: StdRng, seed: u64) -> anyhow::Result<Self> {
        let at = cluster.path("board");
        let board = Board::open(&at)?;
        let cache = cluster.options().cache;
        board.uncached().store((cache == Cache::Direct).into(), SeqCst);
        board
            .mindful()
            .store((cache != Cache::Writethrough).into(), SeqCst);
        let mut workers = Workers(Vec::new());
        for mount in 0..MOUNTS {
            // Until it has begun its first life.
            let fault = board.begin(mount, false);
            board.done(mount).store(fault, SeqCst);
            workers.0.push(start(cluster, mount, &at, seed)?);
        }
        Ok(Self {
            cluster,
            board,
            workers,
            rng,
            watch: Watch::default(),
            started: Instant::now(),
            faults: 0,
        })
    }

    /// Faults for so long; then everything is well, and nobody holds more than before.
    ///
    /// # Errors
    /// Something is wrong.
    pub fn run(&mut self, length: Duration) -> anyhow::Result<()> {
        let result = self.rage(length).and_then(|()| self.calm());
        for (name, n) in self.board.counts() {
            println!("{n:>9} {name}");
        }
        println!("{:>9} faults", self.faults);
        if result.is_err() {
            self.show();
            for mount in 0..MOUNTS {
                let text = std::fs::read(log(self.cluster, mount)).unwrap_or_default();
                // All of it, to be looked at after the cluster has gone.
                if let Some(dir) = std::env::var_os("FSD_STORM_TRACE") {
                    let _ = std::fs::write(Path::new(&dir).join(format!("worker{mount}")), text);
                }
                eprintln!("--- worker {mount}\n{}", tail(&log(self.cluster, mount), 30));
            }
        }
        result
    }

    /// Faults that were done.
    #[must_use]
    pub fn faults(&self) -> usize {
        self.faults
    }

    /// What was counted.
    #[must_use]
    pub fn board(&self) -> &Board {
        &self.board
    }

    fn rage(&mut self, length: Duration) -> anyhow::Result<()> {
        self.until("all to work", |_, board| Ok(settled(board)))?;
        self.pass(WARM)?;
        self.watch.look(self.cluster);
        let roles = self.cluster.roles();
        let (servers, mounts): (Vec<Role>, Vec<Role>) =
            roles.iter().partition(|r| !matches!(r, Role::Mount(_)));
        // So that there is somebody who has seen everything.
        let spared: Vec<Role> = [servers.choose(&mut self.rng), mounts.choose(&mut self.rng)]
            .into_iter()
            .flatten()
            .copied()
            .collect();
        println!("never killed: {spared:?}");
        let options = self.cluster.options();
        let chances = Chances {
            roles: &roles,
            spared: &spared,
            term: options.term,
            links: options.apart,
        };
        let end = Instant::now() + length;
        while Instant::now() < end {
            let faults = draw(&mut self.rng, chances);
            self.tell(&format!("{faults:?}"));
            self.faults += faults.len();
            self.both(&faults)?;
            // Now and then the next one comes before all have found out about this one.
            if self.rng.random_range(0..4) != 0 {
                self.until("all to have settled", |_, board| Ok(settled(board)))?;
                self.watch.look(self.cluster);
            }
            let pause = Duration::from_millis(self.rng.random_range(0..1500));
            self.pass(pause)?;
        }
        Ok(())
    }

    /// What each mount shows now: tells what one has in its caches only from what all see.
    fn show(&self) {
        for mount in 0..MOUNTS {
            let sums = Command::new("timeout")
                .args(["5", "sh", "-c", "cd \"$0\" && sha256sum cells*"])
                .arg(self.cluster.mount(mount))
                .output();
            let text = sums.map(|out| String::from_utf8_lossy(&out.stdout).into_owned());
            eprintln!("--- mount {mount} shows\n{}", text.unwrap_or_default());
        }
    }

    fn tell(&self, what: &str) {
        println!("{} {:7.3} {what}", now(), self.started.elapsed().as_secs_f64());
    }

    /// Does all of them at once.
    fn both(&self, faults: &[Fault]) -> anyhow::Result<()> {
        // Before anything is done: the status waits for those that are stopped.
        let numbers = if faults.iter().any(|f| matches!(f.kind, Kind::Evict(_))) {
            self.numbers()?
        } else {
            [None; MOUNTS]
        };
        std::thread::scope(|scope| {
            let each = |fault: &Fault| {
                let fault = *fault;
                scope.spawn(move || self.one(fault, numbers).with_context(|| format!("{fault:?}")))
            };
            let threads: Vec<_> = faults.iter().map(each).collect();
            let ended: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            ended
                .into_iter()
                .try_for_each(|r| r.unwrap_or_else(|_| bail!("panic")))
        })
    }

    /// The numbers of the mounts.
    fn numbers(&self) -> anyhow::Result<[Option<u64>; MOUNTS]> {
        let nodes = nodes(&self.cluster.status()?)?;
        Ok(std::array::from_fn(|m| {
            let point = self.cluster.mount(m).display().to_string();
            let of =
                |node: &&serde_json::Value| node["name"].as_str().is_some_and(|name| name.ends_with(&point));
            nodes.iter().find(of)?["node"].as_u64()
        }))
    }

    fn one(&self, fault: Fault, numbers: [Option<u64>; MOUNTS]) -> anyhow::Result<()> {
        let storage = matches!(fault.role, Role::Storage(_)) && !matches!(fault.kind, Kind::Cut(..));
        if storage {
            self.board.outages().fetch_add(1, SeqCst);
        }
        let begun = match (fault.role, fault.kind) {
            // It goes on without the link, or waits, and loses nothing.
            (_, Kind::Cut(other, ..)) if other != Role::Meta => None,
            (Role::Mount(m), Kind::Stop(_) | Kind::Cut(..)) => Some((m, self.board.begin(m, false))),
            (Role::Mount(m), _) => Some((m, self.board.begin(m, true))),
            _ => None,
        };
        match (fault.kind, fault.role) {
            (Kind::Evict(linger), Role::Mount(m)) => {
                self.evict(numbers[m])?;
                std::thread::sleep(linger);
            }
            (Kind::Cut(other, ways, time), role) => {
                let all = match ways {
                    Ways::Both => vec![(role, other), (other, role)],
                    Ways::There => vec![(role, other)],
                    Ways::Back => vec![(other, role)],
                };
                for &(from, to) in &all {
                    self.cluster.cut_way(from, to)?;
                }
                std::thread::sleep(time);
                for &(from, to) in &all {
                    self.cluster.mend_way(from, to)?;
                }
            }
            (Kind::Stop(time), role) => {
                self.cluster.signal(role, Signal::STOP)?;
                std::thread::sleep(time);
                self.cluster.signal(role, Signal::CONT)?;
            }
            (Kind::Kill(pause) | Kind::Evict(pause), role) => {
                self.cluster.kill(role);
                std::thread::sleep(pause);
                self.cluster.start_role(role)?;
            }
        }
        if let Some((m, begun)) = begun {
            self.board.done(m).fetch_max(begun, SeqCst);
        }
        if storage {
            self.board.outage_ended().store(now(), SeqCst);
            self.board.outages().fetch_sub(1, SeqCst);
        }
        Ok(())
    }

    /// The metadata server may be away at the moment.
    fn evict(&self, number: Option<u64>) -> anyhow::Result<()> {
        let number = number.context("the status does not know the mount")?.to_string();
        let config = self.cluster.config().display().to_string();
        let end = Instant::now() + LONGEST * patience();
        loop {
            match self.cluster.tool(&["evict", &number, "--config", &config]) {
                Ok(_) => return Ok(()),
                // The first answer was lost.
                Err(error) if error.to_string().contains("there is no mount") => return Ok(()),
                Err(error) if Instant::now() > end => return Err(error),
                Err(_) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Nothing happens any more.
    fn calm(&mut self) -> anyhow::Result<()> {
        self.until("all to have settled at the end", |_, board| Ok(settled(board)))?;
        self.pass(WARM)?;
        self.watch.look(self.cluster);
        self.board.set_phase(Phase::Stop);
        let looked = |n: u64| move |_: &Cluster, board: &Board| Ok(board.looked().load(SeqCst) == n);
        self.until("all to stop", looked(MOUNTS as u64))?;
        self.board.set_phase(Phase::Look);
        self.until("all to have looked", looked(2 * MOUNTS as u64))?;
        let digests: Vec<u64> = (0..MOUNTS).map(|m| self.board.digest(m).load(SeqCst)).collect();
        ensure!(
            digests.iter().all(|d| *d != 0 && *d == digests[0]),
            "the mounts do not see the same: {digests:x?}"
        );
        self.board.set_phase(Phase::End);
        for child in &mut std::mem::take(&mut self.workers.0) {
            let status = child.wait()?;
            ensure!(status.success(), "a worker has ended with {status}");
        }
        self.until("a status without problems", |cluster, _| {
            let status = cluster.status()?;
            let problems = status["problems"]
                .as_array()
                .context("no problems in the status")?;
            Ok(problems.is_empty())
        })?;
        // Threads that have nothing to do end after a while.
        let end = Instant::now() + IDLE * patience();
        let told = loop {
            match self.watch.compare(self.cluster, 2) {
                Err(_) if Instant::now() < end => std::thread::sleep(PAUSE),
                result => break result?,
            }
        };
        told.iter().for_each(|line| println!("{line}"));
        Ok(())
    }

    /// Waits, and looks whether something is wrong.
    fn pass(&mut self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.check()?;
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    fn until(
        &mut self,
        what: &str,
        holds: impl Fn(&Cluster, &Board) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let start = Instant::now();
        while !holds(self.cluster, &self.board)? {
            self.check()?;
            let options = self.cluster.options();
            ensure!(
                start.elapsed() < (options.term * 6) / 5 + LONGEST * patience(),
                "HUNG: waited in vain for {what}: {:?}",
                (0..MOUNTS)
                    .map(|m| (self.board.begun(m), self.board.done(m), self.board.settled(m)))
                    .collect::<Vec<_>>()
            );
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Nothing is wrong, all programs run, and no call takes too long.
    fn check(&mut self) -> anyhow::Result<()> {
        let wrong = self.board.wrong().load(SeqCst);
        ensure!(
            wrong == 0,
            "{wrong} times something was wrong: {}",
            self.first_wrong()
        );
        for (mount, child) in self.workers.0.iter_mut().enumerate() {
            if let Some(status) = child.try_wait()? {
                bail!("worker {mount} has ended with {status}");
            }
        }
        let longest = (self.cluster.options().term * 6) / 5 + LONGEST * patience();
        for task in 0..TASKS {
            let (since, name) = self.board.call(task);
            let (since, name) = (since.load(SeqCst), name.load(SeqCst).to_le_bytes());
            let taken = Duration::from_nanos(now().saturating_sub(since));
            ensure!(
                since == 0 || taken < longest,
                "HUNG: task {task} is in a call ({}…) since {taken:?}",
                String::from_utf8_lossy(&name)
            );
        }
        Ok(())
    }

    fn first_wrong(&self) -> String {
        let all = (0..MOUNTS).filter_map(|m| std::fs::read_to_string(log(self.cluster, m)).ok());
        let lines: Vec<String> = all
            .flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .collect();
        let wrong = lines.iter().filter(|l| l.contains(" WRONG "));
        wrong.min().cloned().unwrap_or_default()
    }
}

fn settled(board: &Board) -> bool {
    board.safe().iter().all(Option::is_some)
}

fn log(cluster: &Cluster, mount: usize) -> std::path::PathBuf {
    cluster.path(&format!("worker{mount}.log"))
}

fn start(cluster: &Cluster, mount: usize, board: &Path, seed: u64) -> anyhow::Result<Child> {
    let me = std::env::current_exe()?;
    let program = me.ancestors().skip(1).map(|dir| dir.join("storm"));
    let program = program.into_iter().find(|path| path.is_file());
    let out = std::fs::File::create(log(cluster, mount))?;
    Command::new(program.context("not built: cargo build --release -p system-tests")?)
        .args([mount.to_string(), cluster.mount(mount).display().to_string()])
        .arg(board)
        .arg(seed.to_string())
        .stdout(out.try_clone()?)
        .stderr(out)
        .spawn()
        .context("cannot start a worker")
}
