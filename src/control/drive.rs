//! The medium of a drive: which one is wanted, which one is inserted, and the steps between them.
//!
//! Every change is an ejection and then an insertion, and the guest sees both. So it never mistakes one
//! medium for another of the same size. The same name again is a change, too: the file behind it may be
//! another one now.

use super::helpers::{OpenBacking, OpenId};

/// Which medium is in the drive and which should be. Media are named by targets; an empty one means none.
#[derive(Debug, Default)]
pub struct Drive {
    wanted: String,
    inserted: String,
    /// How many times a medium was wanted.
    wishes: u64,
    /// The last of these wishes that was fulfilled or refused.
    settled: u64,
    refused: bool,
    under_way: Option<UnderWay>,
}

/// A step that has been begun.
#[derive(Debug)]
enum UnderWay {
    /// A helper is opening the medium.
    Opening(OpenId),
    /// The data plane is changing to the medium with this name, for the wish with this number.
    Moving(String, OpenBacking, u64),
}

/// The next step towards what is wanted.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Take the medium out.
    Eject,
    /// Open this medium and put it into the empty drive.
    Insert(String),
}

impl Drive {
    /// A drive that was opened with this medium in it.
    pub fn with(target: &str) -> Drive {
        let (wanted, inserted) = (target.to_owned(), target.to_owned());
        Drive { wanted, inserted, ..Drive::default() }
    }

    /// Wants a medium, whatever is in the drive. Returns the open that is no longer needed, if any.
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

    /// The next step; `None` while one is under way.
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

    /// Notes that a helper is opening the wanted medium.
    pub fn begin_opening(&mut self, id: OpenId) {
        self.under_way = Some(UnderWay::Opening(id));
    }

    /// Ends and returns the open that is under way, if any.
    pub fn stop_opening(&mut self) -> Option<OpenId> {
        match self.under_way {
            Some(UnderWay::Opening(id)) => {
                self.under_way = None;
                Some(id)
            }
            _ => None,
        }
    }

    /// Notes that the wanted medium can't be inserted.
    pub fn refuse(&mut self) {
        (self.settled, self.refused, self.under_way) = (self.wishes, true, None);
    }

    /// Notes that the data plane is changing to `backing`, which `target` names.
    pub fn begin_move(&mut self, target: String, backing: OpenBacking) {
        self.under_way = Some(UnderWay::Moving(target, backing, self.wishes));
    }

    /// Notes that the data plane has changed over; returns what it serves now.
    pub fn finish_move(&mut self) -> Option<OpenBacking> {
        match self.under_way.take()? {
            UnderWay::Moving(target, backing, wishes) => {
                // An ejection is only half of a change, unless no medium is wanted (see `next_step`).
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

    /// Whether nothing is left to do; the last wish may have been refused.
    pub fn is_settled(&self) -> bool {
        self.settled == self.wishes && self.under_way.is_none()
    }

    /// Whether the wanted medium could not be inserted.
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
        assert_eq!(drive.next_step(), Some(Step::Eject), "it was written again");
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
