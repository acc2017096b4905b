//! A proxy between a client and a server of TCP: it delays what it carries, counts it, and can hold answers back.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;

#[derive(Debug, Default)]
struct Shared {
    /// Nanoseconds, each way.
    delay: AtomicU64,
    /// Bytes that clients have sent.
    asked: AtomicU64,
    held: Mutex<bool>,
    changed: Condvar,
    /// Connections that were made, and how many of the first of them carry nothing any more.
    made: AtomicU64,
    silent: AtomicU64,
    stopping: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

impl Shared {
    fn wait_until_let_go(&self) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while *held && !self.stopping.load(Ordering::SeqCst) {
            held = self.changed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn is_silent(&self, number: u64) -> bool {
        number < self.silent.load(Ordering::SeqCst)
    }

    /// Carries bytes one way, each for the delay, until either side ends.
    fn carry(self: &Arc<Self>, number: u64, mut from: TcpStream, mut to: TcpStream, answers: bool) {
        let (tx, rx) = channel::<(Instant, Vec<u8>)>();
        let me = Arc::clone(self);
        std::thread::spawn(move || {
            for (since, bytes) in rx {
                let delay = Duration::from_nanos(me.delay.load(Ordering::SeqCst));
                std::thread::sleep((since + delay).saturating_duration_since(Instant::now()));
                if answers {
                    me.wait_until_let_go();
                }
                if me.is_silent(number) {
                    continue;
                }
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            // The other side may have ended already.
            if !me.is_silent(number) {
                let _ = to.shutdown(Shutdown::Both);
            }
        });
        let mut buffer = vec![0; 256 << 10];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if !answers {
                self.asked.fetch_add(n as u64, Ordering::SeqCst);
            }
            if tx.send((Instant::now(), buffer[..n].to_vec())).is_err() {
                break;
            }
        }
    }
}

/// A proxy on a port of its own; dropping it breaks its connections.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: String,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts one in front of a server, which need not be there yet.
    ///
    /// # Errors
    /// No port is free.
    pub fn start(server: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let shared = Arc::new(Shared::default());
        let (me, server) = (Arc::clone(&shared), server.to_owned());
        let accepting = std::thread::spawn(move || {
            for client in listener.incoming() {
                if me.stopping.load(Ordering::SeqCst) {
                    return;
                }
                // A client that cannot be served sees its connection end.
                let _ = client.and_then(|client| {
                    let server = TcpStream::connect(&server)?;
                    client.set_nodelay(true)?;
                    server.set_nodelay(true)?;
                    let mut streams = me.streams.lock().unwrap_or_else(PoisonError::into_inner);
                    streams.extend([client.try_clone()?, server.try_clone()?]);
                    drop(streams);
                    let ways = [
                        (client.try_clone()?, server.try_clone()?, false),
                        (server, client, true),
                    ];
                    let number = me.made.fetch_add(1, Ordering::SeqCst);
                    for (from, to, answers) in ways {
                        let me = Arc::clone(&me);
                        std::thread::spawn(move || me.carry(number, from, to, answers));
                    }
                    Ok(())
                });
            }
        });
        Ok(Self {
            shared,
            address,
            accepting: Some(accepting),
        })
    }

    /// Where clients connect to.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// From now on everything takes so long, each way.
    pub fn delay(&self, each_way: Duration) {
        let nanos = u64::try_from(each_way.as_nanos()).unwrap_or(u64::MAX);
        self.shared.delay.store(nanos, Ordering::SeqCst);
    }

    /// Holds answers back, or lets them go.
    pub fn hold(&self, yes: bool) {
        *self.shared.held.lock().unwrap_or_else(PoisonError::into_inner) = yes;
        self.shared.changed.notify_all();
    }

    /// Connections that there are carry nothing any more, and nobody is told, as where a host has lost its power and is back; new ones work.
    pub fn silence(&self) {
        let made = self.shared.made.load(Ordering::SeqCst);
        self.shared.silent.store(made, Ordering::SeqCst);
    }

    /// Bytes that clients have sent.
    #[must_use]
    pub fn asked(&self) -> u64 {
        self.shared.asked.load(Ordering::SeqCst)
    }

    /// Waits until clients have sent so many bytes.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait_for(&self, bytes: u64, limit: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + limit;
        while self.asked() < bytes {
            let late = Instant::now() > end;
            anyhow::ensure!(!late, "{} bytes were asked for, not {bytes}", self.asked());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.hold(false);
        let streams = self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner);
        for stream in streams.iter() {
            // It may have ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(streams);
        // Wakes the one who accepts.
        let _ = TcpStream::connect(&self.address);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

/// Proxies in front of the servers of a cluster.
#[derive(Debug)]
pub struct Proxies {
    /// In front of the metadata server.
    pub meta: Proxy,
    /// In front of each storage node.
    pub storage: Vec<Proxy>,
}

impl Proxies {
    /// In front of the servers that a configuration names. Returns the configurations of the metadata server and of the mounts, which go
    /// through them.
    ///
    /// # Errors
    /// No port is free; the configuration has no addresses.
    pub fn start(settings: &str) -> anyhow::Result<(Self, String, String)> {
        let listens: Vec<&str> = settings.lines().filter(|l| l.starts_with("listen = ")).collect();
        let address = |line: &str| line.trim_start_matches("listen = ").trim_matches('"').to_owned();
        let (first, rest) = listens.split_first().context("no addresses")?;
        let meta = Proxy::start(&address(first))?;
        let mut of_meta = settings.to_owned();
        let mut storage = Vec::new();
        for line in rest {
            let proxy = Proxy::start(&address(line))?;
            of_meta = of_meta.replace(*line, &format!("listen = \"{}\"", proxy.address()));
            storage.push(proxy);
        }
        let of_mounts = of_meta.replace(*first, &format!("listen = \"{}\"", meta.address()));
        Ok((Self { meta, storage }, of_meta, of_mounts))
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Proxy> {
        std::iter::once(&self.meta).chain(&self.storage)
    }
}
