//! Ranges of a file that an operation is at work on, while the state of its inode is not locked. Pure.
//!
//! An operation claims the range that it reads or changes, plans under the mutex of the state, lets that go for as long as servers
//! take to answer, and looks again. Claims of reads lie beside each other; a claim for a change has its range to itself, so that
//! neither the data of the range nor the frames it lies in change under who has claimed it. Claims are given in the order in which they were asked
//! for: a reader that comes while a writer waits goes behind it.

/// The bytes `from .. to` of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// The first.
    pub from: u64,
    /// The one behind the last.
    pub to: u64,
}

impl Span {
    /// The whole file.
    pub const ALL: Self = Self {
        from: 0,
        to: u64::MAX,
    };

    fn meets(self, other: Self) -> bool {
        self.from < other.to && other.from < self.to
    }
}

/// What a range is claimed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Reading what is stored.
    Read,
    /// Changing data, or where it is stored.
    Change,
}

#[derive(Debug, Clone, Copy)]
struct Claim {
    number: u64,
    span: Span,
    purpose: Purpose,
}

impl Claim {
    fn excludes(&self, span: Span, purpose: Purpose) -> bool {
        (self.purpose == Purpose::Change || purpose == Purpose::Change) && self.span.meets(span)
    }
}

/// The claims on one file, given and waiting, in the order they came in.
#[derive(Debug, Default)]
pub struct Claims {
    next: u64,
    list: Vec<Claim>,
}

impl Claims {
    /// Asks for a range. Returns the number of the claim.
    pub fn ask(&mut self, span: Span, purpose: Purpose) -> u64 {
        let number = self.next;
        self.next += 1;
        self.list.push(Claim {
            number,
            span,
            purpose,
        });
        number
    }

    /// Would a claim be given at once?
    #[must_use]
    pub fn is_free(&self, span: Span, purpose: Purpose) -> bool {
        !self.list.iter().any(|c| c.excludes(span, purpose))
    }

    /// Is a claim given? It is when none that excludes it came before.
    #[must_use]
    pub fn is_given(&self, number: u64) -> bool {
        let Some(place) = self.list.iter().position(|c| c.number == number) else {
            return false;
        };
        let own = self.list[place];
        !self.list[..place]
            .iter()
            .any(|c| c.excludes(own.span, own.purpose))
    }

    /// Is it a claim for a change of all of the file?
    #[must_use]
    pub fn covers_all(&self, number: u64) -> bool {
        let own = self.list.iter().find(|c| c.number == number);
        own.is_some_and(|c| c.span == Span::ALL && c.purpose == Purpose::Change)
    }

    /// Ends a claim, given or not. True: somebody may have waited for that.
    pub fn end(&mut self, number: u64) -> bool {
        self.list.retain(|c| c.number != number);
        !self.list.is_empty()
    }

    /// Are there none?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(from: u64, to: u64) -> Span {
        Span { from, to }
    }

    #[test]
    fn reads_lie_beside_each_other_and_changes_alone() {
        let mut claims = Claims::default();
        let a = claims.ask(span(0, 10), Purpose::Read);
        let b = claims.ask(span(5, 15), Purpose::Read);
        assert!(claims.is_given(a) && claims.is_given(b));
        let change = claims.ask(span(8, 9), Purpose::Change);
        let aside = claims.ask(span(20, 30), Purpose::Change);
        assert!(!claims.is_given(change) && claims.is_given(aside));
        claims.end(a);
        assert!(!claims.is_given(change));
        claims.end(b);
        assert!(claims.is_given(change));
    }

    #[test]
    fn who_waits_is_not_overtaken() {
        let mut claims = Claims::default();
        let first = claims.ask(span(0, 10), Purpose::Read);
        let change = claims.ask(Span::ALL, Purpose::Change);
        let late = claims.ask(span(0, 10), Purpose::Read);
        assert!(!claims.is_free(span(0, 10), Purpose::Read));
        assert!(claims.is_given(first) && !claims.is_given(late));
        // One that gives up does not stay in the way.
        claims.end(change);
        assert!(claims.is_given(late));
        assert!(claims.end(first) && !claims.end(late) && claims.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn what_is_given_never_excludes_what_is_given(
            asks in proptest::collection::vec((0u64..40, 1u64..20, proptest::bool::ANY, proptest::bool::ANY), 1..40)
        ) {
            let mut claims = Claims::default();
            let mut open: Vec<(u64, Span, Purpose)> = Vec::new();
            for (from, len, change, end) in asks {
                if end && !open.is_empty() {
                    let (number, ..) = open.remove(from as usize % open.len());
                    claims.end(number);
                } else {
                    let purpose = if change { Purpose::Change } else { Purpose::Read };
                    let free = claims.is_free(span(from, from + len), purpose);
                    let number = claims.ask(span(from, from + len), purpose);
                    proptest::prop_assert_eq!(free, claims.is_given(number));
                    open.push((number, span(from, from + len), purpose));
                }
                let given: Vec<_> = open.iter().filter(|(n, ..)| claims.is_given(*n)).collect();
                proptest::prop_assert_eq!(given.is_empty(), open.is_empty());
                for (i, a) in given.iter().enumerate() {
                    for b in &given[i + 1..] {
                        let aside = a.1.to <= b.1.from || b.1.to <= a.1.from;
                        proptest::prop_assert!(aside || (a.2 == Purpose::Read && b.2 == Purpose::Read));
                    }
                }
            }
        }
    }
}
