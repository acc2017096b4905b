//! Parts that few inodes need, made at the first use. A mount knows a hundred thousand inodes and more.

use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;

/// A value that begins as its default, and takes the room of a pointer until somebody looks at it.
#[derive(Debug)]
pub struct Lazy<T>(OnceLock<Box<T>>);

impl<T> Default for Lazy<T> {
    fn default() -> Self {
        Self(OnceLock::new())
    }
}

impl<T> Lazy<T> {
    /// What there is, if anybody has looked at it before.
    #[must_use]
    pub fn get(&self) -> Option<&T> {
        self.0.get().map(|made| &**made)
    }

    /// What there is.
    #[must_use]
    pub fn into_made(self) -> Option<Box<T>> {
        self.0.into_inner()
    }
}

impl<T: Default> Deref for Lazy<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.get_or_init(Box::default)
    }
}

impl<T: Default> DerefMut for Lazy<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.get_or_init(Box::default);
        match self.0.get_mut() {
            Some(made) => made,
            None => unreachable!("made above"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_made_before_it_is_used() {
        let mut lazy: Lazy<Vec<u8>> = Lazy::default();
        assert!(lazy.get().is_none());
        assert!(lazy.is_empty());
        lazy.push(1);
        assert_eq!(lazy.get(), Some(&vec![1]));
        assert_eq!(size_of::<Lazy<[u64; 100]>>(), 16);
    }
}
