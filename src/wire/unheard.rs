//! Unheard: acknowledgements that a lost connection may have swallowed. Pure.
//!
//! A connection takes some of what was written to it with it when it is lost. A server says, when a client comes back, how many
//! acknowledgements it has heard in all; both count them from the session's beginning, in order. So the rest are said again, and
//! none twice: what was acknowledged costs the guest nothing any more, whatever becomes of connections.
//!
//! Only the newest are kept, more than connections hold on their way. Those before them are not said again if they got lost:
//! their bytes stay in the scratch until the session's end.

use std::collections::VecDeque;

use super::message::Ack;

/// Extents that are kept: 1 MiB.
const MAX_EXTENTS: usize = 64 * 1024;

/// The newest acknowledgements.
#[derive(Debug, Default)]
pub struct Unheard {
    /// So many came before the first that is kept.
    before: u64,
    acks: VecDeque<Ack>,
    extents: usize,
}

impl Unheard {
    /// One is about to be said.
    pub fn push(&mut self, ack: Ack) {
        self.extents += ack.extents.len();
        self.acks.push_back(ack);
        while self.extents > MAX_EXTENTS {
            self.forget();
        }
    }

    fn forget(&mut self) {
        if let Some(ack) = self.acks.pop_front() {
            self.extents -= ack.extents.len();
            self.before += 1;
        }
    }

    /// The server has heard so many; gives those that are to be said again, which stay here. Of a server that does not count
    /// nothing is known: none are said again, and counting begins anew.
    pub fn heard(&mut self, count: Option<u64>) -> impl Iterator<Item = &Ack> {
        match count {
            Some(count) => {
                while self.before < count && !self.acks.is_empty() {
                    self.forget();
                }
                self.before = count;
            }
            None => (self.acks, self.extents) = (VecDeque::new(), 0),
        }
        self.acks.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::extent::Extent;
    use proptest::prelude::*;

    fn ack(number: u64) -> Ack {
        Ack { disk: 0, extents: vec![Extent::new(number * 65536, 65536)] }
    }

    proptest! {
        #[test]
        fn each_is_heard_once_whatever_is_swallowed(
            rounds in prop::collection::vec((0usize..40, any::<prop::sample::Index>()), 1..20),
        ) {
            let mut unheard = Unheard::default();
            let (mut heard, mut line, mut next) = (vec![], vec![], 0);
            for (more, arrives) in rounds {
                for number in next..next + more as u64 {
                    unheard.push(ack(number));
                    line.push(ack(number));
                }
                next += more as u64;
                // The connection is lost: of what is on it some has arrived, from the front.
                let arrived = arrives.index(line.len() + 1);
                heard.extend(line.drain(..arrived));
                line = unheard.heard(Some(heard.len() as u64)).cloned().collect();
            }
            heard.extend(line);
            prop_assert!(heard == (0..next).map(ack).collect::<Vec<_>>());
        }
    }

    #[test]
    fn not_more_than_so_much_is_kept() {
        let mut unheard = Unheard::default();
        (0..MAX_EXTENTS as u64 + 100).for_each(|number| unheard.push(ack(number)));
        assert_eq!(unheard.acks.len(), MAX_EXTENTS);
        // The first of those that were lost are lost, and counting goes on from what was heard.
        assert_eq!(unheard.heard(Some(50)).next(), Some(&ack(100)));
        assert_eq!(unheard.heard(Some(51)).next(), Some(&ack(101)));
        // A server that says more than it was told, and one that says nothing.
        assert_eq!(unheard.heard(Some(u64::MAX)).count(), 0);
        unheard.push(ack(1));
        assert_eq!(unheard.heard(None).count(), 0);
    }
}
