//! One host's part in a job: its roles, its mount, the command.

use std::net::{IpAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use parking_lot::Mutex;
use rdma_transport::{Connection, TransportError};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};

use super::talk::{Order, Phase, Plan, Say};
use crate::cmd::alarm::Alarm;
use crate::cmd::children::{Children, code_of, follow_us, signal, wait_for};
use crate::cmd::temporary::Temporary;
use fsd_node::config::Config;
use fsd_node::endpoint::Endpoint;
use fsd_proto::rpc::{Responder, RpcError, Service};
use fsd_proto::wire::{Hello, Role};
use fsd_storage::label::Label;

/// Pause between two attempts to reach the coordinator.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a command gets to end when the job is stopped.
const LAST_WORDS: Duration = Duration::from_secs(5);

struct Nobody;

impl Service for Nobody {
    fn admit(&self, _: &Hello) -> Result<(), String> {
        Err("this is only a member of a job".into())
    }
    fn request(&self, _: &Hello, _: &[u8], _: Responder) {}
}

/// What a member must know before it is told the rest.
pub struct Member<'a> {
    /// Name and fabric of the rendezvous.
    pub base: &'a Config,
    /// Own rank.
    pub rank: u32,
    /// How many there are.
    pub size: u32,
    /// Address of the coordinator.
    pub rendezvous: String,
    /// Key of the job, and of its cluster.
    pub key: Vec<u8>,
    /// Mounts are made in here (default: a temporary directory).
    pub dir: Option<PathBuf>,
    /// Stores are kept in here (default: the same).
    pub state: Option<PathBuf>,
    /// How long to try to reach the coordinator.
    pub patience: Duration,
    /// The standard input is not for the command.
    pub own_stdin: bool,
}

type Slot = Arc<Mutex<Option<Result<Order, RpcError>>>>;

/// The conversation with the coordinator, beside the roles that run here.
struct Session {
    endpoint: Endpoint,
    conn: Arc<dyn Connection>,
    watch: Slot,
    /// Rung when the coordinator has said something; the end of a child is a signal.
    alarm: Alarm,
    /// A signal has come that ends the job.
    interrupted: bool,
    children: Option<Children>,
}

impl Session {
    fn ask(&self, say: &Say) -> Slot {
        let slot = Slot::default();
        let (filled, bell) = (Arc::clone(&slot), self.alarm.bell());
        self.endpoint.calls.call_async(&self.conn, say, move |order| {
            *filled.lock() = Some(order);
            bell.ring();
        });
        slot
    }

    /// Says something and waits for the answer, but not longer than everything is well here.
    fn say(&mut self, say: &Say) -> anyhow::Result<Order> {
        let slot = self.ask(say);
        loop {
            if let Some(order) = slot.lock().take() {
                return match order.context("the coordinator of the job has gone")? {
                    Order::Stop(why) => bail!("the job is stopped: {why}"),
                    order => Ok(order),
                };
            }
            self.well(true)?;
            self.wait(None)?;
        }
    }

    /// Waits until something has happened that whoever calls this looks at afterwards.
    fn wait(&mut self, limit: Option<Duration>) -> anyhow::Result<()> {
        self.alarm.wait(&[], limit)?;
        self.interrupted |= self.alarm.signals().any(|signal| signal != SIGCHLD);
        Ok(())
    }

    /// Has nothing happened that ends the job? A signal does, if `interruptible`.
    fn well(&mut self, interruptible: bool) -> anyhow::Result<()> {
        if interruptible && std::mem::take(&mut self.interrupted) {
            bail!("interrupted");
        }
        if let Some(dead) = self.children.as_mut().and_then(Children::dead) {
            bail!("{dead}");
        }
        if let Some(Err(error)) = &*self.watch.lock() {
            bail!("the coordinator of the job has gone: {error}");
        }
        if let Some(Ok(Order::Stop(why))) = &*self.watch.lock() {
            bail!("the job is stopped: {why}");
        }
        Ok(())
    }

    fn finished(&self) -> bool {
        matches!(&*self.watch.lock(), Some(Ok(Order::Finish)))
    }

