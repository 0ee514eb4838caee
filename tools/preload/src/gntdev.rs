//! `/dev/xen/gntdev`: Linux' `drivers/xen/gntdev.c` on the stand-in's grants.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{c_int, c_ulong, c_void};
use std::io;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use polldisk::limits::GRANTS_PER_MAP_BATCH;
use polldisk::sim::Endpoint;
use polldisk::sim::grants::SimGrants;
use polldisk::units::{DomId, GrantRef};
use polldisk::xen::abi::{self, GntdevCopySegment, GntdevGrantRef};
use polldisk::xen::shm::{GuestPages, PAGE_BYTES};
use polldisk::xen::{CopyDirection, GrantCopy, Grants, PageAccess};

use crate::handles::lock;
use crate::mappings::{self, Mapping};
use crate::settings::{Settings, Toll};

/// Segments of a copy that are passed to the stand-in at a time. They are on the stack.
const SEGMENTS_PER_STEP: usize = 16;

/// An open device.
#[derive(Debug)]
pub struct Gntdev {
    grants: SimGrants,
    /// By offset for mmap. Offsets are never reused.
    rooms: BTreeMap<u64, Room>,
    next_index: u64,
    toll: Toll,
}

/// References that wait for their mmap, or are mapped.
#[derive(Debug)]
struct Room {
    domid: DomId,
    refs: Vec<GrantRef>,
    is_mapped: bool,
}

impl Gntdev {
    /// Opens a device that acts for dom0.
    pub fn open(settings: &Settings) -> io::Result<Gntdev> {
        let grants = SimGrants::open(&Endpoint::at(&settings.folder), DomId::DOM0)?;
        Ok(Gntdev { grants, rooms: BTreeMap::new(), next_index: 0, toll: settings.toll })
    }

    /// # Safety
    /// `argument` must be what the ioctl `number` takes.
    pub unsafe fn ioctl(&mut self, number: c_ulong, argument: *mut c_void) -> io::Result<()> {
        // SAFETY: the caller promises the structure that the number asks for.
        unsafe {
            match number {
                abi::IOCTL_GNTDEV_MAP_GRANT_REF => self.reserve(argument.cast()),
                abi::IOCTL_GNTDEV_UNMAP_GRANT_REF => {
                    let room = argument.cast::<abi::GntdevUnmapGrantRef>().read();
                    self.give_back(room.index, room.count)
                }
                abi::IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR => {
                    let place = argument.cast::<abi::GntdevGetOffsetForVaddr>();
                    *place = locate(place.read())?;
                    Ok(())
                }
                abi::IOCTL_GNTDEV_SET_MAX_GRANTS => Ok(()),
                abi::IOCTL_GNTDEV_GRANT_COPY => {
                    let copy = argument.cast::<abi::GntdevGrantCopy>().read();
                    self.copy(copy.segments, copy.count as usize)
                }
                _ => Err(errno(libc::ENOTTY)),
            }
        }
    }

    /// Makes room for a batch of one domain's references.
    ///
    /// # Safety
    /// `request` must be a `struct ioctl_gntdev_map_grant_ref` with as many references as it says.
    unsafe fn reserve(&mut self, request: *mut abi::GntdevMapGrantRef) -> io::Result<()> {
        // SAFETY: the structure's fixed part is there, followed by the references. The array is accessed
        // by its address, since it may be shorter than in the type.
        let refs = unsafe {
            let count = (&raw const (*request).count).read() as usize;
            if count == 0 || count > GRANTS_PER_MAP_BATCH {
                return Err(errno(libc::EINVAL));
            }
            let first = (&raw const (*request).refs).cast::<GntdevGrantRef>();
            std::slice::from_raw_parts(first, count)
        };
        let index = self.take_in(refs)?;
        // SAFETY: as above.
        unsafe { (&raw mut (*request).index).write(index) };
        Ok(())
    }

