//! Guests made into nodes: a set of addresses with an rxe device each, on which programs run.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::guest::{Guest, Plan};
use crate::journal::Journal;
use crate::link::{Finished, Running};
use crate::options::{Options, Tier};
use crate::process::{self, lock};
use crate::proto::{Program, Size};
use crate::qemu::{Disk, Places};
use crate::switch::Switch;
use crate::{snapshot, tools};

/// Longest time for what is done to set a guest up or to collect from it.
pub(crate) const HELPER_LIMIT: Duration = Duration::from_secs(60);
/// Characters of a failed command's output that its error shows.
const SHOWN: usize = 1200;

/// By which programs in guests know [`Options::seed`]; the tests of the whole system draw their random numbers from it.
const CHANCE: &str = "FSD_CHANCE";

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// From 1.
    pub number: usize,
    /// The guest it is in, from 1.
    pub guest: usize,
    /// Its network device.
    pub card: String,
    /// Its RDMA device.
    pub device: String,
    /// Its address.
    pub ip: String,
    /// The index of its RoCE v2 GID for that address.
    pub gid: u32,
}

/// A running cluster. Dropped, it is ended at once; [`Cluster::finish`] does so in order and checks it.
#[derive(Debug)]
pub struct Cluster {
    options: Options,
    switch: Switch,
    guests: Vec<Guest>,
    nodes: Mutex<Vec<Node>>,
    expired: Arc<AtomicBool>,
    watchdog: Option<Sender<()>>,
    journal: Journal,
}

impl Cluster {
    /// Boots the guests and sets up their nodes. Logs go to the folder `logs`, which is made anew.
    ///
    /// # Errors
    /// Something is missing, or a guest does not come up.
    pub fn start(options: Options, logs: &Path) -> Result<Cluster> {
        options.check()?;
        let journal = Journal::begin(logs)?;
        let job = journal.job();
        let image = options.image()?;
        let machine = options.machine();
        let disk = options.disk.map(Disk::new).transpose()?;
        let places = |name: &str, disk: Option<Disk>| Places {
            console: logs.join(format!("{name}.console")),
            log: logs.join(format!("{name}.qemu")),
            job: job.clone(),
            target: options.target.clone(),
            disk,
        };
        let mut file = None;
        if options.from_snapshot() {
            let path = snapshot::path(&options.cache, &image, machine)?;
            if !snapshot::there(&path) {
                // Of the same size, and nobody else's.
                let places = places("snapshot", options.disk.map(Disk::new).transpose()?);
                snapshot::save(&path, &image, machine, &places, options.boot_limit)?;
            }
            file = Some(path);
        }
        let switch = Switch::default();
        let guests = if options.tier == Tier::Single {
            1
        } else {
            options.nodes
        };
        let guests = (1..=guests)
            .map(|number| {
                let plan = Plan {
                    number,
                    image: image.clone(),
                    machine,
                    places: places(&format!("guest{number}"), disk.clone()),
                    snapshot: file.clone(),
                    boot_limit: options.boot_limit,
                };
                Guest::new(plan, switch.clone())
            })
            .collect();
        let nodes = (1..=options.nodes)
            .map(|number| Node {
                number,
                guest: if options.tier == Tier::Single { 1 } else { number },
                card: if options.tier == Tier::Single {
                    format!("v{number}")
                } else {
                    "eth0".into()
                },
                device: format!("rxe{number}"),
                ip: format!("10.77.0.{number}"),
                gid: 0,
            })
            .collect();
        let mut cluster = Cluster {
            options,
            switch,
            guests,
            nodes: Mutex::new(nodes),
            expired: Arc::default(),
            watchdog: None,
            journal,
        };
        cluster.boot_all()?;
        cluster.watch();
        Ok(cluster)
    }

    fn boot_all(&self) -> Result<()> {
        std::thread::scope(|scope| {
            let boots: Vec<_> = self
                .guests
                .iter()
                .map(|guest| scope.spawn(|| self.bring_up(guest)))
                .collect();
            let results: Vec<Result<()>> = boots
                .into_iter()
                .map(|boot| {
                    boot.join()
                        .unwrap_or_else(|_| Err(Error::check("booting a guest panicked")))
                })
                .collect();
            results.into_iter().collect()
        })
    }

