//! Requests of the admin: to make or remove a disk, or to change a medium.
//!
//! Storage is opened first, and only once: the disk gets what was opened here.

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

/// A request of the admin whose storage is being opened.
#[derive(Debug)]
pub enum Wanted {
    /// A disk to make.
    Attach(DiskKey, Attach),
    /// A medium to insert into the drive.
    Insert(DiskKey, String),
}

/// A request of the admin that was begun.
#[derive(Debug)]
pub enum Begun {
    /// Storage is being opened; [`Registry::outcome`] will have the result.
    Opening(OpenId),
    /// The disk now does the rest by itself.
    Disk(DiskKey),
}

impl<S: Store> Registry<S> {
    /// Begins to make a disk for a running guest. Its storage is opened first, so that the guest never sees
    /// a disk that can't be opened.
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

    /// Continues a request of the admin once storage is open.
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

    /// Checks that no such disk is served. Even one whose areas are gone may still have requests in flight.
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
        // This drops the events about the nodes just written, which are no change.
        disk.target(&self.store)?;
        if disk.failure().is_empty() {
            return Ok(key);
        }
        disk.ask_to_close(&self.store, true)?;
        Err(AttachError::Failed(disk.failure().to_owned()))
    }

    /// Begins to close and destroy a disk; done once the disk no longer exists.
    pub fn detach(&mut self, detach: &Detach) -> Result<DiskKey, AttachError> {
        let key = self.find(detach.domid, &detach.vdev)?;
        if let Some(disk) = self.disk(&key) {
            disk.ask_to_close(&self.store, detach.force)?;
        }
        Ok(key)
    }

    /// Begins to change a drive's medium, to none if `target` is empty; done once the disk's medium is
    /// settled. If the new medium can't be opened, the guest keeps the old one. The exception is the same
    /// medium again when the guest can write to it, because it can't be opened twice.
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

    /// The disk with this key, if it is a drive and open.
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

    /// The result of a request that storage was opened for; `None` if there is none yet.
    pub fn outcome(&mut self, id: OpenId) -> Option<Result<DiskKey, AttachError>> {
        self.outcomes.remove(&id)
    }

    /// The disk with this domid and vdev, of any backend type.
    fn find(&self, domid: u32, vdev: &str) -> Result<DiskKey, AttachError> {
        let named = attach::name(&self.kinds[0], domid, vdev)?;
        let mut keys =
            self.kinds.iter().map(|kind| DiskKey { kind: kind.clone(), ..named.clone() });
        keys.find(|key| self.disks.contains_key(key))
            .ok_or(AttachError::NoDisk(named.domid, named.vbd.into()))
    }
}