    fn take_in(&mut self, refs: &[GntdevGrantRef]) -> io::Result<u64> {
        let domid = refs.first().map_or(0, |first| first.domid);
        if refs.iter().any(|one| one.domid != domid) {
            return Err(errno(libc::EINVAL));
        }
        let domid = DomId::try_from(domid).map_err(|_| errno(libc::EINVAL))?;
        let index = self.next_index;
        self.next_index += (refs.len() * PAGE_BYTES) as u64;
        let refs = refs.iter().map(|one| GrantRef(one.gref)).collect();
        self.rooms.insert(index, Room { domid, refs, is_mapped: false });
        Ok(index)
    }

    /// Gives room back. Pages that are mapped stay mapped until munmap.
    fn give_back(&mut self, index: u64, count: u32) -> io::Result<()> {
        match self.rooms.get(&index) {
            Some(room) if room.refs.len() == count as usize => {
                self.rooms.remove(&index);
                Ok(())
            }
            _ => Err(errno(libc::ENOENT)),
        }
    }

    /// Maps what was reserved at an offset.
    fn map(&mut self, request: &MapRequest) -> io::Result<GuestPages> {
        let room = self.rooms.get_mut(&request.index).ok_or_else(|| errno(libc::EINVAL))?;
        let whole = request.len.next_multiple_of(PAGE_BYTES) == room.refs.len() * PAGE_BYTES;
        let shared = request.flags & libc::MAP_TYPE != libc::MAP_PRIVATE;
        let writable = request.protection & libc::PROT_WRITE != 0;
        let elsewhere = request.flags & libc::MAP_FIXED == 0;
        if !whole || room.is_mapped || (writable && !shared) || !elsewhere {
            return Err(errno(libc::EINVAL));
        }
        let access = if writable { PageAccess::ReadWrite } else { PageAccess::ReadOnly };
        let pages = self.grants.map(room.domid, &room.refs, access)?;
        room.is_mapped = true;
        Ok(pages)
    }

    /// Ends a mapping.
    fn unmap(&mut self, base: NonNull<u8>, mapping: &Mapping) -> io::Result<()> {
        if let Some(room) = self.rooms.get_mut(&mapping.index) {
            room.is_mapped = false;
        }
        // SAFETY: the parts are from `mmap`, and only the mapping's owner ends it, once.
        let pages = unsafe { GuestPages::from_raw(base, mapping.count, mapping.cookie) };
        self.grants.unmap(pages)
    }

    /// Copies segments. If one is malformed, that is an error, and those before it are copied, as in the
    /// kernel.
    ///
    /// # Safety
    /// `segments` must be `count` of them, and their local sides valid for their lengths.
    unsafe fn copy(&mut self, segments: *mut GntdevCopySegment, count: usize) -> io::Result<()> {
        self.toll.pay();
        if count == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        let segments = unsafe { std::slice::from_raw_parts_mut(segments, count) };
        let mut step = [UNUSED; SEGMENTS_PER_STEP];
        let of_one_domain = segments.chunk_by_mut(|a, b| foreign(a).domid == foreign(b).domid);
        for segments in of_one_domain.flat_map(|run| run.chunks_mut(SEGMENTS_PER_STEP)) {
            let step = &mut step[..segments.len()];
            for (place, segment) in step.iter_mut().zip(&*segments) {
                *place = to_stand_in(segment)?;
            }
            let domid = segments.first().map_or(0, |first| foreign(first).domid);
            match DomId::try_from(u32::from(domid)) {
                Ok(domid) => self.grants.copy(domid, step)?,
                Err(_) => step.iter_mut().for_each(|one| one.status = abi::GNTST_BAD_DOMAIN),
            }
            for (segment, done) in segments.iter_mut().zip(step) {
                segment.status = done.status;
            }
        }
        Ok(())
    }
}

/// What an mmap of the device asks for.
#[derive(Clone, Copy, Debug)]
pub struct MapRequest {
    /// Bytes.
    pub len: usize,
    /// `PROT_*`.
    pub protection: c_int,
    /// `MAP_*`.
    pub flags: c_int,
    /// The offset in the device.
    pub index: u64,
}

/// mmap of the device; returns the address.
pub fn mmap(device: &Arc<Mutex<Gntdev>>, request: &MapRequest) -> io::Result<*mut c_void> {
    let pages = lock(device).map(request)?;
    let base = pages.base().as_ptr();
    let mapping = Mapping {
        count: pages.count(),
        index: request.index,
        cookie: pages.cookie(),
        device: Arc::clone(device),
    };
    mappings::insert(base.expose_provenance(), mapping);
    Ok(base.cast())
}

