//! What the members of a job and its coordinator say to one another, over an authenticated connection.

use serde::{Deserialize, Serialize};

/// The steps of a job. A member does its part of one (often nothing), says so, and goes on when all have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// The storage nodes are made and run.
    Storage,
    /// The metadata server is made and runs.
    Meta,
    /// All mounts are there.
    Mount,
    /// The command has ended.
    Run,
    /// The mounts are gone.
    Unmount,
    /// The metadata server has ended.
    EndMeta,
    /// The storage nodes have ended.
    EndStorage,
}

/// From a member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Say {
    /// First of all; answered with the plan when everybody is here.
    Here {
        /// Its rank.
        rank: u32,
        /// Its host, for messages.
        host: String,
        /// The address others reach it at, without port.
        ip: std::net::IpAddr,
        /// The coordinator's host as this member reaches it.
        coordinator: std::net::IpAddr,
        /// Ports that are free there: for a metadata server, for a storage node.
        ports: [u16; 2],
    },
    /// Its part of a phase is done; answered when everybody's is.
    Done {
        /// The phase.
        phase: Phase,
        /// After [`Phase::Run`]: exit status of the command.
        status: u8,
    },
    /// It cannot go on; answered at once.
    Failed {
        /// Why.
        why: String,
    },
    /// Answered when the job must stop, or the command is to end.
    Watch,
}

/// The coordinator's answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Who plays what.
    Plan(Box<Plan>),
    /// Everybody has done the phase. After the last: the worst status of all.
    Go(u8),
    /// Take everything down; why.
    Stop(String),
    /// End what runs, if it goes on until somebody says so.
    Finish,
}

/// What a member has to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The cluster's configuration, but for paths, which are the member's own.
    pub config: String,
    /// Names the stores.
    pub uuid: String,
    /// It runs the metadata server.
    pub meta: bool,
    /// It runs these storage nodes.
    pub storage: Vec<u16>,
    /// It mounts, as the how manieth.
    pub client: Option<u32>,
    /// How many mount.
    pub clients: u32,
    /// What to run on each of them; empty: nothing, until the job is ended.
    pub command: Vec<String>,
}
