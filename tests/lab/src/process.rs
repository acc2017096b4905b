//! Emulators as children that never outlive the lab, however it ends.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};

use crate::error::{At, Error, Result};
use crate::tools;

/// Takes a lock also where a thread has panicked with it: what is kept under locks here is never half done.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All children, for [`end_all`].
static CHILDREN: Mutex<Vec<Weak<Mutex<Child>>>> = Mutex::new(Vec::new());

/// A child process; ended when dropped.
#[derive(Debug)]
pub struct Process {
    child: Arc<Mutex<Child>>,
    name: String,
}

impl Process {
    /// Starts a program that inherits `sockets` under their own numbers; what it prints goes to `log`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(mut command: Command, name: &str, sockets: Vec<OwnedFd>, log: File) -> Result<Process> {
        let program = command.get_program().to_string_lossy().into_owned();
        let errors = log.try_clone().at(|| format!("share the log of {name}"))?;
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        // Of its own group: Ctrl-C comes to the lab, which ends its children in order.
        command.process_group(0);
        let numbers: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
        let lab = rustix::process::getpid();
        let prepare = move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The lab may have ended before that was in force.
            if getppid() != Some(lab) {
                return Err(std::io::Error::other("the lab has ended"));
            }
            for number in &numbers {
                // SAFETY: the sockets are open: the closure that spawns owns them until the child runs.
                let socket = unsafe { BorrowedFd::borrow_raw(*number) };
                fcntl_setfd(socket, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec it makes system calls only, and allocates only where it fails for good.
        unsafe { command.pre_exec(prepare) };
        let child = on_lasting_thread(move || {
            let child = command.spawn();
            drop(sockets);
            child
        })?;
        let child = child.map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => Error::missing(format!("the program {program}"), tools::SETUP),
            _ => Error::Io {
                what: format!("start {program}"),
                source,
            },
        })?;
        let child = Arc::new(Mutex::new(child));
        let mut children = lock(&CHILDREN);
        children.retain(|child| child.strong_count() > 0);
        children.push(Arc::downgrade(&child));
        Ok(Process {
            child,
            name: name.to_owned(),
        })
    }

    /// How it has ended, if it has.
    ///
    /// # Errors
    /// The system does not say.
    pub fn ended(&self) -> Result<Option<ExitStatus>> {
        lock(&self.child)
            .try_wait()
            .at(|| format!("look at {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn wait(&self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let what = format!("the end of {}", self.name);
                return Err(Error::TimeOut {
                    what,
                    seconds: limit.as_secs(),
                });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let mut child = lock(&self.child);
        if child
            .try_wait()
            .at(|| format!("look at {}", self.name))?
            .is_some()
        {
            return Err(Error::Gone {
                guest: self.name.clone(),
                doing: "sending it a signal".into(),
            });
        }
        kill_process(Pid::from_child(&child), signal).at(|| format!("send a signal to {}", self.name))
    }

    /// Ends it at once.
    pub fn kill(&self) {
        end(&self.child);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn end(child: &Mutex<Child>) {
    let mut child = lock(child);
    // Both fail only where it has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

/// Ends all children at once.
pub fn end_all() {
    let children: Vec<_> = lock(&CHILDREN).iter().filter_map(Weak::upgrade).collect();
    for child in children {
        end(&child);
    }
}

/// A signal told us to end.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Ends all children because we were told to end. What fails for that reason finds [`interrupted`] true.
pub fn interrupt() {
    INTERRUPTED.store(true, Ordering::SeqCst);
    end_all();
}

/// Whether we were told to end: what fails from then on is no failure of what was run.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Runs `job` on a thread that lives as long as this program.
///
/// The kernel sends the parent-death signal when the *thread* that started a child ends, so children are
/// started by one thread that never does.
fn on_lasting_thread<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    type Job = Box<dyn FnOnce() + Send>;
    static JOBS: OnceLock<Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (tx, rx) = channel::<Job>();
        std::thread::spawn(move || rx.into_iter().for_each(|job| job()));
        tx
    });
    let (tx, rx) = channel();
    // The receiver is there: we wait for it.
    let send = Box::new(move || drop(tx.send(job())));
    let gone = || Error::check("the thread that starts programs is gone");
    jobs.send(send).map_err(|_| gone())?;
    rx.recv().map_err(|_| gone())
}
