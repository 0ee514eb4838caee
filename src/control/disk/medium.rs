//! Changing the medium of a drive, and what a disk does when its `params` change.

use std::collections::VecDeque;
use std::io;

use super::super::area::{self, Failure};
use super::super::drive::Step;
use super::super::helpers::OpenBacking;
use super::super::machine::{ConnectionState, Input};
use super::{Disk, Params, Surroundings, backend_token};
use crate::xen::Store;
use crate::xen::keys::{self, XenbusState};

impl Disk {
    /// Reads which contents the toolstack wants now and acts on it. A drive gets another medium, or the
    /// same one again if its name was written again; a disk that is not a drive keeps its contents,
    /// whatever `params` says.
    pub fn look_at_medium<S: Store>(
        &mut self,
        params: Params,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        if self.machine.is_opening() && self.backing.is_none() {
            // The target that is being opened may be the one from before.
            self.params_event = self.params_event.max(Some(params));
            return Ok(());
        }
        let is_open = self.backing.is_some()
            && (self.machine.is_opening() || self.machine.backend() != XenbusState::Initialising);
        let Some(description) = self.description.as_ref().filter(|_| is_open) else {
            // The disk is about to be opened from scratch, which reads `params` anyway.
            return Ok(());
        };
        let Some(target) = self.target(around.store)? else { return Ok(()) };
        if !description.is_drive() {
            self.ignore(&target);
        } else if params == Params::Written || description.target != target {
            self.want_medium(&target, None, around)?;
        }
        Ok(())
    }

    /// The target that `params` names now. Events about earlier writes, such as polldisk's own, are dropped.
    pub fn target<S: Store>(&self, store: &S) -> io::Result<Option<String>> {
        area::target(store, self.area.path(), &backend_token(&self.key.kind))
    }

    /// Wants this medium in the drive, or none if `target` is empty. `prepared` is the medium, if it is
    /// open already; one that was prepared for an earlier wish is closed.
    fn want_medium<S: Store>(
        &mut self,
        target: &str,
        prepared: Option<OpenBacking>,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        self.prepared = prepared.map(|backing| (target.to_owned(), backing));
        if let Some(description) = &mut self.description {
            target.clone_into(&mut description.target);
        }
        if self.drive.has_refused() {
            self.clear_error(around)?;
        }
        if let Some(id) = self.drive.want(target) {
            self.opening = None;
            around.helpers.abandon(id);
        }
        self.move_medium(around);
        Ok(())
    }

    /// Changes the drive's medium as the toolstack would, to none if `target` is empty. `prepared` is the
    /// medium, if it is open already.
    pub fn change_medium<S: Store>(
        &mut self,
        target: &str,
        prepared: Option<OpenBacking>,
        around: &mut Surroundings<'_, S>,
    ) -> io::Result<()> {
        self.area.write(around.store, &[(keys::PARAMS, target.to_owned())])?;
        let now_named = self.target(around.store)?.unwrap_or_default();
        self.want_medium(&now_named, prepared.filter(|_| now_named == target), around)
    }

    fn ignore(&mut self, target: &str) {
        let served = self.named();
        let ignored = match target == served {
            true => String::new(),
            false => format!(
                "params now names \"{target}\", but \"{served}\" is still served; detach the disk \
                 and attach it again, as only drives (removable, or CD-ROM) can change their medium"
            ),
        };
        if !ignored.is_empty() && ignored != self.ignored {
            tracing::warn!(disk = %self.key, "{ignored}");
        }
        self.ignored = ignored;
    }

    /// Whether the medium that was wanted last is in the drive, or was refused.
    pub fn medium_is_settled(&self) -> bool {
        self.drive.is_settled()
    }

    /// Whether the medium that was wanted last was refused; [`Disk::failure`] says why.
    pub fn has_refused_medium(&self) -> bool {
        self.drive.has_refused()
    }

    /// Whether the medium with this name is in the drive and the guest can write to it.
    pub fn writes_to_medium(&self, target: &str) -> bool {
        !self.is_read_only() && self.drive.inserted() == target
    }

    /// Takes steps to change the medium, until one has to wait for the data plane or storage, or none is
    /// left.
    pub(super) fn move_medium<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        while !self.forgotten
            && self.backing.is_some()
            && !self.machine.is_opening()
            && self.machine.connection() != ConnectionState::Disconnecting
            && let Some(step) = self.drive.next_step()
        {
            match step {
                Step::Eject => {
                    let nothing = around.helpers.empty();
                    self.hand_over(String::new(), nothing, around);
                }
                Step::Insert(target) => {
                    match self.begin_to_open_target(&target, around).transpose() {
                        Some(result) => self.take_medium(result, around),
                        None => {
                            if let Some(id) = self.opening {
                                self.drive.begin_opening(id);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Takes the wanted medium, or the reason why it can't be used.
    pub(super) fn take_medium<S: Store>(
        &mut self,
        result: Result<OpenBacking, Failure>,
        around: &mut Surroundings<'_, S>,
    ) {
        let usable = result.and_then(|medium| self.check_medium(&medium).map(|()| medium));
        match usable {
            Ok(medium) => {
                let target = self.drive.wanted().to_owned();
                self.tell_warnings(&medium);
                self.hand_over(target, medium, around);
            }
            Err(failure) => {
                tracing::error!(disk = %self.key, "no medium: {}", failure.text);
                self.drive.refuse();
                self.failure = failure;
                self.run(VecDeque::from([Input::MediumFailed]), around);
            }
        }
    }

    /// Whether the guest can use a medium.
    pub fn check_medium(&self, medium: &OpenBacking) -> Result<(), Failure> {
        let sector_bytes = medium.image().geometry().sector_bytes;
        match self.told_sector_bytes.filter(|told| *told < sector_bytes) {
            None => Ok(()),
            Some(told) => Err(Failure {
                errno: libc::EINVAL,
                text: format!(
                    "the medium has blocks of {sector_bytes} bytes, but the guest has read a block size of \
                     {told} and reads it only once; name the medium with the option emulate-512, or \
                     detach the drive and attach it with this medium"
                ),
            }),
        }
    }

    /// Makes every queue change to `medium`; if there are none, the change is done at once.
    fn hand_over<S: Store>(
        &mut self,
        target: String,
        medium: OpenBacking,
        around: &mut Surroundings<'_, S>,
    ) {
        match target.as_str() {
            "" => tracing::info!(disk = %self.key, "ejecting"),
            target => tracing::info!(disk = %self.key, medium = target, "inserting"),
        }
        let image = medium.image().clone();
        let rules = self.rules(&medium, around.offer);
        self.drive.begin_move(target, medium);
        let input = match &mut self.connection {
            None => {
                self.finish_move();
                Some(Input::MediumChanged)
            }
            Some(connection) => connection
                .replace_image(&image, rules, around.workers)
                .map(|news| self.digest(news, around)),
        };
        if let Some(input) = input {
            self.run(VecDeque::from([input]), around);
        }
    }

    /// Notes that the data plane serves the medium that was handed over.
    pub(super) fn finish_move(&mut self) {
        if let Some(medium) = self.drive.finish_move() {
            self.backing = Some(medium);
        }
    }
}