/// munmap; `false` if the range holds no granted pages.
pub fn munmap(place: *mut c_void, len: usize) -> io::Result<bool> {
    let Some(mapping) = mappings::remove(place.addr(), len)? else { return Ok(false) };
    let base = NonNull::new(place.cast()).ok_or_else(|| errno(libc::EINVAL))?;
    lock(&mapping.device).unmap(base, &mapping)?;
    Ok(true)
}

fn locate(asked: abi::GntdevGetOffsetForVaddr) -> io::Result<abi::GntdevGetOffsetForVaddr> {
    let address = usize::try_from(asked.vaddr).map_err(io::Error::other)?;
    let (_, mapping) = mappings::find(address).ok_or_else(|| errno(libc::EINVAL))?;
    let count = u32::try_from(mapping.count).map_err(io::Error::other)?;
    Ok(abi::GntdevGetOffsetForVaddr { offset: mapping.index, count, ..asked })
}

const UNUSED: GrantCopy = GrantCopy {
    gref: GrantRef(0),
    offset: 0,
    len: 0,
    local: std::ptr::null_mut(),
    direction: CopyDirection::FromGuest,
    status: abi::GNTST_OKAY,
};

/// The granted side. If neither side is granted, this is what the source holds.
fn foreign(segment: &GntdevCopySegment) -> abi::GntdevForeign {
    let side =
        if segment.flags & abi::GNTCOPY_DEST_GREF != 0 { segment.dest } else { segment.source };
    // SAFETY: any eight bytes are a valid value.
    unsafe { side.foreign }
}

/// Refuses a segment without a granted side, as the kernel does, and also one with two granted sides.
fn to_stand_in(segment: &GntdevCopySegment) -> io::Result<GrantCopy> {
    let (local, direction) = match segment.flags {
        abi::GNTCOPY_SOURCE_GREF => (segment.dest, CopyDirection::FromGuest),
        abi::GNTCOPY_DEST_GREF => (segment.source, CopyDirection::ToGuest),
        _ => return Err(errno(libc::EINVAL)),
    };
    let foreign = foreign(segment);
    if usize::from(foreign.offset) + usize::from(segment.len) > PAGE_BYTES {
        return Err(errno(libc::EINVAL));
    }
    Ok(GrantCopy {
        gref: GrantRef(foreign.gref),
        offset: foreign.offset,
        len: segment.len,
        // SAFETY: the flags say that this side is local.
        local: unsafe { local.local },
        direction,
        status: abi::GNTST_GENERAL_ERROR,
    })
}

fn errno(errno: c_int) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

#[cfg(test)]
mod test {
    use std::fs::File;
    use std::os::fd::FromRawFd;

    use polldisk::sim::StandIn;
    use polldisk::xen::abi::{GntdevCopySide, GntdevForeign};
    use polldisk::xen::linux::gntdev::Gntdev as LinuxGntdev;

    use super::*;
    use crate::handles::{self, Device};

    /// A device, and polldisk's own user of it: the functions of this library take the place of the C
    /// library's in this program, too.
    fn opened(stand_in: &StandIn) -> (Arc<Mutex<Gntdev>>, LinuxGntdev) {
        let settings = Settings { folder: stand_in.folder().to_owned(), toll: Toll::None };
        let device = Arc::new(Mutex::new(Gntdev::open(&settings).unwrap()));
        let fd = File::open("/dev/null").unwrap().into();
        let fd = handles::insert(Device::Gntdev { fd, device: Arc::clone(&device) }).unwrap();
        // SAFETY: opened just now, and closed by nobody else.
        (device, LinuxGntdev::new(unsafe { File::from_raw_fd(fd) }))
    }

