//! One processor for all threads of a simulation: only one of them runs at a time, and the next one begins sooner on the
//! processor that the last one has just left.

/// The processors that a thread could use before.
pub(super) struct Before(libc::cpu_set_t);

fn set(processors: &libc::cpu_set_t) {
    // SAFETY: the set is valid, and of the length given. It is a matter of speed only whether it can be done.
    unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), processors) };
}

/// The calling thread, and those that it starts, stay on the processor that it is on, until this is dropped.
pub(super) fn one_processor() -> Option<Before> {
    // SAFETY: a set of processors is bits, all of which may be zero.
    let (mut before, mut one): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { std::mem::zeroed() };
    // SAFETY: the set is valid for writing, and of the length given.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut before) } != 0 {
        return None;
    }
    // SAFETY: it asks for nothing.
    let here = usize::try_from(unsafe { libc::sched_getcpu() }).ok()?;
    // SAFETY: the set is valid; a number beyond its end is ignored.
    unsafe { libc::CPU_SET(here, &mut one) };
    set(&one);
    Some(Before(before))
}

impl Drop for Before {
    fn drop(&mut self) {
        set(&self.0);
    }
}
