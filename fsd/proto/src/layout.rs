//! Constants that all roles must agree on.

/// Bytes of a file block: the unit of striping and the largest frame.
pub const BLOCK: u64 = 256 << 10;

/// Frame sizes, bytes.
pub const CLASSES: [u32; 4] = [4 << 10, 16 << 10, 64 << 10, 256 << 10];

/// Slabs kept out of reservations for fragmentation (one a class).
pub const HEADROOM_SLABS: u64 = CLASSES.len() as u64;

/// First cookie of a directory's entries: those of `.` and `..` come before.
pub const FIRST_COOKIE: u64 = 3;

/// Bytes of the longest name.
pub const NAME_MAX: usize = 255;

/// Can this be a name in a directory?
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

/// The smallest class that holds `bytes`, if any.
#[must_use]
pub fn class_for(bytes: u32) -> Option<usize> {
    CLASSES.iter().position(|&c| c >= bytes)
}
