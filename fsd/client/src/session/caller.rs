//! What the kernel's requests do not say of the process behind them, and `/proc` does.

/// Bit of `CAP_FSETID` in a capability mask (`linux/capability.h`).
const CAP_FSETID: u64 = 1 << 4;

/// Flag of a process that is about to end, in `/proc/PID/stat` (`PF_EXITING`, `linux/sched.h`).
const PF_EXITING: u64 = 4;

/// A process that a request came from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caller {
    /// Its number, as this daemon sees it; 0 where it has none here.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
}

/// Field 9 of `/proc/PID/stat`, behind a name that may have blanks and brackets in it (proc(5)).
fn flags(stat: &str) -> u64 {
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let field = fields.split_whitespace().nth(6);
    field.and_then(|f| f.parse().ok()).unwrap_or(0)
}

fn status(pid: u32) -> Option<String> {
    std::fs::read_to_string(format!("/proc/{pid}/status")).ok()
}

/// A hexadecimal mask in `/proc/PID/status`; 0 if there is none.
fn mask(status: &str, name: &str) -> u64 {
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    line.and_then(|v| u64::from_str_radix(v.trim(), 16).ok())
        .unwrap_or(0)
}

impl Caller {
    /// Do set-user-id bits survive when it writes or truncates?
    #[must_use]
    pub fn keeps_suid(self) -> bool {
        match status(self.pid) {
            Some(status) => mask(&status, "CapEff:") & CAP_FSETID != 0,
            None => self.uid == 0,
        }
    }

    /// Has it a signal to handle (or is it gone)? The kernel's interrupt request does not reach us.
    #[must_use]
    pub fn has_signal(self) -> bool {
        let Some(status) = status(self.pid) else {
            return true;
        };
        let pending = mask(&status, "SigPnd:") | mask(&status, "ShdPnd:");
        pending & !mask(&status, "SigBlk:") & !mask(&status, "SigIgn:") != 0
    }

    /// Has it been killed, and not begun to end? Whatever else would end a process is turned into this signal for each of its threads.
    #[must_use]
    pub fn is_killed(self) -> bool {
        const KILLED: u64 = 1 << (libc::SIGKILL - 1);
        status(self.pid)
            .is_some_and(|status| (mask(&status, "SigPnd:") | mask(&status, "ShdPnd:")) & KILLED != 0)
    }

    /// Is it ending, killed or by itself, or gone? It may be closing its files.
    #[must_use]
    pub fn is_ending(self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid));
        !stat.is_ok_and(|stat| flags(&stat) & PF_EXITING == 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_what_proc_says() {
        let me = Caller {
            pid: std::process::id(),
            uid: rustix::process::getuid().as_raw(),
        };
        let text = status(me.pid).unwrap();
        assert_eq!(me.keeps_suid(), mask(&text, "CapEff:") & CAP_FSETID != 0);
        assert!(!me.has_signal() && !me.is_killed() && !me.is_ending());
        assert_eq!(flags("7 (a b) c) S 1 7 7 0 -1 4194564 0 0"), 4_194_564);
        assert_eq!(flags("7 (a"), 0);
        assert_eq!(mask("A:\nSigIgn:\t00000000000010f0\n", "SigIgn:"), 0x10f0);
        assert_eq!(mask("nothing", "SigIgn:"), 0);
    }

    #[test]
    fn a_process_that_is_gone() {
        let gone = |uid| Caller { pid: u32::MAX, uid };
        assert!(gone(0).keeps_suid() && !gone(1).keeps_suid());
        assert!(gone(0).has_signal() && !gone(0).is_killed() && gone(0).is_ending());
    }
}
