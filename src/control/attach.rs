//! Disks that the admin makes and removes instead of the toolstack.

use std::io;
use std::sync::Arc;

use xenstore_rs::Xs;

use super::admin::protocol::Attach;
use super::area;
use super::key::DiskKey;
use crate::backing::BackingError;
use crate::units::{BadNumber, DomId};
use crate::xen::keys::{self, XenbusState};
use crate::xen::vdev::{BadVdev, Vdev};
use crate::xen::{NodeAccess, Nodes, Permission, Store};

/// Why a request of the admin failed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The number is not a valid domid.
    #[error(transparent)]
    Domid(#[from] BadNumber),
    /// The name is not a valid disk name.
    #[error(transparent)]
    Vdev(#[from] BadVdev),
    /// The contents can't be opened.
    #[error(transparent)]
    Target(#[from] BackingError),
    /// There is no such guest.
    #[error("domain {0} does not exist; see `xl list`")]
    NoDomain(DomId),
    /// The guest already has such a disk.
    #[error("domain {0} already has a disk {1}; detach it, or choose another vdev")]
    Taken(DomId, Vdev),
    /// The guest had such a disk, whose requests storage has not answered yet.
    #[error(
        "the previous disk {1} of domain {0} still has requests in flight; attach it again when \
         `polldisk list` no longer shows it, or choose another vdev"
    )]
    Draining(DomId, Vdev),
    /// The guest's previous disk is being removed, but the guest has not let go of it yet.
    #[error(
        "domain {0} has not let go of its previous disk {1}; unmount it in the guest, or remove \
         it with `polldisk detach --domid {0} --vdev {1} --force`, and then attach it again"
    )]
    Held(DomId, Vdev),
    /// Its storage is still being opened.
    #[error("disk {1} of domain {0} is still being opened; try again when that is done")]
    Opening(DomId, Vdev),
    /// The daemon is ending.
    #[error("polldisk is ending; start it again first")]
    Ending,
    /// The guest has no such disk.
    #[error("polldisk serves no disk {1} to domain {0}; see `polldisk list`")]
    NoDisk(DomId, Vdev),
    /// The disk is not a drive.
    #[error(
        "disk {1} of domain {0} is not a drive, so its contents can't change while it is attached; \
         attach drives with --cdrom or --removable"
    )]
    NoDrive(DomId, Vdev),
    /// Only a drive may be empty.
    #[error("a disk needs a target; only a drive (--cdrom, --removable) may be empty")]
    NoTarget,
    /// It was made, but could not be served.
    #[error("{0}")]
    Failed(String),
    /// Xenstore failed.
    #[error("xenstore failed; see `xenstore-ls` for what is there")]
    Store(#[from] io::Error),
}

/// The key of the disk with this domid and vdev.
pub fn name(kind: &Arc<str>, domid: u32, vdev: &str) -> Result<DiskKey, AttachError> {
    let domid = domid.to_string().parse::<DomId>()?;
    Ok(DiskKey { kind: kind.clone(), domid, vbd: vdev.parse::<Vdev>()?.id() })
}

/// Checks a new disk before its storage is opened.
pub fn check(store: &impl Xs, key: &DiskKey, attach: &Attach) -> Result<(), AttachError> {
    if attach.target.is_empty() && !attach.is_drive() {
        return Err(AttachError::NoTarget);
    }
    match area::exists(store, &keys::domain(key.domid))? {
        true => Ok(()),
        false => Err(AttachError::NoDomain(key.domid)),
    }
}

/// Makes both areas of a disk as the toolstack does, in one transaction, marked as made by polldisk. Fails,
/// and makes nothing, if either area exists already or the guest does not.
pub fn make<S: Store>(
    store: &S,
    own: DomId,
    kinds: &[Arc<str>],
    key: &DiskKey,
    attach: &Attach,
) -> Result<(), AttachError> {
    let refusal = store.atomically(|span| {
        if !area::exists(span, &keys::domain(key.domid))? {
            return Ok(Some(AttachError::NoDomain(key.domid)));
        }
        let others = kinds.iter().map(|kind| keys::backend_area(own, kind, key.domid, key.vbd));
        for taken in others.chain([key.frontend_area()]) {
            if area::exists(span, &taken)? {
                return Ok(Some(AttachError::Taken(key.domid, key.vbd.into())));
            }
        }
        make_frontend(span, own, key, attach)?;
        make_backend(span, own, key, attach)?;
        Ok(None)
    })?;
    refusal.map_or(Ok(()), Err)
}

fn device_type(attach: &Attach) -> String {
    if attach.cdrom { "cdrom" } else { "disk" }.to_owned()
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

/// Permissions as libxl sets them: one end owns its area, the other may read it, others have no access.
fn owned_and_read(owner: DomId, reader: DomId) -> [Permission; 2] {
    [
        Permission { domid: owner, access: NodeAccess::None },
        Permission { domid: reader, access: NodeAccess::Read },
    ]
}
