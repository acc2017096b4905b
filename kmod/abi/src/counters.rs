//! What the kernel counts.

use crate::layout::COUNTERS_STRIDE;
use crate::sync::Ordering;
use crate::sys::Map;

macro_rules! counters {
    ($($(#[$about:meta])* $name:ident,)*) => {
        /// What has happened since the daemon attached.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Counters {
            $($(#[$about])* pub $name: u64,)*
        }

        impl Counters {
            /// Their names, in the order of the header.
            pub const NAMES: &'static [&'static str] = &[$(stringify!($name)),*];

            fn of(mut sum: impl FnMut(usize) -> u64) -> Counters {
                let mut next = 0..;
                let mut one = || next.next().map_or(0, &mut sum);
                Counters { $($name: one(),)* }
            }

            /// Names and values.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }
    };
}

counters! {
    /// Entered at once.
    hits,
    /// Had to ask the daemon.
    misses,
    /// Slept for a lease.
    waits,
    /// Were told EAGAIN instead.
    nowaits,
    /// Grants installed.
    installs,
    /// Inodes whose pages were right for a new grant.
    pages_kept,
    /// Inodes whose pages were dropped.
    pages_dropped,
    /// Times that the last one left a lease that was being revoked.
    drains,
    /// Flushes carried out.
    flushes,
    /// Those that found the entry dirty.
    flushes_dirty,
    /// Those that took pages out of page tables.
    unmaps,
    /// Page faults that slept for a lease.
    fault_retries,
    /// Reads and writes that made their buffer present and went on.
    buffer_faults,
    /// Events for which the daemon was woken.
    wakeups_made,
    /// Events that it found by itself.
    wakeups_avoided,
    /// Doorbells of the daemon.
    kicks,
    /// stat answered by the kernel.
    stat_local,
    /// stat answered by the daemon.
    stat_remote,
    /// Names found valid by the kernel.
    name_local,
    /// Names that the daemon was asked for.
    name_remote,
    /// Permissions checked by the kernel.
    permission_local,
    /// Events that found their ring full.
    events_delayed,
    /// Reads and writes that the daemon was asked to do.
    calls,
    /// Those that it left to the kernel.
    calls_again,
    /// Answers that came while the task still looked for them.
    spins,
    /// Writes and faults that had to ask for space.
    space_asked,
    /// Inodes taken out of page tables at the end of a term.
    term_unmaps,
}

pub(crate) fn read(map: &Map) -> Counters {
    let cells = map.counters();
    Counters::of(|which| {
        cells
            .chunks(COUNTERS_STRIDE)
            .filter_map(|cpu| cpu.get(which))
            .fold(0u64, |sum, cell| sum.wrapping_add(cell.load(Ordering::Relaxed)))
    })
}
