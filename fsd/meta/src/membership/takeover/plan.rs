//! What is to be done next about the dead. Pure: what happens comes in, what is to be done goes out, and everything that is done may
//! be done twice, so a server that is started again begins at the beginning.

use std::collections::BTreeSet;

use fsd_proto::wire::View;

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Need {
    /// These storage nodes are to shut the dead out.
    Fence(Vec<u16>),
    /// These mounts are still to say that nothing of earlier epochs is under way any more.
    Answers(Vec<u16>),
    /// The transactions that a crash of this server's host has undone are to be there first.
    Window,
    /// Nobody is alive: everything is cleared.
    Reset,
    /// What the dead had written beyond the ends of files is to be cut off.
    Cut,
    /// These storage nodes are to take the lease records of the dead back.
    Free(Vec<u16>),
    /// Files without a name that only the dead had open are to be removed.
    Reap,
    /// Nothing is left of the dead: they are forgotten, and the mounts that wait may go on.
    Forget,
}

/// The recovery of what the dead of one view had.
#[derive(Debug)]
pub struct Plan {
    view: View,
    storage: BTreeSet<u16>,
    fenced: BTreeSet<u16>,
    answered: BTreeSet<u16>,
    reset: bool,
    cut: bool,
    freed: BTreeSet<u16>,
    reaped: bool,
}

impl Plan {
    /// For the dead of a view, in a cluster with these storage nodes.
    pub fn new(view: View, storage: impl IntoIterator<Item = u16>) -> Self {
        Self {
            view,
            storage: storage.into_iter().collect(),
            fenced: BTreeSet::new(),
            answered: BTreeSet::new(),
            reset: false,
            cut: false,
            freed: BTreeSet::new(),
            reaped: false,
        }
    }

    /// Others have died meanwhile: everything is done for all of them together, from the beginning, for the new dead may have been
    /// asked to hand something over by those before, or be named in what was looked at.
    pub fn declared(&mut self, view: &View) {
        if self.view.epoch != view.epoch {
            *self = Self::new(view.clone(), std::mem::take(&mut self.storage));
        }
    }

    fn lacks(&self, done: &BTreeSet<u16>) -> Vec<u16> {
        self.storage.difference(done).copied().collect()
    }

    /// Are the dead shut out everywhere?
    pub fn is_fenced(&self) -> bool {
        self.lacks(&self.fenced).is_empty()
    }

    /// What is to be done now, while these mounts live; `window`: transactions may be missing.
    pub fn need(&self, alive: &BTreeSet<u16>, window: bool) -> Need {
        if !self.is_fenced() {
            return Need::Fence(self.lacks(&self.fenced));
        }
        let silent: Vec<u16> = alive.difference(&self.answered).copied().collect();
        if !silent.is_empty() {
            return Need::Answers(silent);
        }
        if window {
            return Need::Window;
        }
        if alive.is_empty() && !self.reset {
            return Need::Reset;
        }
        if self.reset {
            return Need::Forget;
        }
        if !self.cut {
            return Need::Cut;
        }
        match self.lacks(&self.freed) {
            left if !left.is_empty() => Need::Free(left),
            _ if !self.reaped => Need::Reap,
            _ => Need::Forget,
        }
    }

    /// A storage node has shut out the dead of an epoch.
    pub fn fenced(&mut self, epoch: u64, node: u16) {
        if epoch == self.view.epoch {
            self.fenced.insert(node);
        }
    }

    /// A mount has got to an epoch.
    pub fn answered(&mut self, epoch: u64, mount: u16) {
        if epoch == self.view.epoch {
            self.answered.insert(mount);
        }
    }

    /// A storage node has taken back what the dead of an epoch had.
    pub fn freed(&mut self, epoch: u64, node: u16) {
        if epoch == self.view.epoch {
            self.freed.insert(node);
        }
    }

