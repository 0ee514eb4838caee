//! What the admin asks of the disks: to be made, taken away, or to have another medium.
//!
//! Storage is opened before anything is done with it, and only once: what is opened here is handed to
//! the disk that it is for.

use std::time::Instant;

use super::super::admin::protocol::{Attach, Detach};
use super::super::area::Failure;
use super::super::attach::{self, AttachError};
use super::super::disk::Disk;
use super::super::helpers::{Asker, OpenBacking, OpenId};
use super::super::key::DiskKey;
use super::Registry;
use crate::backing::Access;
use crate::xen::Store;

/// What the admin wants and storage is being opened for.
#[derive(Debug)]
pub enum Wanted {
    /// A disk to be made.
    Attach(DiskKey, Attach),
    /// This medium in the drive of a disk.
    Insert(DiskKey, String),
}

/// A request of the admin that has been begun.
#[derive(Debug)]
pub enum Begun {
    /// [`Registry::outcome`] will tell of it.
    Opening(OpenId),
    /// What is about this disk goes on by itself.
    Disk(DiskKey),
}

impl<S: Store> Registry<S> {
    /// Begins to make a disk for a running guest. Its storage is opened first, so that the guest sees
    /// nothing of what can't be.
    pub fn attach(&mut self, attach: Attach, now: Instant) -> Result<Begun, AttachError> {
        let key = attach::name(&self.kinds[0], attach.domid, &attach.vdev)?;
        attach::check(&self.store, &key, &attach)?;
        self.check_free(&key)?;
        if attach.target.is_empty() {
            return self.make(key, &attach, None, now).map(Begun::Disk);
        }
        let read_only = attach.is_read_only();
        let access = Access { read_only, shareable: false, user: key.user() };
        let id = self.helpers.open(&attach.target, access, Asker::Admin, now)?;
        self.asked.insert(id, Wanted::Attach(key, attach));
        Ok(Begun::Opening(id))
    }

    /// Goes on with what the admin asked for, once storage is open.
    pub(super) fn go_on(
        &mut self,
        wanted: Wanted,
        result: Result<OpenBacking, Failure>,
        now: Instant,
    ) -> Result<DiskKey, AttachError> {
        let failed = |failure: Failure| AttachError::Failed(failure.text);
        let backing = result.map_err(failed)?;
        match wanted {
            Wanted::Attach(key, attach) => {
                self.check_free(&key)?;
                self.make(key, &attach, Some(backing), now)
            }
            Wanted::Insert(key, target) => {
                let disk = self.drive(&key)?;
                disk.check_medium(&backing).map_err(failed)?;
                self.set_medium(key, &target, Some(backing), now)
            }
        }
    }

    /// Nothing is served there. A disk whose areas are gone already may still have requests in flight.
    fn check_free(&self, key: &DiskKey) -> Result<(), AttachError> {
        if self.stopping {
            return Err(AttachError::Ending);
        }
        for kind in &self.kinds {
            if let Some(disk) = self.disks.get(&DiskKey { kind: kind.clone(), ..key.clone() }) {
                let (domid, vdev) = (key.domid, key.vbd.into());
                return Err(match disk.is_leaving() {
                    true if disk.is_draining() => AttachError::Draining(domid, vdev),
                    true => AttachError::Held(domid, vdev),
                    false => AttachError::Taken(domid, vdev),
                });
            }
        }
        Ok(())
    }

    fn make(
        &mut self,
        key: DiskKey,
        attach: &Attach,
        backing: Option<OpenBacking>,
        now: Instant,
    ) -> Result<DiskKey, AttachError> {
        attach::make(&self.store, self.own, &self.kinds, &key, attach)?;
        let prepared = backing.map(|backing| (attach.target.clone(), backing));
        self.consider(&key, prepared, now)?;
        let Some(disk) = self.disks.get(&key) else { return Ok(key) };
        // What we wrote ourselves is no change: this drops the events about it.
        disk.target(&self.store)?;
        if disk.failure().is_empty() {
            return Ok(key);
        }
        disk.ask_to_close(&self.store, true)?;
        Err(AttachError::Failed(disk.failure().to_owned()))
    }

    /// Has a disk closed and destroyed; it is done once the disk is no more.
    pub fn detach(&mut self, detach: &Detach) -> Result<DiskKey, AttachError> {
        let key = self.find(detach.domid, &detach.vdev)?;
        if let Some(disk) = self.disk(&key) {
            disk.ask_to_close(&self.store, detach.force)?;
        }
        Ok(key)
    }

    /// Has a drive change its medium, for none where `target` is empty; it is done once the disk's
    /// medium is settled. A medium that can't be opened does not cost the guest the one that it has,
    /// unless it has the same one for writing, which nobody can open beside it.
    pub fn change_medium(
        &mut self,
        domid: u32,
        vdev: &str,
        target: &str,
        now: Instant,
    ) -> Result<Begun, AttachError> {
        let key = self.find(domid, vdev)?;
        let disk = self.drive(&key)?;
        if target.is_empty() || disk.writes_to_medium(target) {
            return self.set_medium(key, target, None, now).map(Begun::Disk);
        }
        let access = disk.access();
        let id = self.helpers.open(target, access, Asker::Admin, now)?;
        self.asked.insert(id, Wanted::Insert(key, target.to_owned()));
        Ok(Begun::Opening(id))
    }

    fn set_medium(
        &mut self,
        key: DiskKey,
        target: &str,
        prepared: Option<OpenBacking>,
        now: Instant,
    ) -> Result<DiskKey, AttachError> {
        self.with_disk(&key, now, |disk, around| disk.change_medium(target, prepared, around))
            .unwrap_or(Ok(()))?;
        Ok(key)
    }

    /// A disk that is a drive and in use.
    fn drive(&self, key: &DiskKey) -> Result<&Disk, AttachError> {
        let disk = self.disk(key).ok_or(AttachError::NoDisk(key.domid, key.vbd.into()))?;
        match disk.description().filter(|_| disk.backing().is_some()) {
            None if disk.machine().is_opening() => {
                Err(AttachError::Opening(key.domid, key.vbd.into()))
            }
            None => Err(AttachError::Failed(disk.failure().to_owned())),
            Some(description) if !description.is_drive() => {
                Err(AttachError::NoDrive(key.domid, key.vbd.into()))
            }
            Some(_) => Ok(disk),
        }
    }

    /// What became of something that storage was opened for; `None` where that is not known yet.
    pub fn outcome(&mut self, id: OpenId) -> Option<Result<DiskKey, AttachError>> {
        self.outcomes.remove(&id)
    }

    /// Which disk a domid and a vdev name, of whatever backend type.
    fn find(&self, domid: u32, vdev: &str) -> Result<DiskKey, AttachError> {
        let named = attach::name(&self.kinds[0], domid, vdev)?;
        let mut keys =
            self.kinds.iter().map(|kind| DiskKey { kind: kind.clone(), ..named.clone() });
        keys.find(|key| self.disks.contains_key(key))
            .ok_or(AttachError::NoDisk(named.domid, named.vbd.into()))
    }
}
