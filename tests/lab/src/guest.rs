//! One guest: booted, killed, paused, booted again.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::complaint;
use crate::error::{At, Error, Result};
use crate::image::Image;
use crate::link::Link;
use crate::process::{Process, lock};
use crate::qemu::{Machine, Places, Qemu};
use crate::snapshot;
use crate::switch::Switch;

/// Longest time for a guest to switch itself off.
const OFF_LIMIT: Duration = Duration::from_secs(10);

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct Plan {
    /// From 1.
    pub number: usize,
    /// What it boots.
    pub image: Image,
    /// Its hardware.
    pub machine: Machine,
    /// Its files on the host.
    pub places: Places,
    /// The snapshot it starts from; else from its kernel.
    pub snapshot: Option<PathBuf>,
    /// Longest time for a boot.
    pub boot_limit: Duration,
}

#[derive(Debug)]
struct Up {
    process: Process,
    link: Arc<Link>,
}

/// A guest.
#[derive(Debug)]
pub struct Guest {
    plan: Plan,
    switch: Switch,
    up: Mutex<Option<Up>>,
    notes: Mutex<Vec<String>>,
}

impl Guest {
    /// A guest that does not run yet.
    pub fn new(plan: Plan, switch: Switch) -> Guest {
        Guest {
            plan,
            switch,
            up: Mutex::new(None),
            notes: Mutex::new(Vec::new()),
        }
    }

    /// What it is called.
    pub fn name(&self) -> String {
        format!("guest {}", self.plan.number)
    }

    /// What it is made of.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What happened to it that a report should tell.
    pub fn notes(&self) -> Vec<String> {
        lock(&self.notes).clone()
    }

    /// Boots it; a boot that fails is tried once more, from its kernel. Emulated processors fail to boot now
    /// and then, which says nothing about what is to be tested.
    ///
    /// # Errors
    /// It failed twice.
    pub fn boot(&self) -> Result<()> {
        let first = match self.boot_once(self.plan.snapshot.is_some()) {
            Ok(()) => return Ok(()),
            // The host lacks something: that will not be better the second time.
            Err(error @ (Error::Missing { .. } | Error::Io { .. })) => return Err(error),
            Err(error) => error,
        };
        let note = format!("{}: the boot failed and was tried again: {first}", self.name());
        eprintln!("{note}");
        lock(&self.notes).push(note);
        let console = self.console();
        // What a failed boot printed is no complaint about what is tested.
        fs::rename(&console, console.with_extension("failed-boot"))
            .at(|| "keep the console of a failed boot".into())?;
        self.boot_once(false)
    }

    fn boot_once(&self, from_snapshot: bool) -> Result<()> {
        let start = Instant::now();
        let plan = &self.plan;
        let snapshot = plan.snapshot.as_deref().filter(|_| from_snapshot);
        let qemu = Qemu::start(&self.name(), &plan.image, plan.machine, &plan.places, snapshot)?;
        self.switch
            .attach(plan.number, qemu.card.try_clone().at(|| "share a socket".into())?)?;
        let booted = || {
            if from_snapshot {
                snapshot::resume(&qemu)?;
            }
            let link = Link::new(
                &self.name(),
                qemu.agent.try_clone().at(|| "share a socket".into())?,
            )?;
            link.ready(plan.boot_limit)?;
            Ok(link)
        };
        let link = booted().map_err(|error: Error| Error::Boot {
            guest: self.name(),
            why: match qemu.process.ended() {
                Ok(Some(status)) => format!("its emulator ended ({status}): {}", self.last_words()),
                _ => error.to_string(),
            },
            console: self.console(),
        })?;
        let how = if from_snapshot { "restored" } else { "booted" };
        lock(&self.notes).push(format!(
            "{} {how} in {:.1} s",
            self.name(),
            start.elapsed().as_secs_f64()
        ));
        *lock(&self.up) = Some(Up {
            process: qemu.process,
            link,
        });
        Ok(())
    }

    /// The last line of what its emulator and its kernel have printed.
    fn last_words(&self) -> String {
        let last = |path: &PathBuf| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.lines()
                .map(str::trim)
                .rfind(|line| !line.is_empty())
                .unwrap_or("nothing")
                .to_owned()
        };
        format!(
            "the emulator said {:?}, the console {:?}",
            last(&self.plan.places.log),
            last(&self.console())
        )
    }

    /// The connection to its agent.
    ///
    /// # Errors
    /// It is not up.
    pub fn link(&self) -> Result<Arc<Link>> {
        let up = lock(&self.up);
        let gone = || Error::Gone {
            guest: self.name(),
            doing: "it was not started, or was killed".into(),
        };
        up.as_ref().map(|up| Arc::clone(&up.link)).ok_or_else(gone)
    }

    /// Whether it is up, as far as the lab has seen to.
    pub fn is_up(&self) -> bool {
        lock(&self.up).is_some()
    }

    /// Ends it at once, as a power failure would.
    pub fn kill(&self) {
        *lock(&self.up) = None;
    }

    /// Stops it, as if its machine hung: time goes on without it.
    ///
    /// # Errors
    /// It is not up.
    pub fn pause(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Ends [`Guest::pause`].
    ///
    /// # Errors
    /// It is not up.
    pub fn resume(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        match lock(&self.up).as_ref() {
            Some(up) => up.process.signal(signal),
            None => Err(Error::Gone {
                guest: self.name(),
                doing: "sending it a signal".into(),
            }),
        }
    }

    /// Switches it off; ends it where it does not do so itself.
    pub fn power_off(&self) {
        if let Some(up) = lock(&self.up).take() {
            // It may be paused, or gone: then the drop ends it.
            let _ = up.process.signal(Signal::CONT);
            if up.link.power_off().is_ok() {
                let _ = up.process.wait(OFF_LIMIT);
            }
        }
    }

    fn console(&self) -> PathBuf {
        self.plan.places.console.clone()
    }

    /// Looks for complaints of its kernel on the console, and in `dmesg` where there is one.
    ///
    /// # Errors
    /// There is one.
    pub fn check_kernel(&self, dmesg: &str) -> Result<()> {
        let console = self.console();
        let bytes = fs::read(&console).at(|| format!("read {}", console.display()))?;
        match complaint::first(&String::from_utf8_lossy(&bytes)).or_else(|| complaint::first(dmesg)) {
            None => Ok(()),
            Some(line) => Err(Error::Kernel {
                guest: self.name(),
                line: line.to_owned(),
                console,
            }),
        }
    }
}