    /// One of the other things has been done for the dead of an epoch.
    pub fn done(&mut self, epoch: u64, what: &Need) {
        if epoch != self.view.epoch {
            return;
        }
        match what {
            Need::Reset => self.reset = true,
            Need::Cut => self.cut = true,
            Need::Reap => self.reaped = true,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fsd_proto::wire::DeadMount;

    fn view(epoch: u64, dead: &[u16]) -> View {
        let dead = dead.iter().map(|&node| DeadMount {
            node,
            incarnation: 1,
            life: u64::from(node) + 100,
        });
        View {
            epoch,
            dead: dead.collect(),
        }
    }

    fn alive(nodes: &[u16]) -> BTreeSet<u16> {
        nodes.iter().copied().collect()
    }

    /// Does what is needed, in one of the ways in which it can come about; what was done.
    fn follow(plan: &mut Plan, epoch: u64, nodes: &BTreeSet<u16>, until: Option<usize>) -> Vec<Need> {
        let mut done = Vec::new();
        while until.is_none_or(|steps| done.len() < steps) {
            let need = plan.need(nodes, false);
            match &need {
                Need::Fence(left) => plan.fenced(epoch, left[0]),
                Need::Answers(left) => plan.answered(epoch, left[0]),
                Need::Free(left) => plan.freed(epoch, left[0]),
                Need::Forget => {
                    done.push(need);
                    return done;
                }
                other => plan.done(epoch, other),
            }
            done.push(need);
        }
        done
    }

    #[test]
    fn records_are_freed_behind_the_fence_and_the_answers_and_the_cut() {
        let mut plan = Plan::new(view(1, &[2]), [0, 1]);
        let done = follow(&mut plan, 1, &alive(&[0, 1]), None);
        assert_eq!(
            done,
            [
                Need::Fence(vec![0, 1]),
                Need::Fence(vec![1]),
                Need::Answers(vec![0, 1]),
                Need::Answers(vec![1]),
                Need::Cut,
                Need::Free(vec![0, 1]),
                Need::Free(vec![1]),
                Need::Reap,
                Need::Forget,
            ]
        );
    }

    #[test]
    fn a_storage_node_that_is_away_is_waited_for() {
        let mut plan = Plan::new(view(1, &[2]), [0, 1]);
        plan.fenced(1, 1);
        plan.answered(1, 0);
        assert_eq!(plan.need(&alive(&[0]), false), Need::Fence(vec![0]));
        assert!(!plan.is_fenced());
    }

    /// Whenever another one dies, it begins again with both, and answers to the epoch before do not count.
    #[test]
    fn a_death_during_the_recovery_begins_it_again() {
        let all = follow(&mut Plan::new(view(1, &[2]), [0, 1]), 1, &alive(&[0, 1]), None).len();
        for steps in 0..all {
            let mut plan = Plan::new(view(1, &[2]), [0, 1]);
            follow(&mut plan, 1, &alive(&[0, 1]), Some(steps));
            let both = view(2, &[2, 1]);
            plan.declared(&both);
            assert_eq!(plan.view, both);
            for node in [0, 1] {
                plan.fenced(1, node);
                plan.answered(1, node);
                plan.freed(1, node);
            }
            plan.done(1, &Need::Cut);
            let done = follow(&mut plan, 2, &alive(&[0]), None);
            assert_eq!(done[0], Need::Fence(vec![0, 1]));
            assert!(done.contains(&Need::Answers(vec![0])) && done.contains(&Need::Cut));
            assert_eq!(done.len(), all - 1, "one mount less is asked");
        }
    }

    #[test]
    fn the_same_view_again_changes_nothing() {
        let mut plan = Plan::new(view(1, &[2]), [0]);
        plan.fenced(1, 0);
        plan.declared(&view(1, &[2]));
        assert_eq!(plan.need(&alive(&[0]), false), Need::Answers(vec![0]));
    }

    #[test]
    fn when_nobody_is_alive_everything_is_reset() {
        let mut plan = Plan::new(view(1, &[0, 1]), [0]);
        let done = follow(&mut plan, 1, &alive(&[]), None);
        assert_eq!(done, [Need::Fence(vec![0]), Need::Reset, Need::Forget]);
        // The last one leaves in the middle.
        let mut plan = Plan::new(view(1, &[0]), [0]);
        follow(&mut plan, 1, &alive(&[1]), Some(3));
        assert_eq!(plan.need(&alive(&[]), false), Need::Reset);
    }

    #[test]
    fn nothing_is_decided_while_transactions_may_be_missing() {
        let mut plan = Plan::new(view(1, &[1]), [0]);
        assert_eq!(plan.need(&alive(&[0]), true), Need::Fence(vec![0]));
        plan.fenced(1, 0);
        assert_eq!(plan.need(&alive(&[]), true), Need::Window);
        plan.answered(1, 0);
        assert_eq!(plan.need(&alive(&[0]), true), Need::Window);
        assert_eq!(plan.need(&alive(&[0]), false), Need::Cut);
    }
}
