//! What is in a drive, and what becomes of a disk whose `params` change.

use std::io;
use std::sync::Arc;

use super::super::area::{self, Failure};
use super::super::drive::Step;
use super::super::machine::{Input, Link};
use super::{Disk, Surroundings};
use crate::backing::{Access, Backing, DiskOptions, Image, Spec};
use crate::xen::Store;
use crate::xen::keys::XenbusState;

/// Opens what a target names, with its options; the empty one names a drive without a medium.
pub fn open(target: &str, access: &Access) -> Result<(Arc<Image>, DiskOptions), Failure> {
    if target.is_empty() {
        return Ok((Backing::empty().image().clone(), DiskOptions::default()));
    }
    let spec = target.parse::<Spec>().map_err(|error| Failure::of(&error))?;
    let backing = spec.open(access).map_err(|error| Failure::of(&error))?;
    Ok((backing.image().clone(), spec.options))
}

impl Disk {
    /// Reads which contents the toolstack wants now and acts on it. A drive gets another medium; a
    /// disk without a drive keeps what its guest works with, whatever `params` says.
    pub fn look_at_medium<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> io::Result<()> {
        let is_open = self.image.is_some() && self.machine.backend() != XenbusState::Initialising;
        let Some(description) = self.description.as_mut().filter(|_| is_open) else {
            // The toolstack starts it over, or has to: then it is opened afresh.
            return Ok(());
        };
        let Some(target) = area::target(around.store, &self.area)? else { return Ok(()) };
        if !description.is_drive() {
            self.ignore(&target);
            return Ok(());
        }
        if description.target == target {
            return Ok(());
        }
        description.target.clone_from(&target);
        if self.drive.has_refused() {
            self.clear_error(around)?;
        }
        self.drive.want(&target);
        self.move_medium(around);
        Ok(())
    }

    fn ignore(&mut self, target: &str) {
        let served = self.description.as_ref().map_or("", |description| &description.target);
        let ignored = match target == served {
            true => String::new(),
            false => format!(
                "params names \"{target}\" now, and \"{served}\" is still served; detach the disk \
                 and attach it again, for only a drive (removable, or a CD-ROM) changes its medium"
            ),
        };
        if !ignored.is_empty() && ignored != self.ignored {
            tracing::warn!(disk = %self.key, "{ignored}");
        }
        self.ignored = ignored;
    }

    /// Whether the drive has what was wanted last, or has refused it.
    pub fn medium_is_settled(&self) -> bool {
        self.drive.is_settled()
    }

    /// Whether the drive could not take what was wanted last; [`Disk::failure`] says why.
    pub fn has_refused_medium(&self) -> bool {
        self.drive.has_refused()
    }

    /// Goes on with changing the medium, until the data plane or nothing is waited for.
    pub(super) fn move_medium<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        while !self.forgotten
            && self.machine.link() != Link::Disconnecting
            && let Some(step) = self.drive.next_step()
        {
            match step {
                Step::Eject => self.hand_over(String::new(), Arc::new(Image::Empty), around),
                Step::Insert(target) => match self.open_medium(&target) {
                    Ok(image) => self.hand_over(target, image, around),
                    Err(failure) => {
                        tracing::error!(disk = %self.key, "no medium: {}", failure.text);
                        self.drive.refuse();
                        self.failure = failure;
                        self.run(Input::MediumFailed, around);
                    }
                },
            }
        }
    }

    /// Opens a medium that the guest can use.
    pub fn open_medium(&self, target: &str) -> Result<Arc<Image>, Failure> {
        // How its data goes was agreed on with the frontend, whatever this target says of it.
        let access = self.description.as_ref().map(|description| description.access(&self.key));
        let (image, _) =
            open(target, &access.unwrap_or(Access { read_only: true, ..Access::default() }))?;
        let (sector_bytes, told) = (image.geometry().sector_bytes, self.told_sector_bytes);
        match told.filter(|told| *told < sector_bytes) {
            None => Ok(image),
            Some(told) => Err(Failure {
                errno: libc::EINVAL,
                text: format!(
                    "{target}: it has blocks of {sector_bytes} bytes, and the guest was told \
                     {told}, which it asks only once; name it with the option emulate-512, or \
                     detach the drive and attach it with this medium"
                ),
            }),
        }
    }

    /// Has every queue go over to `image`; at once where there is none.
    fn hand_over<S: Store>(
        &mut self,
        target: String,
        image: Arc<Image>,
        around: &mut Surroundings<'_, S>,
    ) {
        match target.as_str() {
            "" => tracing::info!(disk = %self.key, "ejecting"),
            medium => tracing::info!(disk = %self.key, medium, "inserting"),
        }
        let rules = self.rules(&image, around.offer);
        self.drive.begin(target, image.clone());
        let input = match &mut self.connection {
            None => {
                self.finish_move();
                Some(Input::MediumChanged)
            }
            Some(connection) => connection
                .replace_image(&image, rules, around.workers)
                .map(|news| self.digest(news, around.workers)),
        };
        if let Some(input) = input {
            self.run(input, around);
        }
    }

    /// The data plane serves what was handed over to it.
    pub(super) fn finish_move(&mut self) {
        if let Some(image) = self.drive.finish() {
            self.image = Some(image);
        }
    }
}
