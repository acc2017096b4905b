//! Randomness that a seed says, for what asks for it and for what does not: the standard library keys its hash tables with
//! what `getrandom` gives it, and the order in which a table is gone through depends on that.

use rand::SeedableRng;
use rand::distr::{Distribution, StandardUniform};
use rand::rngs::StdRng;

use super::sched;

/// A random value.
#[must_use]
pub fn random<T>() -> T
where
    StandardUniform: Distribution<T>,
{
    match sched::me() {
        Some(me) => {
            let seed = me.core.state.lock().entropy.next();
            StandardUniform.sample(&mut StdRng::seed_from_u64(seed))
        }
        None => rand::random(),
    }
}

/// Takes the place of the C library's, in programs that are built with the feature `sim`.
///
/// # Safety
/// As getrandom(2): `into` has room for `len` bytes.
// SAFETY: the name is that of the C library's function, whose contract this one keeps.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(into: *mut u8, len: usize, flags: u32) -> isize {
    let Some(me) = sched::me() else {
        // SAFETY: the caller's promise.
        return unsafe { libc::syscall(libc::SYS_getrandom, into, len, flags) as isize };
    };
    let mut state = me.core.state.lock();
    // SAFETY: the caller has promised room for `len` bytes.
    let bytes = unsafe { std::slice::from_raw_parts_mut(into.cast::<std::mem::MaybeUninit<u8>>(), len) };
    for chunk in bytes.chunks_mut(8) {
        let word = state.entropy.next().to_le_bytes();
        for (byte, random) in chunk.iter_mut().zip(word) {
            byte.write(random);
        }
    }
    len as isize
}
