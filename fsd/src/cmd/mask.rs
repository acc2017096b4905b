//! Signals that wait while a process becomes another program: they would be lost, or end that before it listens.

use std::io;
use std::mem::MaybeUninit;

/// Has these signals wait that come to this thread, or to a program that it becomes.
///
/// # Errors
/// There is no such signal.
pub fn hold(signals: &[i32]) -> io::Result<()> {
    set(libc::SIG_BLOCK, signals)
}

/// Ends that: those that have waited come now.
///
/// # Errors
/// There is no such signal.
pub fn let_come(signals: &[i32]) -> io::Result<()> {
    set(libc::SIG_UNBLOCK, signals)
}

fn set(how: i32, signals: &[i32]) -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is there to be written to, which makes it an empty one.
    if unsafe { libc::sigemptyset(set.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for signal in signals {
        // SAFETY: the set was made above.
        if unsafe { libc::sigaddset(set.as_mut_ptr(), *signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: the set was made above, and the old one is not asked for.
    match unsafe { libc::pthread_sigmask(how, set.as_ptr(), std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

#[cfg(test)]
mod tests {
    use signal_hook::consts::SIGURG;

    use super::*;
    use crate::cmd::alarm::Alarm;

    #[test]
    fn what_is_held_comes_later() {
        let mut alarm = Alarm::new(&[SIGURG]).unwrap();
        hold(&[SIGURG]).unwrap();
        // SAFETY: a signal to this thread, which has a handler for it.
        assert_eq!(unsafe { libc::raise(SIGURG) }, 0);
        assert_eq!(alarm.signals().count(), 0);
        let_come(&[SIGURG]).unwrap();
        assert_eq!(alarm.signals().collect::<Vec<_>>(), [SIGURG]);
        assert!(hold(&[-1]).is_err());
    }
}
