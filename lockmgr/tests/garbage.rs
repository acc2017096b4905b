//! Whatever bytes come as a lease message: no panic, no memory beyond a bound.
#![allow(missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use lockmgr::msg::LeaseMsg;
use proptest::prelude::*;

thread_local! {
    /// The largest piece of memory that this thread has asked for.
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

struct Watched;

#[global_allocator]
static WATCHED: Watched = Watched;

// SAFETY: the system's allocator does the work; what is noted is a number in a cell.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Threads that are just ending are not watched.
        let _ended = LARGEST.try_with(|l| l.set(l.get().max(layout.size())));
        // SAFETY: passed on as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: passed on as it came.
        unsafe { System.dealloc(at, layout) }
    }
}

proptest! {
    #[test]
    fn decoding_is_bounded(
        kind in 0u8..12,
        head in prop::collection::vec(any::<u8>(), 17),
        version in 0u64..1 << 20,
        words in prop_oneof![0u8..40, any::<u8>()],
        tail in prop::collection::vec(any::<u8>(), 0..600),
    ) {
        let mut bytes = vec![kind];
        bytes.extend(head);
        bytes.extend(version.to_le_bytes());
        bytes.push(words);
        bytes.extend(tail);
        LARGEST.set(0);
        let decoded = LeaseMsg::decode(&bytes);
        prop_assert!(LARGEST.get() < 64 * 1024, "{} bytes", LARGEST.get());
        if let Ok(msg) = decoded {
            prop_assert_eq!(LeaseMsg::decode(&msg.encode()).ok(), Some(msg));
        }
    }
}
