//! A program that goes through a directory, and what it is likely to want next. Pure.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included};
use std::sync::Arc;

use fsd_proto::wire::Kind;

/// A listing by cookie: name, inode, type.
pub type Listing = Arc<BTreeMap<u64, (Vec<u8>, u64, Kind)>>;

/// Longest listing that is kept for this.
const LONGEST: usize = 1 << 16;
/// So many names in order make it likely that the next ones follow.
const CONVINCING: u32 = 2;
/// Names between two in order that a program may leave out.
const LEFT_OUT: usize = 2;
/// Fewest and most inodes that are told at once.
const WIDTH: (usize, usize) = (8, 32);

/// What is done to one name after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// It is looked up.
    Looked,
    /// It is removed, or the file gets another.
    Removed,
}

/// One program's way through the names.
#[derive(Debug, Default)]
struct Run {
    /// Cookie of the last name.
    last: u64,
    /// Names in order so far.
    length: u32,
    /// Cookie up to which inodes were told.
    told: u64,
    /// How many are told next.
    width: usize,
}

/// Ways through the names of a directory, in the order of the last listing. That may be old: what follows from it are guesses.
#[derive(Debug, Default)]
pub struct Follow {
    order: Option<Listing>,
    looked: Run,
    removed: Run,
    /// The program goes through one directory after the other: it needs no more than one name to convince.
    foreseen: bool,
}

impl Follow {
    /// A program that goes through one directory after the other has come to this one.
    pub fn foreseen(&mut self) {
        self.foreseen = true;
    }

    /// The directory was listed, perhaps in the middle of somebody's way.
    pub fn listed(&mut self, listing: &Listing) {
        let length = u32::from(self.foreseen);
        let first = self.order.is_none();
        self.order = (listing.len() <= LONGEST).then(|| Arc::clone(listing));
        for run in [&mut self.looked, &mut self.removed] {
            let last = run.last;
            *run = Run {
                length,
                ..Run::default()
            };
            if let Some(order) = self.order.as_ref().filter(|_| first && last > 0) {
                // Where it is convincing it will be after the next one as well.
                run.step(order, last);
            }
        }
    }

    /// Before something is done to the name of a cookie: would it be worth knowing the order of the names? Two in order have come then.
    #[must_use]
    pub fn lacks_order(&self, deed: Deed, cookie: u64) -> bool {
        let last = self.run(deed).last;
        self.order.is_none() && last > 0 && cookie > last
    }

    const fn run(&self, deed: Deed) -> &Run {
        match deed {
            Deed::Looked => &self.looked,
            Deed::Removed => &self.removed,
        }
    }

    /// Something was done to the name of a cookie: inodes that it is likely to be done to next, and that were not told yet.
    pub fn done(&mut self, deed: Deed, cookie: u64) -> Vec<u64> {
        let run = match deed {
            Deed::Looked => &mut self.looked,
            Deed::Removed => &mut self.removed,
        };
        match &self.order {
            Some(order) => run.done(order, cookie),
            None => {
                run.last = cookie;
                Vec::new()
            }
        }
    }
}

impl Run {
    /// A name has come; does it follow the last one?
    fn step(&mut self, order: &Listing, cookie: u64) -> bool {
        let follows =
            cookie > self.last && order.range(self.last + 1..cookie).take(LEFT_OUT + 1).count() <= LEFT_OUT;
        self.last = cookie;
        if follows {
            self.length += 1;
            self.told = self.told.max(cookie);
        } else {
            (self.length, self.width) = (0, 0);
            self.told = cookie;
        }
        follows
    }

    fn done(&mut self, order: &Listing, cookie: u64) -> Vec<u64> {
        // Once more, or the same operation on another thread.
        if cookie == self.last || !self.step(order, cookie) {
            return Vec::new();
        }
        let left = order.range((Excluded(cookie), Included(self.told)));
        let left = left.take(WIDTH.1).count();
        if self.length < CONVINCING || left > self.width / 2 {
            return Vec::new();
        }
        self.width = (self.width * 2).clamp(WIDTH.0, WIDTH.1);
        let next: Vec<(u64, u64)> = order
            .range(self.told + 1..)
            .take(self.width - left)
            .map(|(&cookie, &(_, ino, _))| (cookie, ino))
            .collect();
        if let Some(&(last, _)) = next.last() {
            self.told = last;
        }
        next.into_iter().map(|(_, ino)| ino).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names 1 to `last`; the inode of each is a hundred times its cookie.
    fn listed(last: u64) -> Follow {
        let names = (1..=last).map(|n| (n, (n.to_string().into_bytes(), n * 100, Kind::File)));
        let mut follow = Follow::default();
        follow.listed(&Arc::new(names.collect()));
        follow
    }

    #[test]
    fn who_goes_through_all_is_told_of_each_once_and_in_time() {
        let mut follow = listed(300);
        let mut told = Vec::new();
        for n in 1..=300 {
            assert!(n <= 2 || told.contains(&(n * 100)), "{n}");
            let next = follow.done(Deed::Looked, n);
            assert!(next.len() <= WIDTH.1 && next.iter().all(|ino| *ino > n * 100));
            assert!(follow.done(Deed::Looked, n).is_empty(), "the same again");
            told.extend(next);
        }
        assert_eq!(told, (3..=300).map(|n| n * 100).collect::<Vec<_>>());
    }

    #[test]
    fn a_directory_may_be_listed_on_the_way() {
        let listing = listed(40).order.unwrap();
        let mut follow = Follow::default();
        assert!(follow.done(Deed::Looked, 1).is_empty());
        follow.listed(&listing);
        assert_eq!(follow.done(Deed::Looked, 2).len(), WIDTH.0);
        // Of one that is come to on the way through others the first name is enough.
        let mut follow = Follow::default();
        follow.foreseen();
        follow.listed(&listing);
        assert_eq!(follow.done(Deed::Looked, 1).len(), WIDTH.0);
        let mut follow = Follow::default();
        follow.foreseen();
        follow.listed(&listing);
        assert!(follow.done(Deed::Looked, 20).is_empty());
    }

    #[test]
    fn who_picks_names_or_goes_backwards_is_told_of_none() {
        let mut follow = listed(300);
        for n in (1..300).step_by(4).chain((1..=300).rev()) {
            assert_eq!(follow.done(Deed::Looked, n), Vec::<u64>::new(), "{n}");
        }
        // One and another, as by a shell that completes names.
        assert_eq!(follow.done(Deed::Looked, 40), Vec::<u64>::new());
        assert_eq!(follow.done(Deed::Removed, 41), Vec::<u64>::new());
    }

    #[test]
    fn a_few_may_be_left_out() {
        let mut follow = listed(60);
        let told: Vec<u64> = (1..=60)
            .step_by(3)
            .flat_map(|n| follow.done(Deed::Removed, n))
            .collect();
        assert!(told.contains(&1000) && told.contains(&6000));
        assert!(Follow::default().done(Deed::Removed, 7).is_empty());
    }
}
