//! The coordinator's side of a job as a pure state machine: what members say in, what they are told out.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::roles::Roles;
use super::talk::{Order, Phase, Plan, Say};

/// Something to be told to a rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tell {
    /// The rank that it is for.
    pub rank: u32,
    /// In answer to its `Watch` (else to what it said last).
    pub watch: bool,
    /// What the rank shall do next.
    pub order: Order,
}

#[derive(Debug, Clone)]
struct Member {
    host: String,
    ip: IpAddr,
    coordinator: IpAddr,
    ports: [u16; 2],
}

/// What is needed to make the plan.
#[derive(Debug, Clone)]
pub struct Job {
    /// Number of ranks; the plan is made when all have come.
    pub size: u32,
    /// Which ranks are servers, and which mount.
    pub roles: Roles,
    /// The command that each rank with a mount runs, with its arguments.
    pub command: Vec<String>,
    /// Random number that the metadata store of this job is formatted with.
    pub uuid: String,
}

/// Addresses of the servers: the metadata server's, the storage nodes'.
pub type Addresses = (String, Vec<String>);

/// The state of a job.
pub struct Rendezvous<F> {
    job: Job,
    config: F,
    members: BTreeMap<u32, Member>,
    phase: Option<Phase>,
    done: BTreeSet<u32>,
    watching: BTreeSet<u32>,
    left: BTreeSet<u32>,
    worst: u8,
    stopped: Option<String>,
}

impl<F: Fn(&Addresses) -> Result<String, String>> Rendezvous<F> {
    /// A job that nobody has come to yet; `config` writes the configuration once addresses are known.
    pub fn new(job: Job, config: F) -> Self {
        Self {
            job,
            config,
            members: BTreeMap::new(),
            phase: None,
            done: BTreeSet::new(),
            watching: BTreeSet::new(),
            left: BTreeSet::new(),
            worst: 0,
            stopped: None,
        }
    }

    /// The worst status so far; one where the job was stopped.
    pub fn status(&self) -> u8 {
        if self.stopped.is_some() {
            self.worst.max(1)
        } else {
            self.worst
        }
    }

    /// Why the job was stopped.
    pub fn stopped(&self) -> Option<&str> {
        self.stopped.as_deref()
    }

    /// Everybody has gone through the last phase, or has left.
    pub fn is_over(&self) -> bool {
        self.phase == Some(Phase::EndStorage) && self.done.len() == self.job.size as usize
            || self.stopped.is_some() && self.members.keys().all(|r| self.left.contains(r))
    }

    /// Ranks that have not come yet.
    pub fn missing(&self) -> Vec<u32> {
        (0..self.job.size)
            .filter(|r| !self.members.contains_key(r))
            .collect()
    }

    /// A member has said something.
    pub fn said(&mut self, rank: u32, say: Say) -> Vec<Tell> {
        let tell = |order| {
            vec![Tell {
                rank,
                watch: false,
                order,
            }]
        };
        if rank >= self.job.size {
            return tell(Order::Stop(format!(
                "there is no rank {rank} of {}",
                self.job.size
            )));
        }
        match say {
            Say::Watch => {
                self.watching.insert(rank);
                match self.stopped.clone() {
                    Some(why) => self.tell_watchers(&Order::Stop(why)),
                    None => Vec::new(),
                }
            }
            Say::Failed { why } => {
                let mut tells = tell(Order::Go(0));
                tells.extend(self.stop(&format!("{}: {why}", self.name(rank))));
                tells
            }
            _ if self.stopped.is_some() => tell(Order::Stop(self.stopped.clone().unwrap_or_default())),
            Say::Here {
                host,
                ip,
                coordinator,
                ports,
                ..
            } => {
                let member = Member {
                    host,
                    ip,
                    coordinator,
                    ports,
                };
                if self.members.insert(rank, member).is_some() {
                    return self.stop(&format!("two processes say that they are rank {rank}"));
                }
                if self.members.len() == self.job.size as usize {
                    self.plan()
                } else {
                    Vec::new()
                }
            }
            Say::Done { phase, status } => self.finished(rank, phase, status),
        }
    }

    /// The connection of a member has ended.
    pub fn gone(&mut self, rank: u32) -> Vec<Tell> {
        self.left.insert(rank);
        self.watching.remove(&rank);
        if self.stopped.is_some() || self.phase == Some(Phase::EndStorage) {
            return Vec::new();
        }
        self.stop(&format!("{} has gone", self.name(rank)))
    }

