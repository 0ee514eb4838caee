//! Disks made and taken away by the admin instead of the toolstack.

use std::io;
use std::sync::Arc;

use xenstore_rs::Xs;

use super::admin::protocol::Attach;
use super::area::{self, Standing};
use super::disk::Disk;
use super::key::DiskKey;
use crate::backing::{Access, BackingError, Spec};
use crate::units::{BadNumber, DomId};
use crate::xen::keys::{self, XenbusState};
use crate::xen::vdev::{BadVdev, Vdev};
use crate::xen::{NodeAccess, Nodes, Permission, Store};

/// Why a disk is not attached or not detached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The number names no domain.
    #[error(transparent)]
    Domid(#[from] BadNumber),
    /// The name names no disk.
    #[error(transparent)]
    Vdev(#[from] BadVdev),
    /// The contents are not to be had.
    #[error(transparent)]
    Target(#[from] BackingError),
    /// There is no such guest.
    #[error("domain {0} does not exist; see `xl list`")]
    NoDomain(DomId),
    /// The guest has such a disk.
    #[error("domain {0} has a disk {1} already; detach it, or choose another vdev")]
    Taken(DomId, Vdev),
    /// The guest has no such disk.
    #[error("polldisk serves no disk {1} to domain {0}; see `polldisk list`")]
    NoDisk(DomId, Vdev),
    /// The disk is not a drive.
    #[error(
        "disk {1} of domain {0} is not a drive, and keeps its contents while it is attached; \
         attach drives with --cdrom or --removable"
    )]
    NoDrive(DomId, Vdev),
    /// Only a drive may be without contents.
    #[error("a disk needs a target; only a drive (--cdrom, --removable) may be empty")]
    NoTarget,
    /// It was made, and could not be served.
    #[error("{0}")]
    Failed(String),
    /// Xenstore failed.
    #[error("xenstore failed; see `xenstore-ls` for what is there")]
    Store(#[from] io::Error),
}

/// Which disk a domid and a vdev name.
pub fn name(kind: &Arc<str>, domid: u32, vdev: &str) -> Result<DiskKey, AttachError> {
    let domid = domid.to_string().parse::<DomId>()?;
    Ok(DiskKey { kind: kind.clone(), domid, vbd: vdev.parse::<Vdev>()?.id() })
}

/// Makes both areas of a disk as the toolstack does, in one transaction, marked as ours.
pub fn make<S: Store>(
    store: &S,
    own: DomId,
    kinds: &[Arc<str>],
    key: &DiskKey,
    attach: &Attach,
) -> Result<(), AttachError> {
    // What can't be opened is told to the admin before the guest sees anything of it.
    match attach.target.as_str() {
        "" if attach.is_drive() => {}
        "" => return Err(AttachError::NoTarget),
        target => {
            let read_only = attach.is_read_only();
            let access = Access { read_only, shareable: false, user: key.user() };
            target.parse::<Spec>()?.open(&access).map(drop)?;
        }
    }
    if !area::exists(store, &keys::domain(key.domid))? {
        return Err(AttachError::NoDomain(key.domid));
    }
    let made = store.atomically(|span| {
        let others = kinds.iter().map(|kind| keys::backend_area(own, kind, key.domid, key.vbd));
        for taken in others.chain([key.frontend_area()]) {
            if area::exists(span, &taken)? {
                return Ok(false);
            }
        }
        make_frontend(span, own, key, attach)?;
        make_backend(span, own, key, attach)?;
        Ok(true)
    })?;
    match made {
        true => Ok(()),
        false => Err(AttachError::Taken(key.domid, key.vbd.into())),
    }
}

fn device_type(attach: &Attach) -> String {
    if attach.cdrom { "cdrom" } else { "disk" }.to_owned()
}

/// Whether `disk` can have the medium `target`; the empty one is none. One of no use does not cost
/// the guest the medium that it has.
pub fn check_medium(disk: &Disk, target: &str) -> Result<(), AttachError> {
    let key = disk.key();
    let failed = |text: &str| AttachError::Failed(text.to_owned());
    match disk.description().filter(|_| disk.image().is_some()) {
        None => Err(failed(disk.failure())),
        Some(description) if !description.is_drive() => {
            Err(AttachError::NoDrive(key.domid, key.vbd.into()))
        }
        Some(_) => disk.open_medium(target).map(drop).map_err(|failure| failed(&failure.text)),
    }
}

/// Names the medium of a drive where libxl does.
pub fn set_medium<S: Store>(store: &S, own: DomId, key: &DiskKey, target: &str) -> io::Result<()> {
    area::write(store, &key.backend_area(own), &[(keys::PARAMS, target.to_owned())])
}

fn make_frontend(span: &impl Nodes, own: DomId, key: &DiskKey, attach: &Attach) -> io::Result<()> {
    let area = key.frontend_area();
    span.mkdir(&area)?;
    span.set_permissions(&area, &owned_and_read(key.domid, own))?;
    let nodes = [
        (keys::BACKEND, key.backend_area(own)),
        (keys::BACKEND_ID, own.to_string()),
        (keys::VIRTUAL_DEVICE, key.vbd.to_string()),
        (keys::DEVICE_TYPE, device_type(attach)),
        (keys::STATE, XenbusState::Initialising.number().to_string()),
    ];
    span.write_all(&area, &nodes)
}

fn make_backend(span: &impl Nodes, own: DomId, key: &DiskKey, attach: &Attach) -> io::Result<()> {
    let area = key.backend_area(own);
    span.mkdir(&area)?;
    span.set_permissions(&area, &owned_and_read(own, key.domid))?;
    let nodes = [
        (keys::FRONTEND, key.frontend_area()),
        (keys::FRONTEND_ID, key.domid.to_string()),
        (keys::PARAMS, attach.target.clone()),
        (keys::MODE, if attach.is_read_only() { "r" } else { "w" }.to_owned()),
        (keys::DEVICE_TYPE, device_type(attach)),
        (keys::DEV, attach.vdev.clone()),
        (keys::REMOVABLE, u8::from(attach.is_drive()).to_string()),
        (keys::BOOTABLE, "0".to_owned()),
        (keys::ATTACHED, "1".to_owned()),
        (keys::ONLINE, "1".to_owned()),
        (keys::STATE, XenbusState::Initialising.number().to_string()),
    ];
    span.write_all(&area, &nodes)
}

/// As libxl sets them: one end owns its area, the other may read it, nobody else anything.
fn owned_and_read(owner: DomId, reader: DomId) -> [Permission; 2] {
    [
        Permission { domid: owner, access: NodeAccess::None },
        Permission { domid: reader, access: NodeAccess::Read },
    ]
}

/// Asks for a disk to be closed and destroyed, as libxl does; with `force` without its guest.
pub fn unmake<S: Store>(store: &S, own: DomId, key: &DiskKey, force: bool) -> io::Result<()> {
    let area = key.backend_area(own);
    store.atomically(|span| {
        if force {
            area::remove(span, &key.frontend_area())?;
        }
        let Some(Standing { state, .. }) = Standing::read(span, &area)? else { return Ok(()) };
        span.write(&format!("{area}/{}", keys::ONLINE), "0")?;
        if state == XenbusState::Closed {
            return Ok(());
        }
        span.write(&format!("{area}/{}", keys::STATE), &XenbusState::Closing.number().to_string())
    })
}

/// Removes both areas of a disk that was made and could not be served.
pub fn remove(store: &impl Xs, own: DomId, key: &DiskKey) -> io::Result<()> {
    area::remove(store, &key.frontend_area())?;
    area::remove(store, &key.backend_area(own))
}