    fn done(&mut self, phase: Phase, status: u8) -> anyhow::Result<u8> {
        match self.say(&Say::Done { phase, status })? {
            Order::Go(worst) => Ok(worst),
            _ => bail!("the coordinator of the job is out of step"),
        }
    }
}

fn connect(member: &Member<'_>, endpoint: &Endpoint) -> anyhow::Result<Arc<dyn Connection>> {
    let deadline = Instant::now() + member.patience;
    loop {
        match endpoint.fabric.connect(&member.rendezvous) {
            Ok(conn) => return Ok(conn),
            // It may just be starting.
            Err(TransportError::Unreachable { .. } | TransportError::Timeout { .. })
                if Instant::now() < deadline =>
            {
                std::thread::sleep(AGAIN);
            }
            Err(error) => {
                return Err(error).with_context(|| {
                    format!(
                        "rank {} cannot reach the rendezvous {}",
                        member.rank, member.rendezvous
                    )
                });
            }
        }
    }
}

fn free_ports() -> anyhow::Result<[u16; 2]> {
    // Free now; somebody could take one before the server does, and then it says so.
    let probe = || TcpListener::bind("0.0.0.0:0").context("no free port");
    let (a, b) = (probe()?, probe()?);
    Ok([a.local_addr()?.port(), b.local_addr()?.port()])
}

/// Plays a member's part from the beginning to the end. Returns the command's status here and the worst of
/// all.
///
/// # Errors
/// Something failed, here or elsewhere; everything started here has been taken down.
pub fn run(member: &Member<'_>) -> anyhow::Result<(u8, u8)> {
    let alarm = Alarm::new(&[SIGTERM, SIGINT, SIGHUP, SIGCHLD])?;
    let ip = fsd_client::mount::listen::route_to(&member.rendezvous)
        .with_context(|| format!("no route to the rendezvous {}", member.rendezvous))?;
    let listen = std::net::SocketAddr::new(ip, 0).to_string();
    let endpoint = Endpoint::open(
        member.base,
        Role::Tool,
        listen,
        member.key.clone(),
        Arc::new(Nobody),
    )?;
    let conn = connect(member, &endpoint)?;
    let mut session = Session {
        endpoint,
        conn,
        watch: Slot::default(),
        alarm,
        interrupted: false,
        children: None,
    };
    let result = take_part(member, ip, &mut session);
    if let Err(error) = &result {
        // It may be the coordinator that has gone.
        let why = format!("{error:#}");
        let told = session.ask(&Say::Failed { why });
        let deadline = Instant::now() + LAST_WORDS;
        while told.lock().is_none() && Instant::now() < deadline {
            let rest = deadline.saturating_duration_since(Instant::now());
            if session.wait(Some(rest)).is_err() {
                break;
            }
        }
    }
    if let Some(children) = &mut session.children {
        children.take_down();
    }
    session.endpoint.fabric.shutdown();
    result
}

