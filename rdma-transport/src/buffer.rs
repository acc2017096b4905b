//! Memory that an operation owns while it is under way, and the pool that it comes from.
//!
//! A transfer that nobody waits for cannot borrow the caller's memory. So it takes a [`Buffer`] by value and gives
//! it back with its completion. Buffers of an endpoint's pool lie in memory that is registered with its adapter,
//! if it has one: the adapter reads and writes them in place. A buffer made of a `Vec` works with every provider;
//! where an adapter is involved its bytes are copied once more.

use std::any::Any;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::TransportError;
use crate::mem::SharedMem;

/// Size of the smallest pieces; each class has pieces twice as long as the class before.
const SMALLEST: usize = 4 * 1024;
/// Up to 16 MiB, the longest transfer.
const CLASSES: usize = 13;
/// Memory that is registered at once, for pieces that are not longer.
const SLAB: usize = 1 << 20;
/// Free bytes in pieces of more than [`SLAB`] that a pool keeps; the rest is given back to the system.
const KEPT: usize = 64 << 20;

/// What makes a slab known to an adapter.
#[cfg_attr(not(feature = "verbs"), allow(dead_code))]
pub(crate) struct Registration {
    /// Tells adapters' protection domains apart.
    pub(crate) domain: usize,
    /// The adapter's key for the slab.
    pub(crate) lkey: u32,
    /// Ends the registration when dropped.
    pub(crate) _keep: Box<dyn Any + Send + Sync>,
}

/// Registers a slab with an adapter.
pub(crate) type Register = Box<dyn Fn(&Arc<SharedMem>) -> Result<Registration, TransportError> + Send + Sync>;

#[cfg_attr(not(feature = "verbs"), allow(dead_code))]
struct Slab {
    /// Before the memory, which the adapter must have let go of.
    registration: Option<Registration>,
    mem: SlabMem,
}

/// Keeps the memory mapped; the registration may hold it, too.
type SlabMem = Arc<SharedMem>;

/// The memory of the buffers of one endpoint.
pub(crate) struct BufferPool {
    register: Option<Register>,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    classes: [Vec<(Arc<Slab>, usize)>; CLASSES],
    /// Bytes in free pieces of more than [`SLAB`].
    large: usize,
}

fn class_of(len: usize) -> usize {
    let units = len.div_ceil(SMALLEST).max(1).next_power_of_two();
    units.trailing_zeros() as usize
}

impl BufferPool {
    pub(crate) fn new(register: Option<Register>) -> Arc<Self> {
        Arc::new(Self {
            register,
            free: Mutex::default(),
        })
    }

    /// A buffer of `len` bytes with whatever contents.
    pub(crate) fn take(self: &Arc<Self>, len: usize) -> Result<Buffer, TransportError> {
        let class = class_of(len);
        if class >= CLASSES {
            return Err(TransportError::Invalid(format!("a buffer of {len} bytes")));
        }
        let size = SMALLEST << class;
        let mut free = self.free.lock();
        if free.classes[class].is_empty() {
            // Not under the lock: the system may take its time to register memory.
            drop(free);
            let slab = self.slab(size.max(SLAB))?;
            free = self.free.lock();
            for n in (0..SLAB.max(size) / size).rev() {
                free.classes[class].push((Arc::clone(&slab), n * size));
            }
        } else if size > SLAB {
            free.large -= size;
        }
        let (slab, off) = free.classes[class].pop().ok_or(TransportError::Shutdown)?;
        drop(free);
        Ok(Buffer {
            piece: Arc::new(Piece {
                at: slab.mem.pointer(off, size)?,
                size,
                home: Home::Pool(Arc::clone(self), slab, off),
            }),
            off: 0,
            len,
        })
    }

    fn slab(&self, len: usize) -> Result<Arc<Slab>, TransportError> {
        let mem = Arc::new(SharedMem::anonymous(len)?);
        let registration = self.register.as_ref().map(|r| r(&mem)).transpose()?;
        Ok(Arc::new(Slab { registration, mem }))
    }

    fn give_back(&self, slab: Arc<Slab>, off: usize, size: usize) {
        let mut free = self.free.lock();
        if size > SLAB {
            if free.large + size > KEPT {
                drop(free);
                return drop(slab);
            }
            free.large += size;
        }
        free.classes[class_of(size)].push((slab, off));
    }
}

enum Home {
    Heap,
    Pool(Arc<BufferPool>, Arc<Slab>, usize),
}

/// Memory that buffers lie in, each in a part of its own.
struct Piece {
    at: NonNull<u8>,
    size: usize,
    home: Home,
}

// SAFETY: the memory belongs to the piece alone; it is accessed only through buffers, each of which has a part
// of it to itself.
unsafe impl Send for Piece {}
// SAFETY: as above: sharing a piece gives no access to its memory.
unsafe impl Sync for Piece {}

impl Drop for Piece {
    fn drop(&mut self) {
        match std::mem::replace(&mut self.home, Home::Heap) {
            Home::Pool(pool, slab, off) => pool.give_back(slab, off, self.size),
            Home::Heap => {
                let slice = std::ptr::slice_from_raw_parts_mut(self.at.as_ptr(), self.size);
                // SAFETY: `From<Vec>` made it of a box of this length, and no buffer is left that uses it.
                drop(unsafe { Box::from_raw(slice) });
            }
        }
    }
}

