//! Mounting in the kernel, and ending what was mounted: never more than that.
//!
//! A mount point is a path, and by the time a daemon ends something else may be mounted there. Whose a mount is, its number
//! and that of its device say; but both are used again, perhaps at once, when it has gone. So a daemon whose connection to the
//! kernel has ended, as it does with the mount, has nothing left to unmount.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// Type of the file system, as in /proc/mounts.
const TYPE: &str = "fuse.distfuse";

/// What `-o` takes: name, flag of mount(2), whether it sets or clears it.
const OPTIONS: &[(&str, MountFlags, bool)] = &[
    ("suid", MountFlags::NOSUID, false),
    ("nosuid", MountFlags::NOSUID, true),
    ("dev", MountFlags::NODEV, false),
    ("nodev", MountFlags::NODEV, true),
    ("exec", MountFlags::NOEXEC, false),
    ("noexec", MountFlags::NOEXEC, true),
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
    ("async", MountFlags::SYNCHRONOUS, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("atime", MountFlags::NOATIME, false),
    ("noatime", MountFlags::NOATIME, true),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("diratime", MountFlags::NODIRATIME, false),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
];

/// The flags for options as mount(8) has them, separated by commas, the later ones winning. Without any, set-user-id programs
/// and device files of the file system are not honoured: who may write to it is decided elsewhere.
///
/// # Errors
/// An option that is not known, in a sentence.
pub fn flags_of(options: &[String]) -> Result<MountFlags, String> {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOATIME;
    let words = options.iter().flat_map(|list| list.split(','));
    for word in words.filter(|word| !word.is_empty() && *word != "defaults") {
        let Some((_, flag, set)) = OPTIONS.iter().find(|(name, ..)| *name == word) else {
            let known: Vec<&str> = OPTIONS.iter().map(|(name, ..)| *name).collect();
            return Err(format!("-o {word} is not known; there are {}", known.join(", ")));
        };
        flags.set(*flag, *set);
        if *word == *"relatime" {
            flags.remove(MountFlags::NOATIME);
        }
    }
    Ok(flags)
}

/// The same as words, for a helper that mounts for who is not root.
#[must_use]
pub fn words_of(flags: MountFlags) -> Vec<&'static str> {
    let all = OPTIONS.iter();
    all.filter(|(_, flag, set)| *set && flags.contains(*flag))
        .map(|(name, ..)| *name)
        .collect()
}

/// Mounts at `point`; the device file that the kernel talks through. What a former life has left there goes just before, so that hardly
/// anybody sees the directory below. Only root may.
///
/// # Errors
/// Those of open(2) of /dev/fuse and of mount(2).
pub fn mount(point: &Path, name: &str, flags: MountFlags, former: Option<&Mounted>) -> std::io::Result<File> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,allow_other",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw()
    );
    let data = std::ffi::CString::new(data)?;
    former.into_iter().for_each(Mounted::abandon);
    rustix::mount::mount(name, point, TYPE, flags, data.as_c_str())?;
    Ok(device)
}

/// What is mounted at a point, by its number and that of its device, as in /proc/self/mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    point: PathBuf,
    number: String,
    /// Number of its device, as `major:minor`.
    pub device: String,
}

/// The numbers of the mount at a point, above all others there, and of its device. Not by `stat`, which would ask the mount.
fn numbers_at(mounts: &str, point: &Path) -> Option<(String, String)> {
    let text = escaped(point);
    let found = |line: &&str| line.split(' ').nth(4) == Some(&text);
    let mut words = mounts.lines().rfind(found)?.split(' ');
    Some((words.next()?.to_owned(), words.nth(1)?.to_owned()))
}

/// A path as the kernel writes it into its lists of mounts.
#[must_use]
pub fn escaped(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.replace('\\', "\\134")
        .replace(' ', "\\040")
        .replace('\t', "\\011")
        .replace('\n', "\\012")
}

