//! One emulator with a guest: its command line and its sockets.
//!
//! All sockets are pairs made here and inherited: no names in the file system, nothing to remove afterwards.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

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
        command.args(devices());
        if let Some(path) = snapshot {
            command
                .arg("-incoming")
                .arg(format!("exec:cat {}", shell_word(path)));
        }
        let process = Process::start(command, name, vec![agent_end, monitor_end, card_end], log)?;
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

/// The guest's devices; a snapshot fits the same ones in the same order only.
pub fn devices() -> Vec<String> {
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