/// Bytes with one owner, which moves into an operation and back out of its completion.
///
/// It can be cut in parts that go to different operations, and the parts be joined again: what several peers send
/// ends up side by side. New buffers of a pool have whatever contents.
pub struct Buffer {
    piece: Arc<Piece>,
    off: usize,
    len: usize,
}

impl Buffer {
    /// Takes the bytes from `at` on out of this buffer, as a buffer of their own. Nothing is copied.
    #[must_use]
    pub fn split_off(&mut self, at: usize) -> Self {
        let at = at.min(self.len);
        let tail = Self {
            piece: Arc::clone(&self.piece),
            off: self.off + at,
            len: self.len - at,
        };
        self.len = at;
        tail
    }

    /// Appends a buffer that was taken out of the same one right behind this. Nothing is copied.
    ///
    /// # Errors
    /// The other one, if it was not.
    pub fn join(&mut self, next: Self) -> Result<(), Self> {
        if !Arc::ptr_eq(&self.piece, &next.piece) || self.off + self.len != next.off {
            return Err(next);
        }
        self.len += next.len;
        Ok(())
    }

    /// Forgets the bytes from `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Where it is for an adapter of this protection domain, and the adapter's key; None if it is not registered there.
    #[cfg(feature = "verbs")]
    pub(crate) fn registered(&self, domain: usize) -> Option<(u64, u32)> {
        let Home::Pool(_, slab, off) = &self.piece.home else {
            return None;
        };
        let registration = slab.registration.as_ref().filter(|r| r.domain == domain)?;
        Some((slab.mem.address() + (off + self.off) as u64, registration.lkey))
    }

    fn start(&self) -> *mut u8 {
        // SAFETY: `off` is at most the length of the piece.
        unsafe { self.piece.at.as_ptr().add(self.off) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: in bounds of the piece, which lives as long as this; initialized (files and boxes are); no other
        // buffer has this part, and adapters use it only while an operation owns the buffer.
        unsafe { std::slice::from_raw_parts(self.start(), self.len) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; the borrow of `self` is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.len) }
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        let bytes = bytes.into_boxed_slice();
        let len = bytes.len();
        let at = NonNull::from(Box::leak(bytes)).cast::<u8>();
        let piece = Piece {
            at,
            size: len,
            home: Home::Heap,
        };
        Self {
            piece: Arc::new(piece),
            off: 0,
            len,
        }
    }
}

/// A copy outside of any pool.
impl Clone for Buffer {
    fn clone(&self) -> Self {
        Self::from(self.to_vec())
    }
}

impl PartialEq for Buffer {
    fn eq(&self, other: &Self) -> bool {
        self[..] == other[..]
    }
}

impl Eq for Buffer {}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_apart_and_can_be_joined_again() {
        let pool = BufferPool::new(None);
        for mut whole in [pool.take(5000).unwrap(), Buffer::from(vec![0; 5000])] {
            whole.fill(1);
            let mut tail = whole.split_off(4000);
            let mut middle = whole.split_off(3000);
            tail.fill(3);
            middle.fill(2);
            assert_eq!((whole.len(), middle.len(), tail.len()), (3000, 1000, 1000));
            let tail = whole.join(tail).unwrap_err();
            middle.join(tail).unwrap();
            whole.join(middle).unwrap();
            assert!(whole[..3000].iter().all(|b| *b == 1) && whole[3000..4000].iter().all(|b| *b == 2));
            assert!(whole[4000..].iter().all(|b| *b == 3) && whole.len() == 5000);
            assert!(whole.join(Buffer::from(Vec::new())).is_err(), "of another piece");
            assert_eq!(whole.split_off(9000).len(), 0);
            whole.truncate(10);
            assert_eq!(whole, Buffer::from(vec![1; 10]));
        }
    }

    #[test]
    fn memory_is_used_again_and_what_is_kept_is_bounded() {
        let pool = BufferPool::new(None);
        let first = pool.take(1).unwrap().start();
        assert_eq!(pool.take(4096).unwrap().start(), first, "used again");
        let held: Vec<Buffer> = (0..300).map(|_| pool.take(4096).unwrap()).collect();
        let mut places: Vec<_> = held.iter().map(Buffer::start).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 300);
        drop(held);
        let large: Vec<Buffer> = (0..6).map(|_| pool.take(16 << 20).unwrap()).collect();
        drop(large);
        assert_eq!(pool.free.lock().large, KEPT);
        assert!(pool.take((16 << 20) + 1).is_err());
    }

    #[test]
    fn each_slab_is_registered_once_and_until_it_goes() {
        let alive = Arc::new(());
        let token = Arc::clone(&alive);
        let pool = BufferPool::new(Some(Box::new(move |_| {
            Ok(Registration {
                domain: 7,
                lkey: 9,
                _keep: Box::new(Arc::clone(&token)),
            })
        })));
        let (a, b) = (pool.take(4096).unwrap(), pool.take(100).unwrap());
        assert_eq!(Arc::strong_count(&alive), 3);
        #[cfg(feature = "verbs")]
        {
            assert_eq!(a.registered(7).map(|r| r.1), Some(9));
            assert_eq!(a.registered(8), None);
            assert_eq!(Buffer::from(vec![1]).registered(7), None);
        }
        drop((a, b));
        drop(pool);
        assert_eq!(Arc::strong_count(&alive), 1);
    }
}