impl Mounted {
    /// What is at a point now.
    #[must_use]
    pub fn at(point: &Path) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let (number, device) = numbers_at(&mounts, point)?;
        Some(Self {
            point: point.to_owned(),
            number,
            device,
        })
    }

    /// What says which one it is, for the next life of the process.
    #[must_use]
    pub fn to_text(&self) -> String {
        format!("{} {} {}", self.number, self.device, self.point.display())
    }

    /// From [`Mounted::to_text`].
    #[must_use]
    pub fn from_text(text: &str) -> Option<Self> {
        let mut words = text.splitn(3, ' ');
        let (number, device, point) = (words.next()?, words.next()?, words.next()?);
        Some(Self {
            point: point.into(),
            number: number.into(),
            device: device.into(),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Ends the connection to the kernel of a mount that answers nothing any more, and leaves it where it is. All that wait for an answer
    /// fail: programs, and this process's own invalidations of pages that are locked for reads. Such a thread can be ended by nothing
    /// else, and keeps the process from ending and from beginning anew.
    pub fn disconnect(&self) {
        if Self::at(&self.point).as_ref() != Some(self) {
            return;
        }
        // The kernel ends the connection before it finds that the mount is in use, by this handle of its root, and refuses to unmount it.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(&self.point, flags, Mode::empty());
        if root.is_ok() && rustix::mount::unmount(&self.point, UnmountFlags::FORCE) == Err(Errno::BUSY) {
            return;
        }
        // Not root: whose mount it is may end it by a file, where the file system with that file is mounted.
        let minor = self.device.split(':').next_back().unwrap_or_default();
        if let Err(error) = std::fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1") {
            tracing::debug!(
                "the connection of {} ends with this process only: {error}",
                self.point.display()
            );
        }
    }

    /// Takes one whose daemon is no more out of the name space, unless it is gone, or something else lies above it. What waits for an
    /// answer of that daemon fails.
    pub fn abandon(&self) {
        if Self::at(&self.point).as_ref() == Some(self)
            && rustix::mount::unmount(&self.point, UnmountFlags::FORCE | UnmountFlags::DETACH).is_err()
        {
            self.unmount();
        }
    }

    /// Takes it out of the name space, also if files are open, unless it is gone, or something else lies above it.
    pub fn unmount(&self) {
        if Self::at(&self.point).as_ref() != Some(self) {
            return;
        }
        let point = &self.point;
        if rustix::mount::unmount(point, UnmountFlags::empty()).is_err()
            && rustix::mount::unmount(point, UnmountFlags::DETACH).is_err()
        {
            // Not root: fusermount3 may.
            let _ = std::process::Command::new("fusermount3")
                .arg("-uz")
                .arg(point)
                .status();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_mount_at_a_point() {
        let mounts = "22 1 0:20 / /a rw - tmpfs t rw\n23 22 0:31 / /a rw - fuse f rw\n24 1 0:40 / /a\\040b rw - fuse f rw\n";
        let at = |point: &str| numbers_at(mounts, Path::new(point));
        assert_eq!(at("/a"), Some(("23".into(), "0:31".into())));
        assert_eq!(at("/a b"), Some(("24".into(), "0:40".into())));
        assert_eq!(at("/b"), None);
        let mounted = Mounted {
            point: "/a b".into(),
            number: "24".into(),
            device: "0:40".into(),
        };
        assert_eq!(Mounted::from_text(&mounted.to_text()), Some(mounted));
    }

    #[test]
    fn options_are_those_of_mount() {
        let flags = |options: &[&str]| flags_of(&options.iter().map(|o| (*o).to_owned()).collect::<Vec<_>>());
        let none = flags(&[]).unwrap();
        assert!(none.contains(MountFlags::NOSUID | MountFlags::NODEV) && !none.contains(MountFlags::RDONLY));
        assert_eq!(flags(&["defaults", ""]).unwrap(), none);
        let some = flags(&["ro,suid", "dev,nodev"]).unwrap();
        assert!(some.contains(MountFlags::NODEV | MountFlags::RDONLY) && !some.contains(MountFlags::NOSUID));
        assert_eq!(words_of(none), ["nosuid", "nodev", "noatime"]);
        assert!(flags(&["ro,nonsense"]).unwrap_err().contains("nonsense"));
    }
}
