//! The roles this executable plays when the tests start it again.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rdma_transport::{FabricConfig, FabricKind, Op, RegionKey, RemoteAddr};

use crate::world::{World, faa};

/// A child process; killed when dropped.
pub struct Helper {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Helper {
    pub fn start(world: &World, role: &str, args: &[String]) -> Self {
        let kind = match world.kind {
            FabricKind::Tcp => "tcp",
            FabricKind::Verbs => "verbs",
            _ => "shm",
        };
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture", "--test-threads=1"])
            .env("FABRIC_CHILD", role)
            .env("FABRIC_KIND", kind)
            .env("FABRIC_ARGS", args.join("\n"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    /// The next line the role has said.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(self.out.read_line(&mut line).unwrap() > 0, "the child has ended");
            if let Some((_, said)) = line.split_once("@@ ") {
                return said.trim().to_owned();
            }
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops it, and waits until none of its threads runs: the signal alone leaves them time to answer.
    pub fn stop(&self) {
        let id = self.child.id();
        let pid = rustix::process::Pid::from_raw(i32::try_from(id).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        let stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        };
        let tasks = format!("/proc/{id}/task");
        while !std::fs::read_dir(&tasks).unwrap().all(stopped) {
            std::thread::sleep(std::time::Duration::from_micros(100));
        }
    }

    /// Lets it end by itself.
    pub fn finish(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // Ended already: fine.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

fn say(line: &str) {
    println!("@@ {line}");
    std::io::stdout().flush().unwrap();
}

/// Until the parent lets us go, or dies.
fn wait_for_parent() {
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).unwrap();
}

pub fn play(role: &str) {
    let world = match std::env::var("FABRIC_KIND").as_deref() {
        Ok("tcp") => World::tcp(),
        Ok("verbs") => World::verbs(),
        _ => World::shm(),
    };
    let args: Vec<String> = std::env::var("FABRIC_ARGS")
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    match role {
        "target" => target(&world, args.first()),
        "adder" => adder(&world, &args),
        "talker" => talker(&world, &args),
        "idle" => idle(&world),
        "leak" => leak(&world),
        other => panic!("no role {other}"),
    }
}

/// Offers memory, echoes messages.
fn target(world: &World, listen: Option<&String>) {
    let mut config = world.config("child");
    if let Some(listen) = listen {
        config.listen.clone_from(listen);
    }
    let end = world.try_open(config).unwrap();
    end.seen.on_message(|conn, message| {
        // The peer may be gone.
        let _gone = conn.send(message);
    });
    let (_mem, at) = end.memory(8 << 20);
    say(&format!("{} {}", end.fabric.local_addr(), at.key.0));
    wait_for_parent();
}

pub fn place(line: &str) -> (String, RemoteAddr) {
    let (addr, key) = line.split_once(' ').unwrap();
    (
        addr.to_owned(),
        RemoteAddr {
            key: RegionKey(key.parse().unwrap()),
            offset: 0,
        },
    )
}

/// Adds one, many times.
fn adder(world: &World, args: &[String]) {
    let (addr, at) = place(&args[0]);
    let name = format!("adder {}", std::process::id());
    let end = world
        .try_open(FabricConfig {
            identity: name.into_bytes(),
            ..world.config("adder")
        })
        .unwrap();
    let conn = end.fabric.connect(&addr).unwrap();
    for n in 0..args[1].parse::<u64>().unwrap() {
        if n.is_multiple_of(2) {
            faa(&*conn, at, 1).unwrap();
        } else {
            let mut ops = [
                Op::Faa {
                    at: at.plus(8),
                    add: 1,
                    old: 0,
                },
                Op::Faa { at, add: 1, old: 0 },
            ];
            conn.execute(&mut ops).unwrap();
        }
    }
    say("done");
}

/// Says things and dies without a farewell.
fn talker(world: &World, args: &[String]) {
    let end = world.endpoint("talker");
    let conn = end.fabric.connect(&args[0]).unwrap();
    for n in 0..100u64 {
        conn.send(&n.to_le_bytes()).unwrap();
    }
    say("said");
    wait_for_parent();
}

fn own_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    let whole: u64 = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|t| std::fs::read_to_string(t.unwrap().path().join("schedstat")).unwrap_or_default())
        .map(|s| {
            s.split(' ')
                .next()
                .and_then(|n| n.parse::<u64>().ok())
                .unwrap_or(0)
        })
        .sum();
    assert!(!stat.is_empty());
    Duration::from_nanos(whole)
}

/// Two connected endpoints with nothing to do.
fn idle(world: &World) {
    let (_target, _source, conn, back) = world.pair();
    conn.send(b"hello").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    let before = own_cpu();
    std::thread::sleep(Duration::from_secs(1));
    say(&(own_cpu() - before).as_micros().to_string());
    drop((conn, back));
}

fn descriptors_and_threads() -> (usize, usize) {
    let count = |dir| std::fs::read_dir(dir).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// Opens, uses and shuts down endpoints, and counts what is left.
fn leak(world: &World) {
    let once = || {
        let (target, source, conn, back) = world.pair();
        let (mem, at) = target.memory(1 << 16);
        faa(&*conn, at, 1).unwrap();
        conn.send(b"x").unwrap();
        world.until("message", || target.seen.count() == 1);
        if mem.word(0).unwrap().load(std::sync::atomic::Ordering::SeqCst) == 1 {
            target.fabric.deregister(at.key).unwrap();
        }
        source.fabric.shutdown();
        target.fabric.shutdown();
        target.seen.connected.lock().clear();
        for end in [&target, &source] {
            end.seen.ended.lock().clear();
        }
        assert!(Arc::strong_count(&back) == 1 && Arc::strong_count(&conn) == 1);
    };
    once();
    let before = descriptors_and_threads();
    for _ in 0..20 {
        once();
    }
    let after = descriptors_and_threads();
    say(&format!(
        "{} {}",
        after.0 as i64 - before.0 as i64,
        after.1 as i64 - before.1 as i64
    ));
}