    #[test]
    fn polldisk_gives_all_room_back_that_it_took() {
        let _alone = lock(&mappings::TESTS);
        let stand_in = StandIn::start_temporary().unwrap();
        let domid = DomId::try_from(5).unwrap();
        let guest = stand_in.create_domain(domid, 4).unwrap();
        let page = guest.alloc_pages(1).unwrap();
        let good = [(); 2].map(|()| guest.grant(page, DomId::DOM0, PageAccess::ReadWrite).unwrap());
        let bad = guest.reserve_refs(1).unwrap()[0];
        let (device, mut grants) = opened(&stand_in);
        let rooms = || lock(&device).rooms.len();

        let mapped = good.map(|gref| grants.map(domid, &[gref], PageAccess::ReadWrite).unwrap());
        assert_eq!((rooms(), guest.mapped_grants()), (2, 2));
        let refused = grants.map(domid, &[good[0], bad], PageAccess::ReadWrite).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "of the mmap, whose room it had");
        assert_eq!((rooms(), guest.mapped_grants()), (2, 2));
        let [first, _kept] = mapped;
        grants.unmap(first).unwrap();
        assert_eq!((rooms(), guest.mapped_grants()), (1, 1));
        drop(grants);
        assert_eq!(guest.mapped_grants(), 0, "what is left mapped goes with the device");
    }

    #[test]
    fn polldisk_maps_what_it_may_only_read_and_copies_all_that_it_may() {
        let _alone = lock(&mappings::TESTS);
        let stand_in = StandIn::start_temporary().unwrap();
        let domid = DomId::try_from(5).unwrap();
        let guest = stand_in.create_domain(domid, 4).unwrap();
        let page = guest.alloc_pages(1).unwrap();
        guest.page(page).copy_from(&[7; PAGE_BYTES]);
        let readable = guest.grant(page, DomId::DOM0, PageAccess::ReadOnly).unwrap();
        let (_device, mut grants) = opened(&stand_in);

        grants.map(domid, &[readable], PageAccess::ReadWrite).unwrap_err();
        let pages = grants.map(domid, &[readable], PageAccess::ReadOnly).unwrap();
        let mut data = [0; 16];
        pages.page(0).part(512, 16).unwrap().copy_to(&mut data);
        assert_eq!(data, [7; 16]);

        let mut local = [[0; 16]; 3];
        let mut copies = local.each_mut().map(|local| GrantCopy {
            gref: readable,
            offset: 8,
            len: 16,
            local: local.as_mut_ptr(),
            direction: CopyDirection::FromGuest,
            status: abi::GNTST_OKAY,
        });
        copies[0].direction = CopyDirection::ToGuest;
        copies[1].gref = GrantRef(u32::MAX);
        grants.copy(domid, &mut copies).unwrap();
        assert_eq!(copies.map(|copy| copy.status == abi::GNTST_OKAY), [false, false, true]);
        assert_eq!(local, [[0; 16], [0; 16], [7; 16]]);
    }

    fn segment(flags: u16, offset: u16, len: u16) -> GntdevCopySegment {
        let foreign = GntdevCopySide { foreign: GntdevForeign { gref: 77, offset, domid: 5 } };
        let local = GntdevCopySide { local: std::ptr::without_provenance_mut(0x1000) };
        let (source, dest) =
            if flags & abi::GNTCOPY_DEST_GREF != 0 { (local, foreign) } else { (foreign, local) };
        GntdevCopySegment { source, dest, len, flags, status: 0 }
    }

    #[test]
    fn the_flags_of_a_copy_say_which_side_is_granted() {
        for (flags, direction) in [
            (abi::GNTCOPY_SOURCE_GREF, CopyDirection::FromGuest),
            (abi::GNTCOPY_DEST_GREF, CopyDirection::ToGuest),
        ] {
            let segment = segment(flags, 8, 4088);
            let copy = to_stand_in(&segment).unwrap();
            assert_eq!((copy.gref, copy.offset, copy.len), (GrantRef(77), 8, 4088));
            assert_eq!((copy.direction, copy.local.addr()), (direction, 0x1000));
            assert_eq!(foreign(&segment).domid, 5);
        }
    }

    #[test]
    fn malformed_copies_are_refused() {
        let both = abi::GNTCOPY_SOURCE_GREF | abi::GNTCOPY_DEST_GREF;
        for segment in [segment(0, 0, 1), segment(both, 0, 1), segment(1, 8, 4089)] {
            assert_eq!(to_stand_in(&segment).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
    }
}
