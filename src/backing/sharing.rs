//! The check before a disk may use storage: no conflicting use by another disk of this process, another
//! program, a mounted filesystem or a device built on it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::claims::{Claim, Reason, Refusal, Usage};
use super::device;
use super::holders::{self, Holder};
use super::locks::{self, LockError};
use super::storage::{Located, Loop, Storage};
use crate::limits::HOLDER_MILLISECONDS;

/// Why a disk may not use storage.
#[derive(Debug)]
pub enum SharingError {
    /// Somebody uses it.
    InUse {
        /// Who uses it, and how.
        what: String,
        /// How to free it.
        remedy: String,
    },
    /// It can't be opened at all.
    Open(io::Error),
}

/// Claims storage for a disk, after all checks that are possible without opening it.
pub fn claim(located: &Located, usage: Usage, user: &str) -> Result<Claim, SharingError> {
    let storages = located.storages();
    let claim = Claim::make(storages, usage, user).map_err(refused)?;
    for (depth, storage) in claim.storages().iter().enumerate() {
        match *storage {
            // Nothing shows how others use a shared device; the admin has declared it safe.
            Storage::Device { .. } if usage.shareable => {}
            Storage::Device { number, .. } => {
                exclude(&claim, *storage, usage, |options| match depth {
                    0 => located.open(options),
                    _ => options.open(device::node(number).ok_or(io::ErrorKind::NotFound)?),
                })?
            }
            Storage::File { .. } => {
                refuse_swap(*storage)?;
                if !usage.shareable {
                    refuse_loops(&claim, *storage, usage)?;
                }
            }
        }
    }
    lock_below(&claim, usage)?;
    Ok(claim)
}

/// Locks the open file of a claim, unless another disk of this process has done so. Returns a warning if
/// its filesystem does not support locks.
pub fn lock(claim: &Claim, file: &Arc<File>, usage: Usage) -> Result<Option<String>, SharingError> {
    let [storage @ Storage::File { .. }, ..] = *claim.storages() else { return Ok(None) };
    let held = claim.hold(storage, || Ok(file.clone())).map_err(SharingError::Open)?;
    match lock_patiently(&held, usage) {
        Ok(()) => Ok(None),
        Err(LockError::Taken) => Err(locked(storage)),
        Err(LockError::Unsupported(error)) => Ok(Some(format!(
            "its filesystem does not support locks ({error}), so nothing keeps other programs and hosts \
             from using it at the same time"
        ))),
    }
}

/// Locks the file under the loop devices that were claimed, if there is one and it can be found.
fn lock_below(claim: &Claim, usage: Usage) -> Result<(), SharingError> {
    let [.., Storage::Device { disk, .. }, file @ Storage::File { .. }] = *claim.storages() else {
        return Ok(());
    };
    let open = || {
        let file = Loop::of_device(disk).and_then(|device| device.open_file());
        file.map(Arc::new).ok_or(io::ErrorKind::NotFound.into())
    };
    match claim.hold(file, open).map(|open| lock_patiently(&open, usage)) {
        Ok(Err(LockError::Taken)) => Err(locked(file)),
        _ => Ok(()),
    }
}

/// Keeps a device for this process: after that the kernel refuses it to others that want to mount it, build
/// a device on it, or open it or a partition of it exclusively.
fn exclude(
    claim: &Claim,
    device: Storage,
    usage: Usage,
    open: impl Fn(&OpenOptions) -> io::Result<File>,
) -> Result<(), SharingError> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC);
    let is_busy = |error: &io::Error| error.raw_os_error() == Some(libc::EBUSY);
    let own = patiently(
        || claim.hold(device, || open(&options).map(Arc::new)),
        |own| own.as_ref().is_err_and(is_busy),
    );
    match own {
        Ok(_) => Ok(()),
        Err(error) if is_busy(&error) => {
            let holders = holders::of_device(device);
            let only_read = !holders.is_empty() && holders.iter().all(Holder::only_reads);
            if !usage.writes && (only_read || claim.is_divided()) {
                return Ok(());
            }
            let writer = holders.iter().find(|holder| !holder.only_reads()).or(holders.first());
            Err(writer.map_or_else(in_use_by_somebody, |holder| in_use_by(holder, usage)))
        }
        Err(error) => Err(SharingError::Open(error)),
    }
}

fn lock_patiently(file: &File, usage: Usage) -> Result<(), LockError> {
    patiently(|| locks::lock(file, usage), |locked| matches!(locked, Err(LockError::Taken)))
}

/// Retries for a while, as long as somebody else has it.
fn patiently<T>(mut attempt: impl FnMut() -> T, is_taken: impl Fn(&T) -> bool) -> T {
    let deadline = Instant::now() + Duration::from_millis(HOLDER_MILLISECONDS);
    loop {
        let outcome = attempt();
        if !is_taken(&outcome) || Instant::now() >= deadline {
            return outcome;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn refuse_swap(file: Storage) -> Result<(), SharingError> {
    match holders::swap_in_file(file) {
        None => Ok(()),
        Some(swap) => Err(SharingError::InUse {
            what: format!("it {swap} of this host"),
            remedy: swap.remedy(),
        }),
    }
}

fn refuse_loops(claim: &Claim, file: Storage, usage: Usage) -> Result<(), SharingError> {
    let loops = holders::loops_over(file, claim.storages());
    match loops.iter().find(|device| usage.writes || !device.only_reads()) {
        None => Ok(()),
        Some(device) => Err(in_use_by(device, usage)),
    }
}

fn refused(Refusal { user, reason }: Refusal) -> SharingError {
    let user = if user.is_empty() { "another disk" } else { &user };
    let (what, remedy) = match reason {
        Reason::Used => (
            format!("{user} uses it"),
            "detach that disk first; disks can share an image only if all only read it, or if all of them \
             call it shareable, for cluster filesystems",
        ),
        Reason::Emulation => (
            format!("{user} shares it, and only one of the two has emulate-512"),
            "give emulate-512 to all disks that share it, or to none",
        ),
        Reason::Opening => {
            (format!("{user} is still opening it"), "try again; if this goes on, its storage hangs")
        }
        Reason::Closing => {
            (format!("{user} is still closing it"), "try again; if this goes on, its storage hangs")
        }
    };
    SharingError::InUse { what, remedy: remedy.to_owned() }
}

fn in_use_by(holder: &Holder, usage: Usage) -> SharingError {
    let mut remedy = holder.remedy();
    if usage.writes && holder.only_reads() {
        remedy.push_str(", or attach the disk read-only (mode r)");
    }
    SharingError::InUse { what: format!("it {holder}"), remedy }
}

fn in_use_by_somebody() -> SharingError {
    SharingError::InUse {
        what: "somebody else holds it exclusively".to_owned(),
        remedy: "unmount or release it first".to_owned(),
    }
}

fn locked(file: Storage) -> SharingError {
    match holders::of_file(file).first() {
        Some(holder) => SharingError::InUse {
            what: format!("it {holder}, which has locked it"),
            remedy: holder.remedy(),
        },
        None => SharingError::InUse {
            what: "another program has locked it, maybe on another host".to_owned(),
            remedy: "end that program, or detach the disk from it".to_owned(),
        },
    }
}
