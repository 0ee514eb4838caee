//! Grants of the stand-in: what an entry permits, and [`SimGrants`], the backend's side.
//!
//! A mapping is a request to the hypervisor (it counts who uses which grant) and an mmap of the
//! guest's file. A copy is neither: the whole guest is mapped here once, the entry is checked with
//! one atomic load, and bytes are moved.
//!
//! Faults, ordered by the guest ([`super::domain::Domain::fail_maps`] and its like) and kept beside
//! its grant table, so that they work across processes and hit the same request every time.

use std::collections::hash_map::Entry as Slot;
use std::io;
use std::sync::atomic::Ordering;

use rustc_hash::FxHashMap;

use super::connection::{Connection, Endpoint};
use super::memory::{self, Gfn, GuestMemory, MappedRange};
use super::wire::Request;
use crate::limits::GRANTS_PER_MAP_BATCH;
use crate::units::{DomId, GrantRef};
use crate::xen::abi::{self, GrantEntryV1};
use crate::xen::shm::{GuestPages, PAGE_BYTES};
use crate::xen::{CopyDirection, GrantCopy, Grants, PageAccess};

/// The page that an entry lets `by` use, or the `GNTST_*` that Xen answers.
pub fn permitted(entry: GrantEntryV1, by: DomId, access: PageAccess) -> Result<Gfn, i16> {
    let permits = entry.flags & abi::GTF_TYPE_MASK == abi::GTF_PERMIT_ACCESS;
    let too_much = access == PageAccess::ReadWrite && entry.flags & abi::GTF_READONLY != 0;
    if !permits || entry.domid != by.raw() || too_much {
        return Err(abi::GNTST_GENERAL_ERROR);
    }
    Ok(Gfn(entry.frame))
}

/// What a guest ordered to fail: two `GNTST_*` codes, negated, in one byte.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// What mapping the reference answers; `GNTST_okay`: no fault.
    pub map: i16,
    /// What copying answers.
    pub copy: i16,
}

impl Faults {
    /// The byte beside the grant table.
    pub fn to_byte(self) -> u8 {
        let nibble = |status: i16| {
            assert!((abi::GNTST_NO_SPACE..=abi::GNTST_OKAY).contains(&status));
            status.unsigned_abs().to_le_bytes()[0]
        };
        nibble(self.map) | nibble(self.copy) << 4
    }

    /// The faults that a byte orders.
    pub fn from_byte(byte: u8) -> Faults {
        Faults { map: -i16::from(byte & 0xf), copy: -i16::from(byte >> 4) }
    }
}

/// Mappings and copies of one thread.
#[derive(Debug)]
pub struct SimGrants {
    domid: DomId,
    mappings: FxHashMap<u32, MappedRange>,
    guests: FxHashMap<DomId, GuestMemory>,
    connection: Connection,
}

impl SimGrants {
    /// Opens a handle that acts for `domid`.
    pub fn open(endpoint: &Endpoint, domid: DomId) -> io::Result<SimGrants> {
        let connection = endpoint.attach(domid)?;
        let (mappings, guests) = Default::default();
        Ok(SimGrants { domid, mappings, guests, connection })
    }
}

