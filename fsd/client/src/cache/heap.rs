//! The process's own memory.

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