    /// From off to nodes that are of use.
    pub(crate) fn bring_up(&self, guest: &Guest) -> Result<()> {
        guest.boot()?;
        let number = guest.plan().number;
        let mtu = self.options.mtu;
        let (set_up, own) = match self.options.tier {
            Tier::Single => {
                let nodes = self.options.nodes;
                (format!("/lab/nodes {nodes} {mtu}"), (1..=nodes).collect())
            }
            Tier::Multi => (format!("/lab/node {number} {mtu}"), vec![number]),
        };
        let list = own.iter().map(|node| format!(" {node}")).collect::<String>();
        // The driver finds the disk also where the guest was saved before it was loaded.
        let disk = self.options.disk.map_or("", |_| "modprobe virtio_blk && ");
        let script = format!("/lab/shares && {disk}{set_up} && /lab/settle{list}");
        let program = Program {
            argv: vec!["dash".into(), "-c".into(), script],
            ..Program::default()
        };
        let done = guest.link()?.start(program)?.wait(HELPER_LIMIT)?;
        if !done.ending.ok() {
            return Err(failed("the set-up of the network", &guest.name(), &done));
        }
        let mut nodes = lock(&self.nodes);
        for line in done.out.lines() {
            let mut numbers = line.split(' ').map(str::parse::<u32>);
            if let (Some(Ok(node)), Some(Ok(gid))) = (numbers.next(), numbers.next()) {
                let found = nodes
                    .iter_mut()
                    .find(|entry| u32::try_from(entry.number) == Ok(node));
                if let Some(entry) = found {
                    entry.gid = gid;
                }
            }
        }
        Ok(())
    }

    /// Ends all guests when the time is over, so that whatever waits for one fails.
    fn watch(&mut self) {
        let (tx, rx) = channel::<()>();
        let (limit, expired) = (self.options.limit, Arc::clone(&self.expired));
        std::thread::spawn(move || {
            let mut wait = limit;
            // Again and again: a guest may just have been about to be booted.
            while rx.recv_timeout(wait) == Err(RecvTimeoutError::Timeout) {
                expired.store(true, Ordering::SeqCst);
                process::end_all();
                wait = Duration::from_secs(1);
            }
        });
        self.watchdog = Some(tx);
    }

    /// What the cluster was asked to be.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The folder of the logs; its sub-folder `job` is what guests have as /job.
    pub fn logs(&self) -> &Path {
        self.journal.logs()
    }

    /// The folder that guests have as /job.
    pub fn job(&self) -> PathBuf {
        self.journal.job()
    }

    /// The switch between the guests.
    pub fn switch(&self) -> &Switch {
        &self.switch
    }

    /// Says what is done from here on, for whoever looks on and for the report of a failure.
    pub fn step(&self, what: &str) {
        eprintln!("  - {what}");
        self.enter(what);
    }

    /// As [`Cluster::step`], for the report only.
    pub fn enter(&self, what: &str) {
        self.journal.enter(what);
    }

    /// Writes a line, or several, into the journal of the run.
    pub fn write_down(&self, what: &str) {
        self.journal.write_down(what);
    }

    /// All nodes.
    pub fn nodes(&self) -> Vec<Node> {
        lock(&self.nodes).clone()
    }

