//! Scenarios written down in a file (TOML): a list of steps.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::cluster::Cluster;
use crate::error::{At, Error, Result};
use crate::link::Running;
use crate::options::Tier;

/// What the tests of the whole system say of one that did not end.
const HUNG: &str = "HUNG: ";

/// A scenario of a file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Script {
    /// How nodes are spread, unless the command line says otherwise.
    pub tier: Option<Tier>,
    /// How many nodes, unless the command line says otherwise.
    pub nodes: Option<usize>,
    /// The largest packet, unless the command line says otherwise.
    pub mtu: Option<u32>,
    /// Kernel modules to have at hand for modprobe, besides the usual ones.
    #[serde(default)]
    pub modules: Vec<String>,
    /// Programs of the host for the guests, besides the usual ones.
    #[serde(default)]
    pub programs: Vec<String>,
    /// Memory of a guest in MiB, unless the command line says otherwise.
    pub memory: Option<u32>,
    /// A disk that all guests share, in MiB.
    pub disk: Option<u32>,
    /// Whether guests load the kernel extension first.
    #[serde(default)]
    pub kmod: bool,
    /// What is done, one after the other.
    #[serde(rename = "step")]
    pub steps: Vec<Action>,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Runs a command on nodes at the same time and waits for all.
    Run(Command),
    /// Starts a command on nodes; a later step waits for it by its name.
    Start(Command),
    /// Waits for the commands that were started under this name.
    Wait(String),
    /// Ends the commands that were started under this name; their status does not count.
    Stop(String),
    /// Does nothing for so many seconds.
    Sleep(f64),
    /// Copies a file of a node to the logs.
    Fetch(Place),
    /// Ends a guest at once.
    Kill(usize),
    /// Boots a guest again.
    Reboot(usize),
    /// Stops a guest; time goes on.
    Pause(usize),
    /// Lets a paused guest go on.
    Resume(usize),
    /// Cuts a node's link.
    Cut(usize),
    /// Restores a node's link.
    Restore(usize),
    /// Parts two guests, in both directions.
    Part([usize; 2]),
    /// Joins two parted guests.
    Join([usize; 2]),
    /// Has a node's card delay and drop what it sends.
    Netem(Netem),
    /// Changes a node's largest packet.
    Mtu(Mtu),
    /// Ends all faults of the switch.
    Heal(bool),
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Action::Run(command) => write!(f, "{command}"),
            Action::Start(command) => write!(f, "start {:?}: {command}", command.name),
            Action::Wait(name) => write!(f, "wait for {name:?}"),
            Action::Stop(name) => write!(f, "stop {name:?}"),
            Action::Sleep(seconds) => write!(f, "sleep {seconds} s"),
            Action::Fetch(place) => write!(f, "fetch {} of node {}", place.path, place.on),
            Action::Kill(guest) => write!(f, "kill guest {guest}"),
            Action::Reboot(guest) => write!(f, "reboot guest {guest}"),
            Action::Pause(guest) => write!(f, "pause guest {guest}"),
            Action::Resume(guest) => write!(f, "resume guest {guest}"),
            Action::Cut(node) => write!(f, "cut node {node}'s link"),
            Action::Restore(node) => write!(f, "restore node {node}'s link"),
            Action::Part([a, b]) => write!(f, "part guests {a} and {b}"),
            Action::Join([a, b]) => write!(f, "join guests {a} and {b}"),
            Action::Netem(netem) => write!(f, "netem of node {}: {}", netem.on, netem.settings),
            Action::Mtu(mtu) => write!(f, "MTU {} of node {}", mtu.bytes, mtu.on),
            Action::Heal(_) => f.write_str("heal the network"),
        }
    }
}

impl std::fmt::Display for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut lines = self.command.lines();
        let first = lines.next().unwrap_or_default();
        let more = if lines.next().is_some() { " …" } else { "" };
        let nodes = self
            .on
            .iter()
            .map(usize::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        write!(
            f,
            "on {}: {first}{more}",
            if nodes.is_empty() { "all" } else { &nodes }
        )
    }
}

/// A command on nodes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Command {
    /// The nodes; all if none is named.
    #[serde(default)]
    pub on: Vec<usize>,
    /// For a shell.
    pub command: String,
    /// By which later steps name it.
    #[serde(default)]
    pub name: String,
    /// The status it must end with, where that is not 0.
    #[serde(default)]
    pub status: u8,
    /// Longest time in seconds.
    #[serde(default = "usual_limit")]
    pub limit: f64,
}

/// A file of a node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The node.
    pub on: usize,
    /// The file.
    pub path: String,
}

/// Settings of a node's card.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Netem {
    /// The node.
    pub on: usize,
    /// As for `tc … netem`; empty ends it.
    pub settings: String,
}

/// A node's largest packet.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mtu {
    /// The node.
    pub on: usize,
    /// Bytes.
    pub bytes: u32,
}

fn usual_limit() -> f64 {
    60.0
}

impl Script {
    /// Reads one.
    ///
    /// # Errors
    /// It cannot be read, or is not understood.
    pub fn load(path: &Path) -> Result<Script> {
        let text = fs::read_to_string(path).at(|| format!("read {}", path.display()))?;
        Script::parse(&text).map_err(|why| Error::check(format!("{}: {why}", path.display())))
    }

