//! One emulator with a guest: its command line and its sockets.
//!
//! All sockets are pairs made here and inherited: no names in the file system, nothing to remove afterwards.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use crate::error::{At, Result};
use crate::image::Image;
use crate::process::Process;
use crate::{proto, tools};

/// The emulator.
pub const QEMU: &str = "qemu-system-x86_64";
/// What the kernel is told. A panic ends the emulator; warnings are on the console; software emulation has no
/// use for mitigations, and its time-stamp counter is better than what 6.12 would choose instead.
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 loglevel=5 panic=-1 mitigations=off tsc=reliable random.trust_cpu=on";

/// A guest's hardware.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Processors.
    pub cpus: u32,
    /// Memory in MiB.
    pub memory: u32,
    /// The disk that all guests share, in MiB, where there is one.
    pub disk: Option<u32>,
}

/// What the shared disk is called, by the emulator and in guests.
const DISK: &str = "shared";

/// A disk that several guests have at the same time: a file in memory without a name, which is gone with the last that has it open.
#[derive(Debug, Clone)]
pub struct Disk(Arc<OwnedFd>);

impl Disk {
    /// An empty one of so many MiB.
    ///
    /// # Errors
    /// The system has none.
    pub fn new(mib: u32) -> Result<Disk> {
        let file = memfd_create("fsd-lab-disk", MemfdFlags::CLOEXEC)
            .and_then(|file| ftruncate(&file, u64::from(mib) << 20).map(|()| file));
        let file = file.map_err(std::io::Error::from);
        Ok(Disk(Arc::new(file.at(|| format!("make a disk of {mib} MiB"))?)))
    }
}

/// Where a guest's files are on the host.
#[derive(Debug, Clone)]
pub struct Places {
    /// What its kernel prints, appended.
    pub console: PathBuf,
    /// What its emulator prints, appended.
    pub log: PathBuf,
    /// The folder it has as /job, writable.
    pub job: PathBuf,
    /// The folder it has as /target, read only.
    pub target: PathBuf,
    /// The disk it shares with others.
    pub disk: Option<Disk>,
}

/// A running emulator and our ends of its sockets.
#[derive(Debug)]
pub struct Qemu {
    /// The process.
    pub process: Process,
    /// To the agent in the guest.
    pub agent: UnixStream,
    /// To the emulator's monitor.
    pub monitor: UnixStream,
    /// The other end of the guest's network card.
    pub card: UnixStream,
}

impl Qemu {
    /// Starts one: from its kernel, or from a snapshot.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(
        name: &str,
        image: &Image,
        machine: Machine,
        places: &Places,
        snapshot: Option<&Path>,
    ) -> Result<Qemu> {
        let (agent, agent_end) = pair()?;
        let (monitor, monitor_end) = pair()?;
        let (card, card_end) = pair()?;
        let log = append(&places.log)?;
        let mut command = Command::new(tools::find(QEMU)?);
        command.args(arguments(image, machine, places));
        command
            .arg("-chardev")
            .arg(format!("socket,id=agent,fd={}", agent_end.as_raw_fd()));
        command
            .arg("-chardev")
            .arg(format!("socket,id=monitor,fd={}", monitor_end.as_raw_fd()));
        command.args(["-mon", "chardev=monitor,mode=control"]);
        command.arg("-netdev").arg(format!(
            "stream,id=card,server=off,addr.type=fd,addr.str={}",
            card_end.as_raw_fd()
        ));
        let mut inherited = vec![agent_end, monitor_end, card_end];
        if let Some(Disk(disk)) = &places.disk {
            let disk = disk.try_clone().at(|| "share a disk".into())?;
            command.args(drive(disk.as_raw_fd()));
            inherited.push(disk);
        }
        command.args(devices(places.disk.is_some()));
        if let Some(path) = snapshot {
            command
                .arg("-incoming")
                .arg(format!("exec:cat {}", shell_word(path)));
        }
        let process = Process::start(command, name, inherited, log)?;
        Ok(Qemu {
            process,
            agent,
            monitor,
            card,
        })
    }
}

fn pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair().at(|| "make a pair of sockets".into())?;
    Ok((ours, theirs.into()))
}

fn append(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .at(|| format!("write {}", path.display()))
}

/// Arguments that do not depend on sockets.
fn arguments(image: &Image, machine: Machine, places: &Places) -> Vec<String> {
    let shown = |path: &Path| path.display().to_string();
    let mut arguments = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("-machine", "q35,accel=tcg".into());
    // Without these strings are moved byte by byte in emulation, and readers see halves of words that real
    // processors move whole.
    add("-cpu", "max,erms=off,fsrm=off".into());
    add("-smp", machine.cpus.to_string());
    add("-m", machine.memory.to_string());
    add("-display", "none".into());
    add("-kernel", shown(&image.kernel.image()));
    add("-initrd", shown(&image.initramfs));
    add("-append", KERNEL_ARGUMENTS.into());
    add(
        "-chardev",
        format!("file,id=console,append=on,path={}", option_value(&places.console)),
    );
    add("-serial", "chardev:console".into());
    for (id, path, mode) in [
        ("job", &places.job, ""),
        ("target", &places.target, ",readonly=on"),
    ] {
        let path = option_value(path);
        add(
            "-fsdev",
            format!("local,id={id},path={path},security_model=none,multidevs=remap{mode}"),
        );
    }
    arguments.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(str::to_owned));
    arguments
}

/// A disk that others have, too. Nobody keeps anything of it but the file itself, so what one guest's write has returned the others
/// read; and as the file is in memory, nothing waits for anything to become durable.
fn drive(file: RawFd) -> [String; 2] {
    [
        "-drive".to_owned(),
        format!("file=/proc/self/fd/{file},format=raw,if=none,id={DISK},cache=writethrough,file.locking=off"),
    ]
}

/// The guest's devices; a snapshot fits the same ones in the same order only.
pub fn devices(disk: bool) -> Vec<String> {
    let disk = disk.then(|| format!("virtio-blk-pci,drive={DISK},share-rw=on,serial={DISK}"));
    let list = [
        "virtio-net-pci,netdev=card,mac=02:00:00:00:00:ff,romfile=".to_owned(),
        // Guests restored from one snapshot must not draw the same random numbers.
        "vmgenid,guid=auto".to_owned(),
        "virtio-rng-pci".to_owned(),
        "virtio-serial-pci".to_owned(),
        format!("virtserialport,chardev=agent,name={}", proto::PORT),
        "virtio-9p-pci,fsdev=job,mount_tag=job".to_owned(),
        "virtio-9p-pci,fsdev=target,mount_tag=target".to_owned(),
    ];
    list.into_iter()
        .chain(disk)
        .flat_map(|device| ["-device".to_owned(), device])
        .collect()
}

/// A comma within a value is written twice.
fn option_value(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// A word that a shell takes as it is.
pub fn shell_word(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::{option_value, shell_word};
    use std::path::Path;

    #[test]
    fn paths_survive_the_command_line() {
        assert_eq!(option_value(Path::new("/a,b")), "/a,,b");
        assert_eq!(shell_word(Path::new("/a b'c")), "'/a b'\\''c'");
    }
}