impl Grants for SimGrants {
    fn map(
        &mut self,
        domid: DomId,
        refs: &[GrantRef],
        access: PageAccess,
    ) -> io::Result<GuestPages> {
        // The bound of gntdev's implementation, so that what works here works there.
        if refs.len() > GRANTS_PER_MAP_BATCH {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let guest = guest(&mut self.guests, &mut self.connection, domid)?;
        let refs: Vec<u32> = refs.iter().map(|gref| gref.0).collect();
        let (words, _) = self.connection.call(Request::Map { domid, access, refs: &refs })?;
        let [mapping, frames @ ..] = words else { return Err(io::ErrorKind::InvalidData.into()) };
        let mapping = *mapping;
        // A guest that was destroyed and created again meanwhile has other memory than this.
        let range = if guest.is_alive() && frames.len() == refs.len() {
            guest.map_frames(frames, access)
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        };
        match range {
            Ok(range) => {
                let pages = range.pages(u64::from(mapping));
                self.mappings.insert(mapping, range);
                Ok(pages)
            }
            Err(error) => {
                self.connection.call(Request::Unmap { mapping })?;
                Err(error)
            }
        }
    }

    fn unmap(&mut self, pages: GuestPages) -> io::Result<()> {
        let mapping = u32::try_from(pages.cookie()).map_err(io::Error::other)?;
        self.mappings.remove(&mapping).ok_or(io::ErrorKind::InvalidInput)?;
        self.guests.retain(|_, guest| guest.is_alive());
        self.connection.call(Request::Unmap { mapping })?;
        Ok(())
    }

    fn copy(&mut self, domid: DomId, segments: &mut [GrantCopy]) -> io::Result<()> {
        let guest = match guest(&mut self.guests, &mut self.connection, domid) {
            Ok(guest) => guest,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                segments.iter_mut().for_each(|segment| segment.status = abi::GNTST_BAD_DOMAIN);
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for segment in segments {
            segment.status = match copy(guest, self.domid, segment) {
                Ok(()) => abi::GNTST_OKAY,
                Err(status) => status,
            };
        }
        Ok(())
    }
}

/// A guest's memory, mapped as a whole: the mapping that there is, if the guest still lives.
fn guest<'a>(
    guests: &'a mut FxHashMap<DomId, GuestMemory>,
    connection: &mut Connection,
    domid: DomId,
) -> io::Result<&'a GuestMemory> {
    match guests.entry(domid) {
        Slot::Occupied(known) if known.get().is_alive() => Ok(known.into_mut()),
        slot => {
            let (_, mut fds) = connection.call(Request::Memory { domid })?;
            let memory = GuestMemory::open(fds.pop().ok_or(io::ErrorKind::InvalidData)?)?;
            Ok(slot.insert_entry(memory).into_mut())
        }
    }
}

fn copy(guest: &GuestMemory, by: DomId, segment: &GrantCopy) -> Result<(), i16> {
    if usize::from(segment.offset) + usize::from(segment.len) > PAGE_BYTES {
        return Err(abi::GNTST_BAD_COPY_ARG);
    }
    let (Some(entry), Some(fault)) = (guest.entry(segment.gref), guest.fault(segment.gref)) else {
        return Err(abi::GNTST_BAD_GNTREF);
    };
    match Faults::from_byte(fault.load(Ordering::Relaxed)).copy {
        abi::GNTST_OKAY => {}
        status => return Err(status),
    }
    let access = match segment.direction {
        CopyDirection::FromGuest => PageAccess::ReadOnly,
        CopyDirection::ToGuest => PageAccess::ReadWrite,
    };
    let entry = GrantEntryV1::from_word(entry.load(Ordering::Acquire));
    let page = guest.page(permitted(entry, by, access)?).ok_or(abi::GNTST_BAD_PAGE)?;
    memory::copy_segment(segment, page);
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;

    const READ_WRITE: GrantEntryV1 =
        GrantEntryV1 { flags: abi::GTF_PERMIT_ACCESS, domid: 3, frame: 9 };

    fn domid(raw: u32) -> DomId {
        DomId::try_from(raw).unwrap()
    }

    #[test]
    fn an_entry_permits_only_its_domain() {
        assert_eq!(permitted(READ_WRITE, domid(3), PageAccess::ReadWrite), Ok(Gfn(9)));
        assert_eq!(
            permitted(READ_WRITE, domid(4), PageAccess::ReadOnly),
            Err(abi::GNTST_GENERAL_ERROR)
        );
    }

    #[test]
    fn a_read_only_entry_permits_no_writing() {
        let entry = GrantEntryV1 { flags: READ_WRITE.flags | abi::GTF_READONLY, ..READ_WRITE };
        assert_eq!(permitted(entry, domid(3), PageAccess::ReadOnly), Ok(Gfn(9)));
        assert!(permitted(entry, domid(3), PageAccess::ReadWrite).is_err());
    }

    #[test]
    fn an_entry_of_another_type_permits_nothing() {
        for flags in [0, 2, 3] {
            let entry = GrantEntryV1 { flags, ..READ_WRITE };
            assert!(permitted(entry, domid(3), PageAccess::ReadOnly).is_err());
        }
    }

    #[test]
    fn faults_survive_their_byte() {
        let faults = Faults { map: abi::GNTST_BAD_GNTREF, copy: abi::GNTST_NO_SPACE };
        assert_eq!(Faults::from_byte(faults.to_byte()), faults);
        assert_eq!(Faults::from_byte(0), Faults::default());
    }
}
