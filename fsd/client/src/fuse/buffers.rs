//! Buffers for data on its way to the kernel, kept by each thread: fresh memory would be zeroed and
//! faulted in for every request.

use std::cell::RefCell;

/// Largest buffer kept, bytes.
const KEEP: usize = 2 << 20;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of `len` bytes with unspecified contents.
#[must_use]
pub fn take(len: usize) -> Vec<u8> {
    let mut buffer = BUFFER.with_borrow_mut(std::mem::take);
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    buffer.truncate(len);
    buffer
}

/// Gives a buffer back for the thread's next request.
pub fn give(buffer: Vec<u8>) {
    if buffer.capacity() <= KEEP {
        BUFFER.set(buffer);
    }
}
