//! Types that contain themselves, decoded one level deep.

use std::cell::Cell;

use serde::de::Error;
use serde::{Deserialize, Deserializer};

thread_local! {
    /// This thread decodes what [`flat`] was asked for.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Decodes a value, but refuses one in which this is called again: such values could be nested as deep as a message is long, and decoding
/// them would use up the stack.
pub(super) fn flat<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    if INSIDE.replace(true) {
        return Err(D::Error::custom("a message within a message of its kind"));
    }
    let value = T::deserialize(from);
    INSIDE.set(false);
    value
}
