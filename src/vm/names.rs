//! Names of what is ours inside QEMU: `livebackup-<owner8>-<what>`.
//!
//! A name is the record of what we added: whoever finds it after a crash knows whose it is and how it goes away again.
//! QEMU allows 31 bytes for a node's name and 1023 for a bitmap's.

use crate::units::{CheckpointId, OwnerId};

/// The names of one owner.
#[derive(Clone, Debug)]
pub struct Names {
    prefix: String,
    mark: u32,
}

impl Names {
    /// The names of this owner.
    pub fn new(owner: OwnerId) -> Self {
        let [a, b, c, d, ..] = *owner.as_bytes();
        Self { prefix: format!("livebackup-{}-", owner.short()), mark: u32::from_be_bytes([a, b, c, d]) }
    }

    /// The names of the owner of this one, if it is one of livebackup's.
    pub fn of(name: &str) -> Option<Self> {
        let owner = name.strip_prefix("livebackup-")?.split_once('-')?.0;
        let mark = u32::from_str_radix(owner, 16).ok().filter(|_| owner.len() == 8)?;
        Some(Self { prefix: format!("livebackup-{owner}-"), mark })
    }

    /// The owner's short id.
    pub fn owner(&self) -> &str {
        self.prefix.trim_start_matches("livebackup-").trim_end_matches('-')
    }

    /// What all of them start with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The owner's short id as a number: for what QEMU lets us mark with numbers only.
    pub fn mark(&self) -> u32 {
        self.mark
    }

    /// The copy-before-write filter over the disk with this index.
    pub fn filter(&self, disk: usize) -> String {
        format!("{}cbw{disk}", self.prefix)
    }

    /// Whether a node is one of our filters.
    pub fn is_filter(&self, node: &str) -> bool {
        node.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with("cbw"))
    }

    /// The node that shows the disk at the instant.
    pub fn snapshot(&self, disk: usize) -> String {
        format!("{}snap{disk}", self.prefix)
    }

    /// The node over the filter that keeps its size.
    pub fn pin(&self, disk: usize) -> String {
        format!("{}pin{disk}", self.prefix)
    }

    /// Whether a node is one of ours that stand on a filter.
    pub fn is_on_filter(&self, node: &str) -> bool {
        node.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with("snap") || rest.starts_with("pin"))
    }

    /// The node that old data is copied to.
    pub fn scratch(&self, disk: usize) -> String {
        format!("{}scr{disk}", self.prefix)
    }

    /// The `null-co` node that carries bitmaps for us to set and read.
    pub fn helper(&self, disk: usize) -> String {
        format!("{}map{disk}", self.prefix)
    }

    /// The bitmap that records what is written after this checkpoint.
    pub fn since(&self, checkpoint: CheckpointId) -> String {
        format!("{}since-{checkpoint}", self.prefix)
    }

    /// The checkpoint in the name of a [`Names::since`] bitmap.
    pub fn checkpoint_of(&self, bitmap: &str) -> Option<CheckpointId> {
        bitmap.strip_prefix(&self.prefix)?.strip_prefix("since-")?.parse().ok()
    }

    /// The disabled bitmap whose one bit, in the last granule, vanishes when the disk is shrunk.
    pub fn sentinel(&self) -> String {
        format!("{}sentinel", self.prefix)
    }

    /// The same, kept by the image. A name of its own: it is there before the other goes.
    pub fn kept_sentinel(&self) -> String {
        format!("{}kept-sentinel", self.prefix)
    }

    /// Whether a bitmap is a sentinel of ours.
    pub fn is_sentinel(&self, bitmap: &str) -> bool {
        bitmap == self.sentinel() || bitmap == self.kept_sentinel()
    }

    /// Whether a name is ours.
    pub fn is_ours(&self, name: &str) -> bool {
        name.starts_with(&self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_come_back() {
        let names = Names::new(OwnerId::random());
        for node in [names.filter(255), names.snapshot(255), names.pin(255), names.scratch(255), names.helper(255)] {
            assert!(node.len() <= 31, "{node}");
            assert!(names.is_ours(&node));
        }
        assert!(names.prefix().contains(&format!("{:08x}", names.mark())));
        let id = CheckpointId::random();
        assert_eq!(names.checkpoint_of(&names.since(id)), Some(id));
        assert_eq!(names.checkpoint_of(&names.sentinel()), None);
        assert!(!names.is_ours(&Names::new(OwnerId::random()).filter(0)));
        let same = Names::of(&names.since(id)).unwrap();
        assert_eq!((same.prefix(), same.mark()), (names.prefix(), names.mark()));
        assert!(names.prefix().contains(same.owner()) && same.owner().len() == 8);
        for other in ["livebackup-run", "livebackup-12-x", "livebackup-zzzzzzzz-cbw0", "cbw0"] {
            assert!(Names::of(other).is_none(), "{other}");
        }
    }
}
