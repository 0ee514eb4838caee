//! How a disk gets its storage: asked for, waited for within a bound, and let go.

use std::time::{Duration, Instant};

use super::super::area::{Description, Failure, Hotplug};
use super::super::drive::Drive;
use super::super::helpers::{Asker, OpenBacking, OpenId};
use super::super::machine::Input;
use super::{Disk, Surroundings};
use crate::backing::{Access, BackingError, Spec};
use crate::limits;
use crate::xen::Store;

/// An open that is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Opening {
    /// Which.
    pub id: OpenId,
    /// Until when.
    pub until: Instant,
}

impl Disk {
    /// Begins to open its storage; what follows at once.
    pub(super) fn open<S: Store>(&mut self, around: &mut Surroundings<'_, S>) -> Vec<Input> {
        self.shut(around);
        match self.begin_to_open(around) {
            Ok(None) => Vec::new(),
            Ok(Some(backing)) => self.take_backing(Ok(backing), around),
            Err(failure) => self.take_backing(Err(failure), around),
        }
    }

    /// Its storage, where it is open already or there is none; else a helper opens it.
    fn begin_to_open<S: Store>(
        &mut self,
        around: &mut Surroundings<'_, S>,
    ) -> Result<Option<OpenBacking>, Failure> {
        self.description = None;
        let description = Description::read(around.store, self.area.path(), &self.key)
            .map_err(|error| Failure::of(&error))?;
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
        let spec = target.parse::<Spec>().map_err(|error| Failure::of(&error))?;
        let id = around.helpers.open(spec, self.access(), Asker::Disk(self.key.clone()));
        let until = around.now + Duration::from_secs(limits::OPEN_SECONDS);
        self.opening = Some(Opening { id, until });
        Ok(None)
    }

    /// How it wants to use its storage.
    pub fn access(&self) -> Access {
        let description = self.description.as_ref();
        Access {
            read_only: description.is_none_or(|description| description.read_only),
            shareable: description.is_some_and(|description| description.shareable),
            user: self.key.user(),
        }
    }

    /// Until when the open that is under way is waited for.
    pub fn open_until(&self) -> Option<Instant> {
        self.opening.map(|opening| opening.until)
    }

    /// Acts on the answer to an open; one that is not waited for any more is dropped.
    pub fn take_answer<S: Store>(
        &mut self,
        id: OpenId,
        result: Result<OpenBacking, BackingError>,
        around: &mut Surroundings<'_, S>,
    ) {
        if self.opening.take_if(|opening| opening.id == id).is_some() {
            self.take_opened(result.map_err(|error| Failure::of(&error)), around);
        }
    }

    /// Gives up an open that takes too long.
    pub fn give_up_opening<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        let now = around.now;
        let Some(Opening { id, .. }) = self.opening.take_if(|opening| opening.until <= now) else {
            return;
        };
        around.helpers.abandon(id);
        let target = match self.machine.is_opening() {
            true => self.description.as_ref().map_or("", |description| &description.target),
            false => self.drive.wanted(),
        };
        self.take_opened(Err(too_slow(target)), around);
    }

    pub(super) fn take_opened<S: Store>(
        &mut self,
        result: Result<OpenBacking, Failure>,
        around: &mut Surroundings<'_, S>,
    ) {
        if self.machine.is_opening() {
            let inputs = self.take_backing(result, around);
            self.run(inputs.into(), around);
        } else if self.drive.stop_opening().is_some() {
            self.take_medium(result, around);
        }
        self.move_medium(around);
    }

    /// Takes its storage, or the reason why there is none; what the machine has to hear of it.
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
                self.failure = failure;
                return match hotplug {
                    Some(Hotplug::Ours) => vec![Input::OpenFailedScript],
                    _ => vec![Input::OpenFailed],
                };
            }
        };
        let target = self.description.as_ref().map_or("", |description| &description.target);
        self.drive = Drive::with(target);
        self.tell_warnings(&backing);
        self.backing = Some(backing);
        if let Some(params) = self.params_event.take()
            && let Err(error) = self.look_at_medium(params, around)
        {
            tracing::error!(disk = %self.key, "its params cannot be read: {error}");
        }
        let done = || matches!(self.area.standing(around.store), Ok(Some(it)) if it.hotplug_done);
        match hotplug == Some(Hotplug::None) || done() {
            true => vec![Input::Opened, Input::Ready],
            false => vec![Input::Opened],
        }
    }

    /// Tells the admin, once, what is not as it should be with storage that is served all the same.
    pub(super) fn tell_warnings(&self, backing: &OpenBacking) {
        for warning in backing.warnings() {
            tracing::warn!(disk = %self.key, target = backing.target(), "{warning}");
        }
    }

    /// Lets its storage go, and an open that is under way.
    pub(super) fn shut<S: Store>(&mut self, around: &mut Surroundings<'_, S>) {
        if let Some(Opening { id, .. }) = self.opening.take() {
            around.helpers.abandon(id);
        }
        self.backing = None;
        self.drive = Drive::default();
        self.params_event = None;
        self.ignored.clear();
    }
}

/// Why an open is not waited for any longer.
pub fn too_slow(target: &str) -> Failure {
    Failure { errno: libc::ETIMEDOUT, text: BackingError::too_slow(target).to_string() }
}
