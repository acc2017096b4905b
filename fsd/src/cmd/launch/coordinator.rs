//! Serves a job's rendezvous over the network.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::{Condvar, Mutex};
use rdma_transport::{ConnId, Connection};

use super::rendezvous::{Addresses, Job, Rendezvous, Tell};
use super::talk::Say;
use fsd_node::config::Config;
use fsd_node::endpoint::Endpoint;
use fsd_proto::rpc::{Errno, Responder, Service};
use fsd_proto::wire::{Hello, Role};

/// How long members may take to hear the last word.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long members may take to take everything down once they were told to.
const TAKE_DOWN: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(100);

/// Writes the configuration of the job's cluster.
pub type Write = Box<dyn Fn(&Addresses) -> Result<String, String> + Send>;

struct State {
    rendezvous: Rendezvous<Write>,
    ranks: HashMap<ConnId, u32>,
    answers: HashMap<u32, Responder>,
    watches: HashMap<u32, Responder>,
}

impl State {
    fn tell(&mut self, tells: Vec<Tell>) {
        for Tell { rank, watch, order } in tells {
            let responders = if watch {
                &mut self.watches
            } else {
                &mut self.answers
            };
            if let Some(responder) = responders.remove(&rank) {
                responder.reply(&Ok(order));
            }
        }
    }
}

struct Desk {
    state: Mutex<State>,
    changed: Condvar,
}

impl Service for Desk {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Ok(())
    }

    fn request(&self, _: &Hello, body: &[u8], responder: Responder) {
        let Ok(say) = fsd_proto::wire::decode::<Say>(body) else {
            return responder.reply::<super::talk::Order>(&Err(Errno(libc::EPROTO)));
        };
        let conn = responder.conn().id();
        let mut state = self.state.lock();
        let rank = match &say {
            Say::Here { rank, .. } => *state.ranks.entry(conn).or_insert(*rank),
            _ => match state.ranks.get(&conn) {
                Some(&rank) => rank,
                None => return responder.reply::<super::talk::Order>(&Err(Errno(libc::EPROTO))),
            },
        };
        let responders = if say == Say::Watch {
            &mut state.watches
        } else {
            &mut state.answers
        };
        responders.insert(rank, responder);
        let tells = state.rendezvous.said(rank, say);
        state.tell(tells);
        drop(state);
        self.changed.notify_all();
    }

    fn disconnected(&self, conn: &Arc<dyn Connection>, _: Option<&Hello>) {
        let mut state = self.state.lock();
        if let Some(rank) = state.ranks.remove(&conn.id()) {
            let tells = state.rendezvous.gone(rank);
            state.tell(tells);
        }
        drop(state);
        self.changed.notify_all();
    }
}

/// Waits for the members of a job and leads them through it.
pub struct Coordinator {
    desk: Arc<Desk>,
    endpoint: Endpoint,
}

impl Coordinator {
    /// Listens at `listen`; the members prove that they have the key. `base` has the settings of the endpoint.
    ///
    /// # Errors
    /// The address is taken.
    pub fn open(base: &Config, listen: String, key: Vec<u8>, job: Job, write: Write) -> anyhow::Result<Self> {
        let desk = Arc::new(Desk {
            state: Mutex::new(State {
                rendezvous: Rendezvous::new(job, write),
                ranks: HashMap::new(),
                answers: HashMap::new(),
                watches: HashMap::new(),
            }),
            changed: Condvar::new(),
        });
        let service = Arc::clone(&desk) as Arc<dyn Service>;
        let endpoint = Endpoint::open(base, Role::Meta, listen, key, service)
            .context("cannot listen for the members of the job: choose another --rendezvous")?;
        Ok(Self { desk, endpoint })
    }

    /// The port it listens on.
    ///
    /// # Errors
    /// The fabric's address has none.
    pub fn port(&self) -> anyhow::Result<u16> {
        let addr = self.endpoint.fabric.local_addr();
        let port = addr.rsplit_once(':').and_then(|(_, p)| p.parse().ok());
        port.with_context(|| format!("{addr} has no port"))
    }

    /// Ranks that have not come yet.
    #[must_use]
    pub fn missing(&self) -> Vec<u32> {
        self.desk.state.lock().rendezvous.missing()
    }

    /// Ends the job early.
    pub fn stop(&self, why: &str) {
        let mut state = self.desk.state.lock();
        let tells = state.rendezvous.stop(why);
        state.tell(tells);
        self.desk.changed.notify_all();
    }

    /// Ends what runs until somebody says so.
    pub fn finish(&self) {
        let mut state = self.desk.state.lock();
        let tells = state.rendezvous.finish();
        state.tell(tells);
    }

    /// Leads the job to its end; `poll` is called every now and then. Returns the worst exit status.
    ///
    /// # Errors
    /// Why the job was stopped: not all have come within `patience`, one has failed or gone …
    pub fn run(
        &self,
        patience: Duration,
        mut poll: impl FnMut(&Self) -> anyhow::Result<()>,
    ) -> anyhow::Result<u8> {
        let begun = Instant::now();
        let mut stopping: Option<Instant> = None;
        loop {
            if let Err(error) = poll(self) {
                self.stop(&format!("{error:#}"));
            }
            let missing = self.missing();
            if !missing.is_empty() && begun.elapsed() > patience {
                let missing: Vec<String> = missing.iter().map(u32::to_string).collect();
                let seconds = patience.as_secs();
                self.stop(&format!(
                    "rank {} did not come within {seconds} s (--wait)",
                    missing.join(", ")
                ));
            }
            let mut state = self.desk.state.lock();
            if state.rendezvous.is_over() {
                break;
            }
            let stopped = state.rendezvous.stopped().is_some();
            if stopped && stopping.get_or_insert_with(Instant::now).elapsed() > TAKE_DOWN {
                break;
            }
            self.desk.changed.wait_for(&mut state, POLL);
        }
        let mut state = self.desk.state.lock();
        let deadline = Instant::now() + FAREWELL;
        while !state.ranks.is_empty() && !self.desk.changed.wait_until(&mut state, deadline).timed_out() {}
        let (status, stopped) = (
            state.rendezvous.status(),
            state.rendezvous.stopped().map(str::to_owned),
        );
        drop(state);
        self.endpoint.fabric.shutdown();
        match stopped {
            Some(why) => bail!("the job was stopped: {why}"),
            None => Ok(status),
        }
    }
}
