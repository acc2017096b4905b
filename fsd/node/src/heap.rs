//! The process's own memory, as the C library keeps it.

/// Blocks of so many bytes or more are memory of their own, which goes back to the system when they are freed.
#[cfg(target_env = "gnu")]
const OWN: libc::c_int = 256 << 10;
/// So many free bytes at the end of a heap go back: fewer are needed again soon, for the next pages that are written.
#[cfg(target_env = "gnu")]
const TRIM: libc::c_int = 4 << 20;

/// Has large blocks, and what is free at the ends of heaps, go back to the system. glibc raises both limits with the largest block that was
/// ever freed (`mallopt(3)`), and the buffers of FUSE requests have 16 MiB: from then on a MiB for a read would come out of a heap of the
/// thread, and each of sixteen heaps could keep 32 MiB that nobody uses.
#[allow(unsafe_code)]
pub fn bound() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes numbers, touches nothing but the allocator's own state, under its locks.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN);
        libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM);
    }
}

/// Gives pages that lie free in the C library's heap back to the system. What was freed lies between what is still in use, and
/// glibc gives back by itself only what lies at the end.
#[allow(unsafe_code)]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number, touches nothing but the allocator's own state, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
