//! Whether to look for a while for what is about to come, before sleeping for it.

/// Looking in vain so often is tried before there is an end of it.
const CREDIT: i32 = 16;
/// One time in so many it is tried all the same.
const SELDOM: u32 = 32;

/// Looking has to pay more often than not. The kernel's tasks go by the same rule (`kmod/ring.c`).
#[derive(Debug)]
pub struct Pace {
    credit: i32,
    skipped: u32,
}

impl Default for Pace {
    fn default() -> Pace {
        Pace {
            credit: CREDIT,
            skipped: 0,
        }
    }
}

impl Pace {
    /// Whether to look.
    pub fn is_worth_looking(&mut self) -> bool {
        if self.credit > 0 {
            return true;
        }
        self.skipped = self.skipped.wrapping_add(1);
        self.skipped.is_multiple_of(SELDOM)
    }

    /// It was slept instead, and no longer than would have been looked.
    pub fn slept_shortly(&mut self) {
        self.looked(true);
    }

    /// How it went.
    pub fn looked(&mut self, found: bool) {
        let credit = self.credit + if found { 1 } else { -1 };
        self.credit = credit.clamp(-CREDIT, CREDIT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looks(pace: &mut Pace, times: u32, found: bool) -> u32 {
        (0..times)
            .filter(|_| {
                let looks = pace.is_worth_looking();
                if looks {
                    pace.looked(found);
                }
                looks
            })
            .count() as u32
    }

    #[test]
    fn what_is_in_vain_ends_and_what_pays_comes_back() {
        let mut pace = Pace::default();
        assert_eq!(looks(&mut pace, 16, false), 16);
        assert_eq!(looks(&mut pace, 10 * SELDOM, false), 10);
        // In debt now: it has to pay as often, seldom as it is tried, before it is the rule again.
        assert_eq!(looks(&mut pace, 11 * SELDOM, true), 11);
        assert_eq!(looks(&mut pace, 100, true), 100);
    }

    #[test]
    fn short_sleeps_say_that_it_would_pay() {
        let mut pace = Pace::default();
        looks(&mut pace, 100 * SELDOM, false);
        assert!(!pace.is_worth_looking());
        for _ in 0..=CREDIT {
            pace.slept_shortly();
        }
        assert!(pace.is_worth_looking());
    }
}