    /// A node, from 1.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn node(&self, number: usize) -> Result<Node> {
        let missing = || Error::check(format!("there is no node {number} in this cluster"));
        lock(&self.nodes)
            .iter()
            .find(|node| node.number == number)
            .cloned()
            .ok_or_else(missing)
    }

    /// All guests.
    pub fn guests(&self) -> &[Guest] {
        &self.guests
    }

    /// A guest, from 1.
    ///
    /// # Errors
    /// There is none of this number.
    pub fn guest(&self, number: usize) -> Result<&Guest> {
        let missing = || Error::check(format!("there is no guest {number} in this cluster"));
        number
            .checked_sub(1)
            .and_then(|index| self.guests.get(index))
            .ok_or_else(missing)
    }

    /// What a program on a node is told by its environment.
    fn environment(&self, node: &Node) -> Vec<(String, String)> {
        let all = |part: fn(&Node) -> String| self.nodes().iter().map(part).collect::<Vec<_>>().join(" ");
        let chance = self
            .options
            .seed
            .map(|seed| (CHANCE.to_owned(), seed.to_string()));
        [
            ("LAB_NODE", node.number.to_string()),
            ("LAB_NODES", self.options.nodes.to_string()),
            ("LAB_GUEST", node.guest.to_string()),
            ("LAB_TIER", self.options.tier.to_string()),
            ("LAB_CARD", node.card.clone()),
            ("LAB_DEVICE", node.device.clone()),
            ("LAB_DEVICES", all(|node| node.device.clone())),
            ("LAB_GID", node.gid.to_string()),
            ("LAB_IP", node.ip.clone()),
            ("LAB_IPS", all(|node| node.ip.clone())),
        ]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .chain(chance)
        .collect()
    }

    /// Starts a program on a node; `terminal` gives it one.
    ///
    /// # Errors
    /// There is no such node, or its guest is gone.
    pub fn start_program(&self, node: usize, argv: &[String], terminal: Option<Size>) -> Result<Running> {
        let node = self.node(node)?;
        let env = self.environment(&node);
        let program = Program {
            argv: argv.to_vec(),
            env,
            dir: "/job".into(),
            terminal,
        };
        self.guest(node.guest)?.link()?.start(program)
    }

    /// Starts a shell command on a node.
    ///
    /// # Errors
    /// As [`Cluster::start_program`].
    pub fn spawn(&self, node: usize, script: &str) -> Result<Running> {
        self.start_program(node, &["bash".into(), "-c".into(), script.into()], None)
    }

    /// Runs a shell command on a node, whatever its status.
    ///
    /// # Errors
    /// It takes too long; the guest is gone.
    pub fn attempt(&self, node: usize, script: &str, limit: Duration) -> Result<Finished> {
        let done = self.spawn(node, script)?.wait(limit);
        match &done {
            Ok(done) => self.write_down(&format!("node {node}: `{script}` {}", done.ending)),
            Err(error) => self.write_down(&format!("node {node}: {error}")),
        }
        done
    }

    /// Runs a shell command on a node and returns its standard output.
    ///
    /// # Errors
    /// It fails or takes too long; the guest is gone.
    pub fn run(&self, node: usize, script: &str, limit: Duration) -> Result<String> {
        let done = self.attempt(node, script, limit)?;
        if done.ending.ok() {
            Ok(done.out)
        } else {
            Err(failed(script, &format!("node {node}"), &done))
        }
    }

    /// Runs a shell command on a node until it succeeds.
    ///
    /// # Errors
    /// It does not in time; the guest is gone.
    pub fn eventually(&self, node: usize, script: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let done = self.attempt(node, script, limit)?;
            if done.ending.ok() {
                return Ok(done.out);
            }
            if Instant::now() > deadline {
                return Err(failed(script, &format!("node {node}"), &done));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Copies a file from a node to the folder of the logs.
    ///
    /// # Errors
    /// It is not there; the guest is gone.
    pub fn fetch(&self, node: usize, path: &str) -> Result<PathBuf> {
        let name = Path::new(path)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let name = format!(
            "node{node}-{}",
            name.ok_or_else(|| Error::check(format!("{path} names no file")))?
        );
        self.run(node, &format!("cp -- '{path}' '/job/{name}'"), HELPER_LIMIT)?;
        Ok(self.job().join(name))
    }

    /// What happened that a report should tell.
    pub fn notes(&self) -> Vec<String> {
        self.guests.iter().flat_map(Guest::notes).collect()
    }

    /// Collects the kernels' logs, switches the guests off and has the last word on `result`: a kernel's
    /// complaint, or time over, explain other failures.
    ///
    /// # Errors
    /// That of `result`, or one that explains it.
    pub fn finish(self, result: Result<()>) -> Result<()> {
        let step = self.journal.step();
        let expired = || self.expired.load(Ordering::SeqCst);
        let mut complaint = Ok(());
        for guest in &self.guests {
            let dmesg = if guest.is_up() && !expired() {
                self.dmesg(guest)
            } else {
                String::new()
            };
            complaint = complaint.and(guest.check_kernel(&dmesg));
        }
        std::thread::scope(|scope| {
            for guest in &self.guests {
                scope.spawn(|| guest.power_off());
            }
        });
        // A kernel that complained is more than time that was over: it may be why.
        complaint?;
        if expired() {
            let what = format!("at the step \"{step}\" (logs: {})", self.logs().display());
            return Err(Error::TimeOut {
                what,
                seconds: self.options.limit.as_secs(),
            });
        }
        result.map_err(|error| Error::Step {
            step,
            source: Box::new(error),
            logs: self.logs().to_owned(),
        })
    }

    /// A guest's kernel log, also kept as a file. A guest that does not answer is no further failure.
    fn dmesg(&self, guest: &Guest) -> String {
        let program = Program {
            argv: vec!["dmesg".into()],
            ..Program::default()
        };
        let done = guest
            .resume()
            .and_then(|()| guest.link())
            .and_then(|link| link.start(program)?.wait(HELPER_LIMIT));
        let text = done.map(|done| done.out).unwrap_or_default();
        let path = self.logs().join(format!("guest{}.dmesg", guest.plan().number));
        if let Err(error) = fs::write(&path, &text) {
            eprintln!("cannot write {}: {error}", path.display());
        }
        text
    }
}

fn failed(command: &str, node: &str, done: &Finished) -> Error {
    let shown = format!("{}{}", done.out, done.err);
    let shown = tools::tail(shown.trim(), SHOWN);
    Error::Command {
        command: command.to_owned(),
        node: node.to_owned(),
        status: done.ending.to_string(),
        output: if shown.is_empty() {
            String::new()
        } else {
            format!(":\n{shown}")
        },
    }
}
