//! The buffer cache of one file: pages of 4 KiB that are valid while the lease's version holds. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// A cached page.
#[derive(Debug, Clone)]
pub struct Page {
    /// Its contents; bytes beyond the end of the file are zero. Shared with a transfer that is under way.
    pub data: Arc<[u8]>,
    /// Not yet on the storage node.
    pub dirty: bool,
}

/// The pages of one file.
#[derive(Debug, Default)]
pub struct Pages {
    map: BTreeMap<u64, Page>,
    dirty: usize,
}

/// Index of the page that holds a byte.
#[must_use]
pub fn page_of(offset: u64) -> u64 {
    offset / PAGE
}

/// A page that begins with these bytes, and has zeros behind them.
#[must_use]
pub fn page_from(bytes: &[u8]) -> Arc<[u8]> {
    if bytes.len() == PAGE as usize {
        return bytes.into();
    }
    let mut page = vec![0; PAGE as usize];
    page[..bytes.len()].copy_from_slice(bytes);
    page.into()
}

impl Pages {
    /// Number of pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// No pages at all?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Number of dirty pages.
    #[must_use]
    pub fn dirty(&self) -> usize {
        self.dirty
    }

    /// The page of that index, if it is cached.
    #[must_use]
    pub fn get(&self, index: u64) -> Option<&Page> {
        self.map.get(&index)
    }

    /// Are all pages `first ..= last` there?
    #[must_use]
    pub fn covers(&self, first: u64, last: u64) -> bool {
        self.map.range(first..=last).count() as u64 == last - first + 1
    }

    /// Puts a page in; a dirty one is not replaced by a clean one.
    pub fn insert(&mut self, index: u64, data: Arc<[u8]>, dirty: bool) {
        match self.map.entry(index) {
            std::collections::btree_map::Entry::Vacant(v) => {
                v.insert(Page { data, dirty });
                self.dirty += usize::from(dirty);
            }
            std::collections::btree_map::Entry::Occupied(mut o) => {
                if dirty || !o.get().dirty {
                    self.dirty += usize::from(dirty && !o.get().dirty);
                    *o.get_mut() = Page { data, dirty };
                }
            }
        }
    }

    /// Changes bytes within one page that is there, and makes it dirty. False if it is not there.
    pub fn patch(&mut self, index: u64, at: usize, bytes: &[u8]) -> bool {
        let Some(page) = self.map.get_mut(&index) else {
            return false;
        };
        Arc::make_mut(&mut page.data)[at..at + bytes.len()].copy_from_slice(bytes);
        self.dirty += usize::from(!page.dirty);
        page.dirty = true;
        true
    }

    /// Copies what the cache has of `offset ..` over `out`.
    pub fn overlay(&self, offset: u64, out: &mut [u8]) {
        if out.is_empty() {
            return;
        }
        let end = offset + out.len() as u64;
        for (&index, page) in self.map.range(page_of(offset)..=page_of(end - 1)) {
            let start = index * PAGE;
            let from = offset.max(start);
            let to = end.min(start + PAGE);
            out[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page.data[(from - start) as usize..(to - start) as usize]);
        }
    }

    /// The dirty pages in order.
    pub fn dirty_pages(&self) -> impl Iterator<Item = (u64, &Page)> {
        self.map.iter().filter(|(_, p)| p.dirty).map(|(&i, p)| (i, p))
    }

    /// The dirty pages `first ..= last`.
    pub fn dirty_in(&self, first: u64, last: u64) -> impl Iterator<Item = u64> {
        self.map
            .range(first..=last)
            .filter(|(_, p)| p.dirty)
            .map(|(&i, _)| i)
    }

    /// All pages are on the storage nodes.
    pub fn mark_clean(&mut self) {
        if self.dirty > 0 {
            for page in self.map.values_mut() {
                page.dirty = false;
            }
            self.dirty = 0;
        }
    }

    /// Drops the pages `first ..= last`, dirty or not.
    pub fn remove(&mut self, first: u64, last: u64) {
        if first > last {
            return;
        }
        let gone: Vec<u64> = self.map.range(first..=last).map(|(&i, _)| i).collect();
        for index in gone {
            if let Some(page) = self.map.remove(&index) {
                self.dirty -= usize::from(page.dirty);
            }
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.map = BTreeMap::new();
        self.dirty = 0;
    }

    /// Drops the clean pages.
    pub fn drop_clean(&mut self) {
        self.map.retain(|_, p| p.dirty);
        if self.map.is_empty() {
            // An empty tree keeps a node, in each of a hundred thousand inodes.
            self.map = BTreeMap::new();
        }
    }

    /// Zeroes `from .. to` in the pages that are there.
    pub fn zero(&mut self, from: u64, to: u64) {
        if from >= to {
            return;
        }
        for (&index, page) in self.map.range_mut(page_of(from)..=page_of(to - 1)) {
            let start = index * PAGE;
            let a = from.max(start) - start;
            let b = to.min(start + PAGE) - start;
            Arc::make_mut(&mut page.data)[a as usize..b as usize].fill(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Arc<[u8]> {
        vec![byte; PAGE as usize].into()
    }

    #[test]
    fn clean_never_replaces_dirty() {
        let mut p = Pages::default();
        p.insert(3, page(1), true);
        p.insert(3, page(2), false);
        assert_eq!(p.get(3).map(|x| x.data[0]), Some(1));
        assert_eq!((p.len(), p.dirty()), (1, 1));
        p.mark_clean();
        p.insert(3, page(2), false);
        assert_eq!((p.get(3).map(|x| x.data[0]), p.dirty()), (Some(2), 0));
    }

    proptest::proptest! {
        #[test]
        fn agrees_with_a_flat_file(ops in proptest::collection::vec((0u64..40_000, 1usize..9000, 0u8..4), 1..40)) {
            let mut flat = vec![0u8; 65_536];
            let mut p = Pages::default();
            for i in 0..16 { p.insert(i, page(0), false); }
            for (n, (offset, len, kind)) in ops.into_iter().enumerate() {
                let end = offset + len as u64;
                match kind {
                    0 => {
                        p.zero(offset, end);
                        flat[offset as usize..end as usize].fill(0);
                    }
                    1 => {
                        let mut out = vec![9u8; len];
                        p.overlay(offset, &mut out);
                        proptest::prop_assert_eq!(&out[..], &flat[offset as usize..end as usize]);
                    }
                    _ => {
                        let byte = n as u8 + 1;
                        let mut at = offset;
                        while at < end {
                            let stop = end.min((page_of(at) + 1) * PAGE);
                            let bytes = vec![byte; (stop - at) as usize];
                            proptest::prop_assert!(p.patch(page_of(at), (at % PAGE) as usize, &bytes));
                            at = stop;
                        }
                        flat[offset as usize..end as usize].fill(byte);
                    }
                }
                proptest::prop_assert_eq!(p.dirty(), p.dirty_pages().count());
            }
        }
    }
}
