//! Mounts to be tested, and helpers.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use distfuse_abi::{Attachment, Options};

use crate::asking;
use crate::control::{Control, FIRST};
use crate::manager::{Manager, Running};

/// Things that must happen have so long.
pub const SOON: Duration = Duration::from_secs(30);
/// Things that must not happen have so long to do it.
pub const WHILE: Duration = Duration::from_millis(150);

/// Waits until something is so.
pub fn until(what: &str, mut so: impl FnMut() -> bool) -> Result<()> {
    let end = Instant::now() + SOON;
    while !so() {
        if Instant::now() > end {
            bail!("still not: {what}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// A call that may take long.
pub struct Task<T>(JoinHandle<T>);

impl<T: Send + 'static> Task<T> {
    /// Starts it.
    pub fn start(call: impl FnOnce() -> T + Send + 'static) -> Task<T> {
        Task(std::thread::spawn(call))
    }

    /// Fails if it ends.
    pub fn waits(&self, what: &str) -> Result<()> {
        std::thread::sleep(WHILE);
        if self.0.is_finished() {
            bail!("does not wait: {what}");
        }
        Ok(())
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.0.is_finished()
    }

    /// Its result.
    pub fn end(self, what: &str) -> Result<T> {
        until(what, || self.0.is_finished())?;
        self.0.join().ok().with_context(|| format!("{what} panicked"))
    }
}

/// Servers, mounts, and a lease manager attached to them.
pub struct Fixture {
    dir: PathBuf,
    /// What the servers share.
    pub control: Arc<Control>,
    points: Vec<PathBuf>,
    servers: Vec<Child>,
    running: Option<Running>,
}

impl Fixture {
    /// Mounts, and attaches where there are options.
    pub fn new(mounts: usize, options: Option<&Options>) -> Result<Fixture> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "kmod-check-{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, SeqCst)
        );
        let dir = std::env::temp_dir().join(name);
        fs::create_dir_all(&dir)?;
        let path = dir.join("control");
        let control = Arc::new(Control::open(&path)?);
        for n in 0..8u8 {
            let ino = control.create(&format!("f{n}"), 0o644)?;
            control.write(ino, 0, &vec![b'a' + n; 65536])?;
        }
        let mut fixture = Fixture {
            dir,
            control,
            points: Vec::new(),
            servers: Vec::new(),
            running: None,
        };
        for number in 0..mounts {
            let point = fixture.dir.join(format!("m{number}"));
            fs::create_dir_all(&point)?;
            let server = Command::new(std::env::current_exe()?)
                .arg("serve")
                .arg(&point)
                .arg(&path)
                .arg(number.to_string())
                .spawn()
                .context("start a server")?;
            fixture.servers.push(server);
            fixture.points.push(point);
        }
        for point in &fixture.points {
            until("mounted", || is_mounted(point))?;
        }
        let block = fixture.control.block();
        until("served", || block.ready.load(SeqCst) as usize == mounts)?;
        if let Some(options) = options {
            fixture.attach(options)?;
        }
        Ok(fixture)
    }

    /// One mount, names and permissions and stat under leases.
    pub fn one() -> Result<Fixture> {
        Fixture::new(1, Some(&all()))
    }

    /// One mount whose files can be opened without a lease, for those who want to wait for it later.
    pub fn plain() -> Result<Fixture> {
        let options = Options {
            access: false,
            ..all()
        };
        Fixture::new(1, Some(&options))
    }

    /// Two mounts of the same files.
    pub fn two() -> Result<Fixture> {
        Fixture::new(2, Some(&all()))
    }

    /// The root of a mount.
    pub fn root(&self, mount: usize) -> Result<OwnedFd> {
        let point = self.points.get(mount).context("no such mount")?;
        let root = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(point)?;
        Ok(root.into())
    }

    /// Attaches to all mounts.
    pub fn attach(&mut self, options: &Options) -> Result<()> {
        let mut attachments = Vec::new();
        for mount in 0..self.points.len() {
            attachments.push(Attachment::open(self.root(mount)?.as_fd(), options)?);
        }
        let running = Running::start(Arc::clone(&self.control), attachments);
        asking::listen(&self.dir.join(asking::NAME), running.get()?)?;
        self.running = Some(running);
        Ok(())
    }

    /// Closes the device: the daemon's end, as far as the module sees it.
    pub fn detach(&mut self) {
        self.running = None;
        let socket = self.dir.join(asking::NAME);
        // Its threads look whether there still is a manager.
        for _ in 0..asking::THREADS {
            let _ = UnixStream::connect(&socket);
        }
        let _ = fs::remove_file(&socket);
    }

    /// The lease manager.
    pub fn manager(&self) -> Result<&Arc<Manager>> {
        self.running.as_ref().context("not attached")?.get()
    }

    /// A path in a mount.
    pub fn path(&self, mount: usize, name: &str) -> PathBuf {
        self.points
            .get(mount)
            .map_or_else(PathBuf::new, |point| point.join(name))
    }

    /// Opens a file to read and write.
    pub fn open(&self, mount: usize, name: &str) -> Result<File> {
        self.open_with(mount, name, 0)
    }

    /// The same with flags.
    pub fn open_with(&self, mount: usize, name: &str, flags: i32) -> Result<File> {
        let path = self.path(mount, name);
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(flags & libc::O_CREAT != 0)
            .truncate(false)
            .mode(0o644)
            .custom_flags(flags & !libc::O_CREAT)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))
    }

    /// Kills a server, as `kill -9` does.
    pub fn kill_server(&mut self, mount: usize) -> Result<()> {
        let server = self.servers.get_mut(mount).context("no such mount")?;
        server.kill()?;
        server.wait()?;
        Ok(())
    }

    /// Unmounts a mount, which must be possible.
    pub fn unmount(&mut self, mount: usize) -> Result<()> {
        let point = self.points.get(mount).context("no such mount")?;
        unmount(point)?;
        if let Some(server) = self.servers.get_mut(mount) {
            until("the server ends", || matches!(server.try_wait(), Ok(Some(_))))?;
        }
        Ok(())
    }

    /// Ends it all; fails if something cannot be ended.
    pub fn end(mut self) -> Result<()> {
        for mount in 0..self.points.len() {
            if self.points.get(mount).is_some_and(|point| is_mounted(point)) {
                self.unmount(mount)?;
            }
        }
        self.detach();
        Ok(())
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        self.detach();
        for (point, server) in self.points.iter().zip(&mut self.servers) {
            if is_mounted(point) {
                let _ = detach_mount(point);
            }
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// All that the kernel can answer.
pub fn all() -> Options {
    Options {
        names: true,
        access: true,
        entries: 1024,
        // As the daemon's default.
        spin: Duration::from_micros(20),
        ..Options::default()
    }
}

/// The inode number of a file that is there from the start.
pub fn ino(n: u64) -> u64 {
    FIRST + n
}

fn is_mounted(point: &Path) -> bool {
    let name = point.to_string_lossy();
    fs::read_to_string("/proc/self/mounts")
        .is_ok_and(|list| list.lines().any(|line| line.split(' ').nth(1) == Some(&*name)))
}

fn umount2(point: &Path, flags: i32) -> std::io::Result<()> {
    let name = std::ffi::CString::new(point.as_os_str().as_encoded_bytes())?;
    // SAFETY: a string that ends with 0.
    match unsafe { libc::umount2(name.as_ptr(), flags) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Unmounts; a mount that was flushed or faulted a moment ago may still be busy.
fn unmount(point: &Path) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(5);
    loop {
        match umount2(point, 0) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error).with_context(|| format!("unmount {}", point.display())),
        }
    }
}

fn detach_mount(point: &Path) -> std::io::Result<()> {
    umount2(point, libc::MNT_DETACH)
}