fn take_part(member: &Member<'_>, ip: IpAddr, session: &mut Session) -> anyhow::Result<(u8, u8)> {
    let coordinator = member.rendezvous.to_socket_addrs()?.next();
    let here = Say::Here {
        rank: member.rank,
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        ip,
        coordinator: coordinator.map_or(ip, |a| a.ip()),
        ports: free_ports()?,
    };
    let Order::Plan(plan) = session.say(&here)? else {
        bail!("the coordinator of the job is out of step");
    };
    session.watch = session.ask(&Say::Watch);

    let temporary = Temporary::new("launch")?;
    let base = member.dir.clone().unwrap_or_else(|| temporary.path().join("mnt"));
    let state = match &member.state {
        Some(dir) => dir.join(format!("rank{}", member.rank)),
        None => temporary.path().to_owned(),
    };
    let config = settings(&plan, &state, &member.key)?;
    let file = state.join("cluster.toml");
    let mut children = Children::new(file.clone(), temporary);

    for &id in &plan.storage {
        let section = config.storage.iter().find(|s| s.id == id);
        let section = section.with_context(|| format!("the plan has no storage node {id}"))?;
        if !section.dir.exists() {
            fsd_storage::label::format(&section.dir, &Label::new(&config, section))?;
        }
        let id = id.to_string();
        children.spawn(
            &format!("storage node {id}"),
            &["storage", "--forget", "--id", &id],
            None,
        )?;
    }
    session.children = Some(children);
    session.done(Phase::Storage, 0)?;

    if plan.meta {
        if !config.meta.dir.exists() {
            fsd_meta::server::format(&config, &plan.uuid)?;
        }
        children_of(session)?.spawn("metadata server", &["meta"], None)?;
    }
    session.done(Phase::Meta, 0)?;

    let point = base.join(member.rank.to_string());
    let mut made = false;
    if plan.client.is_some() {
        made = !point.exists();
        std::fs::create_dir_all(&point).with_context(|| format!("cannot make {}", point.display()))?;
        let listen = std::net::SocketAddr::new(ip, 0).to_string();
        let args = ["mount", "--auto-unmount", "--listen", &listen];
        children_of(session)?.spawn("mount", &args, Some(&point))?;
    }
    session.done(Phase::Mount, 0)?;

    let status = match plan.client {
        Some(client) => {
            let env = [
                ("FSD_DIR", base.display().to_string()),
                ("FSD_MOUNT", point.display().to_string()),
                ("FSD_CONFIG", file.display().to_string()),
                ("FSD_RANK", member.rank.to_string()),
                ("FSD_SIZE", member.size.to_string()),
                ("FSD_CLIENT", client.to_string()),
                ("FSD_CLIENTS", plan.clients.to_string()),
            ];
            command(&plan.command, &env, member.own_stdin, session)?
        }
        None => 0,
    };
    session.done(Phase::Run, status)?;
    for (phase, role) in [(Phase::Unmount, "mount"), (Phase::EndMeta, "metadata")] {
        let clean = children_of(session)?.take_down_to(role);
        anyhow::ensure!(clean, "the {role} did not end in time and was killed");
        session.done(phase, 0)?;
    }
    if made {
        // Only what we made, and only if it is empty.
        let _ = std::fs::remove_dir(&point);
    }
    let clean = children_of(session)?.take_down();
    anyhow::ensure!(clean, "a storage node did not end in time and was killed");
    let worst = session.done(Phase::EndStorage, 0)?;
    Ok((status, worst))
}

fn children_of(session: &mut Session) -> anyhow::Result<&mut Children> {
    session.children.as_mut().context("nothing runs here")
}

/// Writes the configuration and the key of this member.
fn settings(plan: &Plan, state: &Path, key: &[u8]) -> anyhow::Result<Config> {
    std::fs::create_dir_all(state).with_context(|| format!("cannot make {}", state.display()))?;
    let mut config: Config = toml::from_str(&plan.config).context("the plan's configuration")?;
    config.key_file = state.join("cluster.key");
    config.meta.dir = state.join("meta");
    for s in &mut config.storage {
        s.dir = state.join(format!("storage{}", s.id));
    }
    let _ = std::fs::remove_file(&config.key_file);
    crate::cmd::format::write_key(&config.key_file, key)?;
    let file = state.join("cluster.toml");
    std::fs::write(&file, toml::to_string(&config)?)
        .with_context(|| format!("cannot write {}", file.display()))?;
    Ok(config)
}

/// Runs the command, or waits to be told that it is enough.
fn command(
    command: &[String],
    env: &[(&str, String)],
    own_stdin: bool,
    session: &mut Session,
) -> anyhow::Result<u8> {
    let Some((program, args)) = command.split_first() else {
        while !session.finished() && !std::mem::take(&mut session.interrupted) {
            session.well(false)?;
            session.wait(None)?;
        }
        return Ok(0);
    };
    let mut run = Command::new(program);
    run.args(args).envs(env.iter().map(|(k, v)| (k, v)));
    if own_stdin {
        run.stdin(Stdio::null());
    }
    follow_us(&mut run);
    let mut child = run.spawn().with_context(|| format!("cannot run {program}"))?;
    let ended = |child: &mut Child| -> anyhow::Result<Option<u8>> { Ok(child.try_wait()?.map(code_of)) };
    loop {
        if let Some(code) = ended(&mut child)? {
            return Ok(code);
        }
        if let Err(error) = session.well(true) {
            signal(&child, rustix::process::Signal::TERM);
            wait_for(&mut child, LAST_WORDS);
            let _ = child.wait();
            return Err(error);
        }
        session.wait(None)?;
    }
}
