//! What a guest's kernel prints when something is wrong with it.

/// Parts of lines that mean a defect, of the kernel or of what we made it do.
const MARKS: &[&str] = &[
    "WARNING: ",
    "BUG: ",
    "Oops",
    "Kernel panic",
    "blocked for more than",
    "general protection fault",
    "kernel BUG at",
    "possible circular locking",
    "refcount_t: ",
];

/// The first line of a kernel's log that is a complaint.
pub fn first(log: &str) -> Option<&str> {
    log.lines()
        .map(str::trim)
        .find(|line| MARKS.iter().any(|mark| line.contains(mark)))
}

#[cfg(test)]
mod tests {
    use super::first;

    #[test]
    fn complaints_are_told_from_chatter() {
        let chatter = "[    0.04] tsc: Unable to calibrate against PIT\n[ 1.2] mtrr: your CPUs had inconsistent MTRRdefType settings\n\
            [    9.4] x86/mm: Checked W+X mappings: passed, no W+X pages found.\n[ 2.0] Warning: unable to open an initial console.\n";
        assert_eq!(first(chatter), None);
        for line in [
            "[ 12.1] WARNING: CPU: 0 PID: 1 at fs/fuse/file.c:12 fuse_x+0x1/0x2 [fuse]",
            "[ 12.1] BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "[ 12.1] watchdog: BUG: soft lockup - CPU#0 stuck for 64s!",
            "[ 12.1] Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "[ 12.1] INFO: task fsd:12 blocked for more than 60 seconds.",
            "[ 12.1] Kernel panic - not syncing: Attempted to kill init!",
        ] {
            assert_eq!(first(&format!("{chatter}{line}\r\nmore\n")), Some(line));
        }
    }
}