    /// Ends the job early.
    pub fn stop(&mut self, why: &str) -> Vec<Tell> {
        if self.stopped.is_some() {
            return Vec::new();
        }
        self.stopped = Some(why.to_owned());
        let order = Order::Stop(why.to_owned());
        // Those who have come and wait for an answer: for the plan, or for the others to be done.
        let waiting: Vec<u32> = match self.phase {
            None => self.members.keys().copied().collect(),
            Some(_) => self.done.iter().copied().collect(),
        };
        let mut tells: Vec<Tell> = waiting
            .into_iter()
            .map(|rank| Tell {
                rank,
                watch: false,
                order: order.clone(),
            })
            .collect();
        tells.extend(self.tell_watchers(&order));
        tells
    }

    /// Ends what runs until somebody says so.
    pub fn finish(&mut self) -> Vec<Tell> {
        self.tell_watchers(&Order::Finish)
    }

    fn tell_watchers(&mut self, order: &Order) -> Vec<Tell> {
        std::mem::take(&mut self.watching)
            .into_iter()
            .map(|rank| Tell {
                rank,
                watch: true,
                order: order.clone(),
            })
            .collect()
    }

    fn name(&self, rank: u32) -> String {
        match self.members.get(&rank) {
            Some(member) => format!("rank {rank} on {}", member.host),
            None => format!("rank {rank}"),
        }
    }

    /// The address of a member for all others. On the coordinator's own host a member may know itself as
    /// the loopback only; the others know better.
    fn ip_of(&self, member: &Member) -> IpAddr {
        let outside = self.members.values().find(|m| !m.ip.is_loopback());
        match outside {
            Some(other) if member.ip.is_loopback() => other.coordinator,
            _ => member.ip,
        }
    }

    fn plan(&mut self) -> Vec<Tell> {
        let address = |rank: u32, port: usize| {
            let member = &self.members[&rank];
            std::net::SocketAddr::new(self.ip_of(member), member.ports[port]).to_string()
        };
        let roles = &self.job.roles;
        let storage = roles.storage.iter().map(|&rank| address(rank, 1)).collect();
        let config = match (self.config)(&(address(roles.meta, 0), storage)) {
            Ok(config) => config,
            Err(why) => return self.stop(&why),
        };
        self.phase = Some(Phase::Storage);
        (0..self.job.size)
            .map(|rank| {
                let place = |ranks: &[u32]| ranks.iter().position(|&r| r == rank);
                let plan = Plan {
                    config: config.clone(),
                    uuid: self.job.uuid.clone(),
                    meta: roles.meta == rank,
                    storage: place(&roles.storage).map(|i| i as u16).into_iter().collect(),
                    client: place(&roles.clients).map(|i| i as u32),
                    clients: roles.clients.len() as u32,
                    command: self.job.command.clone(),
                };
                Tell {
                    rank,
                    watch: false,
                    order: Order::Plan(Box::new(plan)),
                }
            })
            .collect()
    }

    fn finished(&mut self, rank: u32, phase: Phase, status: u8) -> Vec<Tell> {
        self.worst = self.worst.max(status);
        if self.phase != Some(phase) || !self.done.insert(rank) {
            return self.stop(&format!("{} is out of step", self.name(rank)));
        }
        if self.done.len() < self.job.size as usize {
            return Vec::new();
        }
        if phase == Phase::EndStorage {
            // `done` stays full: it is over.
            return self.tell_all(&Order::Go(self.worst));
        }
        self.done.clear();
        self.phase = Some(match phase {
            Phase::Storage => Phase::Meta,
            Phase::Meta => Phase::Mount,
            Phase::Mount => Phase::Run,
            Phase::Run => Phase::Unmount,
            Phase::Unmount => Phase::EndMeta,
            Phase::EndMeta | Phase::EndStorage => Phase::EndStorage,
        });
        self.tell_all(&Order::Go(0))
    }

    fn tell_all(&self, order: &Order) -> Vec<Tell> {
        (0..self.job.size)
            .map(|rank| Tell {
                rank,
                watch: false,
                order: order.clone(),
            })
            .collect()
    }
}

#[cfg(test)]
#[path = "rendezvous_tests.rs"]
mod tests;
