//! The medium of a drive: which one is wanted, which one is in, and the way from one to the other.
//!
//! A change is an ejection and then an insertion, each told to the guest by itself, however they
//! were asked for. So a guest never takes one medium for another of the same size.

use std::sync::Arc;

use crate::backing::Image;

/// Which medium is in the drive and which should be. Targets name media; the empty one none.
#[derive(Debug, Default)]
pub struct Drive {
    wanted: String,
    inserted: String,
    /// On its way to the data plane.
    moving: Option<(String, Arc<Image>)>,
    /// What is wanted is of no use.
    refused: bool,
}

/// What to do next to get what is wanted.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Take the medium out.
    Eject,
    /// Put this one into the empty drive.
    Insert(String),
}

impl Drive {
    /// A drive with what was in it when it was opened.
    pub fn with(target: &str) -> Drive {
        Drive { wanted: target.to_owned(), inserted: target.to_owned(), ..Drive::default() }
    }

    /// Wants another medium; the same one again changes nothing, even where it was refused.
    pub fn want(&mut self, target: &str) {
        if self.wanted != target {
            target.clone_into(&mut self.wanted);
            self.refused = false;
        }
    }

    /// The next step; none while one is under way.
    pub fn next_step(&self) -> Option<Step> {
        if self.moving.is_some() || self.inserted == self.wanted {
            return None;
        }
        match (self.inserted.as_str(), self.refused) {
            ("", true) => None,
            ("", false) => Some(Step::Insert(self.wanted.clone())),
            _ => Some(Step::Eject),
        }
    }

    /// What is wanted can't be inserted.
    pub fn refuse(&mut self) {
        self.refused = true;
    }

    /// Has the data plane go over to `image`, the one that `target` names.
    pub fn begin(&mut self, target: String, image: Arc<Image>) {
        self.moving = Some((target, image));
    }

    /// The data plane has gone over; returns the image.
    pub fn finish(&mut self) -> Option<Arc<Image>> {
        let (target, image) = self.moving.take()?;
        self.inserted = target;
        Some(image)
    }

    /// Whether nothing is left to do; what was wanted may have been refused.
    pub fn is_settled(&self) -> bool {
        self.moving.is_none() && self.next_step().is_none()
    }

    /// Whether what is wanted could not be inserted.
    pub fn has_refused(&self) -> bool {
        self.refused
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn empty() -> Arc<Image> {
        Arc::new(Image::Empty)
    }

    #[test]
    fn a_change_is_an_ejection_and_then_an_insertion() {
        let mut drive = Drive::with("raw:/a");
        assert_eq!(drive.next_step(), None);
        drive.want("raw:/b");
        assert_eq!(drive.next_step(), Some(Step::Eject));
        drive.begin(String::new(), empty());
        assert_eq!(drive.next_step(), None, "one at a time");
        drive.finish();
        assert_eq!(drive.next_step(), Some(Step::Insert("raw:/b".to_owned())));
        drive.begin("raw:/b".to_owned(), empty());
        assert!(!drive.is_settled());
        drive.finish();
        assert!(drive.is_settled() && drive.finish().is_none());
    }

    #[test]
    fn what_is_wanted_last_counts() {
        let mut drive = Drive::with("raw:/a");
        drive.want("");
        drive.begin(String::new(), empty());
        drive.want("raw:/b");
        drive.want("raw:/a");
        drive.finish();
        assert_eq!(drive.next_step(), Some(Step::Insert("raw:/a".to_owned())), "it was taken out");
    }

    #[test]
    fn a_medium_of_no_use_leaves_the_drive_empty_until_another_is_wanted() {
        let mut drive = Drive::with("");
        drive.want("raw:/none");
        drive.refuse();
        assert!(drive.is_settled() && drive.has_refused());
        drive.want("raw:/none");
        assert_eq!(drive.next_step(), None);
        drive.want("");
        assert!(drive.is_settled() && !drive.has_refused());
        drive.want("raw:/none");
        assert_eq!(drive.next_step(), Some(Step::Insert("raw:/none".to_owned())));
    }
}
