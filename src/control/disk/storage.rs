//! How a disk opens its storage, waits for it with a time limit, and lets it go.

use super::super::area::{Description, Failure, Hotplug};
use super::super::drive::Drive;
use super::super::helpers::{Asker, OpenBacking, OpenId};
use super::super::machine::Input;
use super::{Disk, Surroundings};
use crate::backing::Access;
use crate::xen::Store;

impl Disk {
    /// Begins to open its storage. Returns inputs for the machine, if the result is known at once.
    pub(super) fn open<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> Vec<Input> {
        self.shut(around);
        match self.begin_to_open(around).transpose() {
            None => Vec::new(),
            Some(result) => self.take_backing(result, around),
        }
    }

    /// Returns its storage if it is open already or the drive is empty; else a helper opens it.
    fn begin_to_open<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
    ) -> Result<Option<OpenBacking>, Failure> {
        self.description = None;
        let mut description = Description::read(around.store, self.area.path(), &self.key)
            .map_err(|error| Failure::of(&error))?;
        // To a drive each write of `params` is a medium. Those before this are not another one.
        if description.is_drive()
            && let Ok(Some(target)) = self.target(around.store)
        {
            description.target = target;
        }
        let target = self.description.insert(description).target.clone();
        self.begin_to_open_target(&target, around)
    }

    pub(super) fn begin_to_open_target<S: Store>(
        &mut self,
        target: &str,
        around: &mut Surroundings<'_, S>,
    ) -> Result<Option<OpenBacking>, Failure> {
        match self.prepared.take() {
            Some((prepared, backing)) if prepared == target => return Ok(Some(backing)),
            _ if target.is_empty() => return Ok(Some(around.helpers.empty())),
            _ => {}
        }
        let asker = Asker::Disk(self.key.clone());
        let asked = around.helpers.open(target, self.access(), asker, around.now);
        self.opening = Some(asked.map_err(|error| Failure::of(&error))?);
        Ok(None)
    }

    /// How it wants to use its storage.
    pub fn access(&self) -> Access {
        let description = self.description.as_ref();
        Access {
            read_only: self.is_read_only(),
            shareable: description.is_some_and(|description| description.shareable),
            user: self.key.user(),
        }
    }

    /// Acts on the answer to an open; a late one is dropped.
    pub fn take_answer<S: Store>(
        &mut self,
        id: OpenId,
        result: Result<OpenBacking, Failure>,
        around: &mut Surroundings<'_, S>,
    ) {
        if self.opening.take_if(|opening| *opening == id).is_none() {
            return;
        }
        if self.machine.is_opening() {
            let inputs = self.take_backing(result, around);
            self.run(inputs.into(), around);
        } else if self.drive.stop_opening().is_some() {
            self.take_medium(result, around);
        }
        self.move_medium(around);
    }

    /// Takes its storage, or the reason why it can't be opened. Returns inputs for the machine.
    fn take_backing<S: Store>(
        &mut self,
        result: Result<OpenBacking, Failure>,
        around: &mut Surroundings<'_, S>,
    ) -> Vec<Input> {
        let hotplug = self.description.as_ref().map(Description::hotplug);
        let backing = match result {
            Ok(backing) => backing,
            Err(failure) => {
                tracing::error!(disk = %self.key, "cannot be opened: {}", failure.text);
                if self.names_another_target(around) {
                    return self.open(around);
                }
                self.failure = failure;
                return match hotplug {
                    Some(Hotplug::Ours) => vec![Input::OpenFailedScript],
                    _ => vec![Input::OpenFailed],
                };
            }
        };
        self.drive = Drive::with(self.named());
        self.tell_warnings(&backing);
        self.backing = Some(backing);
        if let Some(params) = self.params_event.take()
            && let Err(error) = self.look_at_medium(params, around)
        {
            tracing::error!(disk = %self.key, "cannot read its params: {error}");
        }
        let done = || matches!(self.area.standing(around.store), Ok(Some(it)) if it.hotplug_done);
        match hotplug == Some(Hotplug::None) || done() {
            true => vec![Input::Opened, Input::Ready],
            false => vec![Input::Opened],
        }
    }

    /// Whether `params` was written meanwhile and now names something else.
    fn names_another_target<S: Store>(&mut self, around: &Surroundings<'_, S>) -> bool {
        self.params_event.take().is_some()
            && matches!(self.target(around.store), Ok(Some(target)) if target != self.named())
    }

    /// Logs what the admin should know about storage although it is served.
    pub(super) fn tell_warnings(&self, backing: &OpenBacking) {
        for warning in backing.warnings() {
            tracing::warn!(disk = %self.key, target = backing.target(), "{warning}");
        }
    }

    /// Lets go of its storage, and abandons an open that is under way.
    pub(super) fn shut<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        if let Some(id) = self.opening.take() {
            around.helpers.abandon(id);
        }
        self.backing = None;
        self.drive = Drive::default();
        self.params_event = None;
        self.ignored.clear();
    }
}