    /// Reads one out of its text.
    ///
    /// # Errors
    /// It is not understood.
    pub fn parse(text: &str) -> Result<Script, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    /// Carries it out.
    ///
    /// # Errors
    /// A step fails.
    pub fn run(&self, cluster: &Cluster) -> Result<()> {
        let mut started = Started::new();
        if self.kmod {
            crate::kmod::load(cluster)?;
        }
        for (number, action) in (1..).zip(&self.steps) {
            cluster.step(&format!("step {number}: {action}"));
            carry_out(cluster, action, &mut started)?;
        }
        Ok(())
    }
}

/// Commands that run, by their names.
type Started = BTreeMap<String, (Command, Vec<(usize, Running)>)>;

fn carry_out(cluster: &Cluster, action: &Action, started: &mut Started) -> Result<()> {
    match action {
        Action::Run(command) => wait(cluster, command, &start(cluster, command)?),
        Action::Start(command) => {
            let running = start(cluster, command)?;
            started.insert(command.name.clone(), (command.clone(), running));
            Ok(())
        }
        Action::Wait(name) => {
            let (command, running) = taken(started, name)?;
            wait(cluster, &command, &running)
        }
        Action::Stop(name) => {
            let (command, running) = taken(started, name)?;
            for (_, program) in &running {
                program.kill();
            }
            for (_, program) in &running {
                program.wait(Duration::from_secs_f64(command.limit))?;
            }
            Ok(())
        }
        Action::Sleep(seconds) => {
            let time = Duration::try_from_secs_f64(*seconds);
            std::thread::sleep(time.map_err(|why| Error::check(format!("sleep = {seconds}: {why}")))?);
            Ok(())
        }
        Action::Fetch(place) => cluster.fetch(place.on, &place.path).map(drop),
        Action::Kill(guest) => {
            cluster.guest(*guest)?.kill();
            Ok(())
        }
        Action::Reboot(guest) => cluster.reboot(*guest),
        Action::Pause(guest) => cluster.guest(*guest)?.pause(),
        Action::Resume(guest) => cluster.guest(*guest)?.resume(),
        Action::Cut(node) => cluster.cut(*node),
        Action::Restore(node) => cluster.restore(*node),
        Action::Part([a, b]) => {
            cluster.switch().part(*a, *b);
            cluster.switch().part(*b, *a);
            Ok(())
        }
        Action::Join([a, b]) => {
            cluster.switch().join(*a, *b);
            cluster.switch().join(*b, *a);
            Ok(())
        }
        Action::Netem(netem) => cluster.netem(netem.on, &netem.settings),
        Action::Mtu(mtu) => cluster.set_mtu(mtu.on, mtu.bytes),
        Action::Heal(_) => {
            cluster.switch().heal();
            Ok(())
        }
    }
}

fn taken(started: &mut Started, name: &str) -> Result<(Command, Vec<(usize, Running)>)> {
    started
        .remove(name)
        .ok_or_else(|| Error::check(format!("no command was started under the name {name:?}")))
}

fn start(cluster: &Cluster, command: &Command) -> Result<Vec<(usize, Running)>> {
    let all = || cluster.nodes().iter().map(|node| node.number).collect();
    let nodes: Vec<usize> = if command.on.is_empty() {
        all()
    } else {
        command.on.clone()
    };
    nodes
        .into_iter()
        .map(|node| Ok((node, cluster.spawn(node, &command.command)?)))
        .collect()
}

fn wait(cluster: &Cluster, command: &Command, running: &[(usize, Running)]) -> Result<()> {
    for (node, program) in running {
        let done = program.wait(Duration::from_secs_f64(command.limit.max(0.0)))?;
        for (stream, text) in [("", &done.out), ("!", &done.err)] {
            for line in text.lines() {
                println!("    node {node}{stream}: {line}");
                cluster.write_down(&format!("node {node}{stream}: {line}"));
            }
        }
        cluster.write_down(&format!("node {node}: `{}` {}", command.command, done.ending));
        if done.ending.code() != command.status {
            let what = format!(
                "`{}` on node {node} {}, not with status {}",
                command.command, done.ending, command.status
            );
            let hung = [&done.out, &done.err].iter().any(|text| text.contains(HUNG));
            return Err(if hung {
                Error::Hung(what)
            } else {
                Error::Check(what)
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Action, Script};

    #[test]
    fn a_file_is_read() {
        let script = Script::parse(include_str!("../../scenarios/example.toml")).unwrap();
        assert_eq!(script.nodes, Some(3));
        assert_eq!(
            Script::parse(include_str!("../../scenarios/mount.toml"))
                .unwrap()
                .nodes,
            Some(3)
        );
        let peers = Script::parse(include_str!("../../scenarios/peers.toml")).unwrap();
        assert_eq!((peers.disk, peers.memory), (Some(1024), None));
        assert!(matches!(&script.steps[0], Action::Run(command) if command.on.is_empty()));
        assert!(script.steps.contains(&Action::Cut(2)));
    }

    #[test]
    fn what_is_not_understood_is_told() {
        assert!(
            Script::parse("[[step]]\nexplode = 1\n")
                .unwrap_err()
                .contains("explode")
        );
        assert!(Script::parse("nodes = 2\n").unwrap_err().contains("step"));
    }
}
