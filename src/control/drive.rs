//! The medium of a drive: which one is wanted, which one is in, and the way from one to the other.
//!
//! A change is an ejection and then an insertion, each told to the guest by itself, however they
//! were asked for. So a guest never takes one medium for another of the same size. The same name
//! once more is a change, too: the file behind it may be another one by now.

use super::helpers::{OpenBacking, OpenId};

/// Which medium is in the drive and which should be. Targets name media; the empty one none.
#[derive(Debug, Default)]
pub struct Drive {
    wanted: String,
    inserted: String,
    /// How many times something was wanted.
    wishes: u64,
    /// The last of them that is in, or was refused.
    settled: u64,
    refused: bool,
    under_way: Option<UnderWay>,
}

/// What has been begun.
#[derive(Debug)]
enum UnderWay {
    /// A helper opens the medium.
    Opening(OpenId),
    /// The data plane goes over to the medium of this name, for the wish with this number.
    Moving(String, OpenBacking, u64),
}

/// What to do next to get what is wanted.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Take the medium out.
    Eject,
    /// Open this one, to be put into the empty drive.
    Insert(String),
}

impl Drive {
    /// A drive with what was in it when it was opened.
    pub fn with(target: &str) -> Drive {
        let (wanted, inserted) = (target.to_owned(), target.to_owned());
        Drive { wanted, inserted, ..Drive::default() }
    }

    /// Wants a medium, whatever is in the drive. Returns an open that nobody waits for any more.
    pub fn want(&mut self, target: &str) -> Option<OpenId> {
        target.clone_into(&mut self.wanted);
        self.wishes += 1;
        self.refused = false;
        self.stop_opening()
    }

    /// What was wanted last.
    pub fn wanted(&self) -> &str {
        &self.wanted
    }

    /// What is in the drive.
    pub fn inserted(&self) -> &str {
        &self.inserted
    }

    /// The next step; none while one is under way.
    pub fn next_step(&mut self) -> Option<Step> {
        if self.settled == self.wishes || self.under_way.is_some() {
            return None;
        }
        match (self.inserted.as_str(), self.wanted.as_str()) {
            ("", "") => {
                self.settled = self.wishes;
                None
            }
            ("", wanted) => Some(Step::Insert(wanted.to_owned())),
            _ => Some(Step::Eject),
        }
    }

    /// A helper opens what is wanted.
    pub fn begin_opening(&mut self, id: OpenId) {
        self.under_way = Some(UnderWay::Opening(id));
    }

    /// The open that is under way; it no longer is.
    pub fn stop_opening(&mut self) -> Option<OpenId> {
        match self.under_way {
            Some(UnderWay::Opening(id)) => {
                self.under_way = None;
                Some(id)
            }
            _ => None,
        }
    }

    /// What is wanted can't be inserted.
    pub fn refuse(&mut self) {
        (self.settled, self.refused, self.under_way) = (self.wishes, true, None);
    }

    /// Has the data plane go over to `backing`, the one that `target` names.
    pub fn begin_move(&mut self, target: String, backing: OpenBacking) {
        self.under_way = Some(UnderWay::Moving(target, backing, self.wishes));
    }

    /// The data plane has gone over; returns what it serves now.
    pub fn finish_move(&mut self) -> Option<OpenBacking> {
        match self.under_way.take()? {
            UnderWay::Moving(target, backing, wishes) => {
                // An ejection is only half of what is wanted, unless nothing is.
                if !target.is_empty() {
                    self.settled = wishes;
                }
                self.inserted = target;
                Some(backing)
            }
            opening @ UnderWay::Opening(_) => {
                self.under_way = Some(opening);
                None
            }
        }
    }

    /// Whether nothing is left to do; what was wanted may have been refused.
    pub fn is_settled(&self) -> bool {
        self.settled == self.wishes && self.under_way.is_none()
    }

    /// Whether what is wanted could not be inserted.
    pub fn has_refused(&self) -> bool {
        self.refused
    }
}

#[cfg(test)]
mod test {
    use std::time::Instant;

    use super::*;
    use crate::backing::Access;
    use crate::control::helpers::{Asker, Helpers};
    use crate::park::Doorbell;

    fn moved(drive: &mut Drive, helpers: &Helpers, target: &str) {
        drive.begin_move(target.to_owned(), helpers.empty());
        assert_eq!(drive.next_step(), None, "one at a time");
        assert!(!drive.is_settled());
        drive.finish_move().unwrap();
    }

    fn insert(target: &str) -> Option<Step> {
        Some(Step::Insert(target.to_owned()))
    }

    #[test]
    fn a_change_is_an_ejection_and_then_an_insertion() {
        let helpers = Helpers::new(Doorbell::new().unwrap(), 1);
        let mut drive = Drive::with("raw:/a");
        assert_eq!(drive.next_step(), None);
        for target in ["raw:/b", "raw:/b", "raw:/a"] {
            drive.want(target);
            assert_eq!(drive.next_step(), Some(Step::Eject));
            moved(&mut drive, &helpers, "");
            assert_eq!(drive.next_step(), insert(target));
            moved(&mut drive, &helpers, target);
            assert_eq!(drive.next_step(), None);
            assert!(drive.is_settled());
        }
    }

    #[test]
    fn an_empty_drive_stays_empty_without_a_step() {
        let mut drive = Drive::with("");
        drive.want("");
        assert_eq!(drive.next_step(), None);
        assert!(drive.is_settled());
    }

    #[test]
    fn what_is_wanted_meanwhile_counts_when_the_way_is_free() {
        let mut helpers = Helpers::new(Doorbell::new().unwrap(), 1);
        let mut drive = Drive::with("raw:/a");
        drive.want("");
        assert_eq!(drive.next_step(), Some(Step::Eject));
        drive.begin_move(String::new(), helpers.empty());
        drive.want("raw:/b");
        assert_eq!(drive.next_step(), None);
        drive.finish_move().unwrap();
        assert_eq!(drive.next_step(), insert("raw:/b"));
        drive.begin_move("raw:/b".to_owned(), helpers.empty());
        drive.want("raw:/b");
        drive.finish_move().unwrap();
        assert_eq!(drive.next_step(), Some(Step::Eject), "it was written once more");
        moved(&mut drive, &helpers, "");

        let now = Instant::now();
        let id = helpers.open("null:1G", Access::default(), Asker::Admin, now).unwrap();
        drive.begin_opening(id);
        assert_eq!(drive.next_step(), None);
        assert_eq!(drive.want("raw:/c"), Some(id), "nobody waits for it any more");
        assert_eq!(drive.next_step(), insert("raw:/c"));
    }

    #[test]
    fn a_medium_that_is_refused_leaves_the_drive_empty_until_one_is_wanted() {
        let mut drive = Drive::with("");
        drive.want("raw:/none");
        assert_eq!(drive.next_step(), insert("raw:/none"));
        drive.refuse();
        assert!(drive.is_settled() && drive.has_refused());
        assert_eq!(drive.next_step(), None);
        drive.want("raw:/none");
        assert!(!drive.has_refused());
        assert_eq!(drive.next_step(), insert("raw:/none"), "it may be there by now");
    }
}
