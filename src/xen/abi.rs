//! Structures shared with Xen and the kernel's Xen devices, byte for byte.
//!
//! Every layout is asserted at compile time. A variable array at the end of a structure has as many elements
//! here as [`limits`] allows in one call.

use crate::limits;

/// The number of an ioctl; none of the ioctls here has a direction (`_IOC_NONE`).
const fn ioctl(kind: u8, number: u8, size: usize) -> libc::Ioctl {
    assert!(size < 1 << 14);
    ((size as libc::Ioctl) << 16) | ((kind as libc::Ioctl) << 8) | number as libc::Ioctl
}

/// Asserts the size of a structure and the offsets of its fields.
macro_rules! layout {
    ($type:ty: $size:literal { $($field:ident: $offset:literal),* }) => {
        const _: () = {
            assert!(size_of::<$type>() == $size);
            $(assert!(std::mem::offset_of!($type, $field) == $offset);)*
        };
    };
}

// Grant table: xen/include/public/grant_table.h.

/// `GTF_permit_access`: the entry gives its domid access to its frame.
pub const GTF_PERMIT_ACCESS: u16 = 1;
/// `GTF_type_mask`: the bits that hold the entry's type.
pub const GTF_TYPE_MASK: u16 = 3;
/// `GTF_readonly`: access is read-only.
pub const GTF_READONLY: u16 = 1 << 2;
/// `GTF_reading`: mapped now; set by the hypervisor.
pub const GTF_READING: u16 = 1 << 3;
/// `GTF_writing`: mapped writable now; set by the hypervisor.
pub const GTF_WRITING: u16 = 1 << 4;

/// `GNTTAB_NR_RESERVED_ENTRIES`: the first references belong to the toolstack.
pub const GNTTAB_RESERVED_ENTRIES: u32 = 8;

/// `GNTST_okay`.
pub const GNTST_OKAY: i16 = 0;
/// `GNTST_general_error`: among other things, the entry does not permit this access.
pub const GNTST_GENERAL_ERROR: i16 = -1;
/// `GNTST_bad_domain`: no such domain.
pub const GNTST_BAD_DOMAIN: i16 = -2;
/// `GNTST_bad_gntref`: the reference is outside the table.
pub const GNTST_BAD_GNTREF: i16 = -3;
/// `GNTST_bad_page`: the entry names a frame that the domain does not have.
pub const GNTST_BAD_PAGE: i16 = -9;
/// `GNTST_bad_copy_arg`: the segment crosses its page.
pub const GNTST_BAD_COPY_ARG: i16 = -10;
/// `GNTST_no_space`: the lowest of the codes.
pub const GNTST_NO_SPACE: i16 = -13;

/// `struct grant_entry_v1`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantEntryV1 {
    /// `GTF_*`.
    pub flags: u16,
    /// The domain that gets access.
    pub domid: u16,
    /// The guest frame number.
    pub frame: u32,
}
layout!(GrantEntryV1: 8 { flags: 0, domid: 2, frame: 4 });

impl GrantEntryV1 {
    /// The entry as one word, so that it is read and written in one access.
    pub fn to_word(self) -> u64 {
        u64::from(self.flags) | u64::from(self.domid) << 16 | u64::from(self.frame) << 32
    }

    /// The entry that a word holds.
    pub fn from_word(word: u64) -> GrantEntryV1 {
        let [f0, f1, d0, d1, n0, n1, n2, n3] = word.to_le_bytes();
        GrantEntryV1 {
            flags: u16::from_le_bytes([f0, f1]),
            domid: u16::from_le_bytes([d0, d1]),
            frame: u32::from_le_bytes([n0, n1, n2, n3]),
        }
    }
}

// Xen runs only little-endian; `to_word` relies on it.
const _: () = assert!(cfg!(target_endian = "little"));

// /dev/xen/gntdev: include/uapi/xen/gntdev.h.

/// `struct ioctl_gntdev_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct GntdevGrantRef {
    /// The granting domain.
    pub domid: u32,
    /// The reference.
    pub gref: u32,
}
layout!(GntdevGrantRef: 8 { domid: 0, gref: 4 });

/// `struct ioctl_gntdev_map_grant_ref` with room for a whole batch.
#[repr(C)]
#[derive(Debug)]
pub struct GntdevMapGrantRef {
    /// In: how many of `refs` are used.
    pub count: u32,
    /// Unused.
    pub pad: u32,
    /// Out: the offset for mmap, in bytes.
    pub index: u64,
    /// In: what to map.
    pub refs: [GntdevGrantRef; limits::GRANTS_PER_MAP_BATCH],
}
const _: () = {
    assert!(std::mem::offset_of!(GntdevMapGrantRef, index) == 8);
    assert!(std::mem::offset_of!(GntdevMapGrantRef, refs) == 16);
};

/// `struct ioctl_gntdev_unmap_grant_ref`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevUnmapGrantRef {
    /// What the map call returned.
    pub index: u64,
    /// How many grants that call mapped.
    pub count: u32,
    /// Unused.
    pub pad: u32,
}
layout!(GntdevUnmapGrantRef: 16 { index: 0, count: 8, pad: 12 });

/// The granted side of a copy: `foreign` in `struct ioctl_gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevForeign {
    /// The page.
    pub gref: u32,
    /// First byte in it.
    pub offset: u16,
    /// The granting domain.
    pub domid: u16,
}
layout!(GntdevForeign: 8 { gref: 0, offset: 4, domid: 6 });

/// One side of a copy: the unions in `struct ioctl_gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy)]
pub union GntdevCopySide {
    /// Our memory.
    pub local: *mut u8,
    /// A granted page.
    pub foreign: GntdevForeign,
}
const _: () = assert!(size_of::<GntdevCopySide>() == 8);

impl std::fmt::Debug for GntdevCopySide {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GntdevCopySide")
    }
}

/// `struct ioctl_gntdev_grant_copy_segment`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevCopySegment {
    /// Where to read.
    pub source: GntdevCopySide,
    /// Where to write.
    pub dest: GntdevCopySide,
    /// Bytes.
    pub len: u16,
    /// [`GNTCOPY_SOURCE_GREF`] or [`GNTCOPY_DEST_GREF`].
    pub flags: u16,
    /// Out: `GNTST_*`.
    pub status: i16,
}
layout!(GntdevCopySegment: 24 { source: 0, dest: 8, len: 16, flags: 18, status: 20 });

/// `GNTCOPY_source_gref` (xen/include/public/grant_table.h): the source is a granted page.
pub const GNTCOPY_SOURCE_GREF: u16 = 1;
/// `GNTCOPY_dest_gref`: the destination is a granted page.
pub const GNTCOPY_DEST_GREF: u16 = 2;

/// `struct ioctl_gntdev_grant_copy`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevGrantCopy {
    /// How many segments.
    pub count: u32,
    /// Their array.
    pub segments: *mut GntdevCopySegment,
}
layout!(GntdevGrantCopy: 16 { count: 0, segments: 8 });

/// `struct ioctl_gntdev_get_offset_for_vaddr`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevGetOffsetForVaddr {
    /// In: an address in a mapping of the device.
    pub vaddr: u64,
    /// Out: what the map call returned for it.
    pub offset: u64,
    /// Out: how many grants it maps.
    pub count: u32,
    /// Unused.
    pub pad: u32,
}
layout!(GntdevGetOffsetForVaddr: 24 { vaddr: 0, offset: 8, count: 16, pad: 20 });

/// `struct ioctl_gntdev_set_max_grants`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntdevSetMaxGrants {
    /// The most grants mapped at a time. Kernels since 3.0 accept any number.
    pub count: u32,
}
layout!(GntdevSetMaxGrants: 4 { count: 0 });

/// `IOCTL_GNTDEV_MAP_GRANT_REF`; its size counts one element of the array.
pub const IOCTL_GNTDEV_MAP_GRANT_REF: libc::Ioctl = ioctl(b'G', 0, 24);
/// `IOCTL_GNTDEV_UNMAP_GRANT_REF`.
pub const IOCTL_GNTDEV_UNMAP_GRANT_REF: libc::Ioctl =
    ioctl(b'G', 1, size_of::<GntdevUnmapGrantRef>());
/// `IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR`.
pub const IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR: libc::Ioctl =
    ioctl(b'G', 2, size_of::<GntdevGetOffsetForVaddr>());
/// `IOCTL_GNTDEV_SET_MAX_GRANTS`.
pub const IOCTL_GNTDEV_SET_MAX_GRANTS: libc::Ioctl =
    ioctl(b'G', 3, size_of::<GntdevSetMaxGrants>());
/// `IOCTL_GNTDEV_GRANT_COPY`.
pub const IOCTL_GNTDEV_GRANT_COPY: libc::Ioctl = ioctl(b'G', 8, size_of::<GntdevGrantCopy>());

// /dev/xen/gntalloc: include/uapi/xen/gntalloc.h.

/// `struct ioctl_gntalloc_alloc_gref` with room for a whole batch.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct GntallocAllocGref {
    /// In: the domain that may map the pages.
    pub domid: u16,
    /// In: [`GNTALLOC_FLAG_WRITABLE`] or 0.
    pub flags: u16,
    /// In: how many pages.
    pub count: u32,
    /// Out: the offset for mmap, in bytes.
    pub index: u64,
    /// Out: the pages' references.
    pub refs: [u32; limits::PAGES_PER_ALLOC],
}
const _: () = {
    assert!(std::mem::offset_of!(GntallocAllocGref, flags) == 2);
    assert!(std::mem::offset_of!(GntallocAllocGref, count) == 4);
    assert!(std::mem::offset_of!(GntallocAllocGref, index) == 8);
    assert!(std::mem::offset_of!(GntallocAllocGref, refs) == 16);
};

/// `GNTALLOC_FLAG_WRITABLE`: a domain that maps a page may write to it.
pub const GNTALLOC_FLAG_WRITABLE: u16 = 1;

/// `IOCTL_GNTALLOC_ALLOC_GREF`; its size counts one element of the array, and padding.
pub const IOCTL_GNTALLOC_ALLOC_GREF: libc::Ioctl = ioctl(b'G', 5, 24);

// /dev/xen/evtchn: include/uapi/xen/evtchn.h.

/// `struct ioctl_evtchn_bind_interdomain`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EvtchnBindInterdomain {
    /// The domain that allocated the port.
    pub remote_domain: u32,
    /// The port's number in that domain.
    pub remote_port: u32,
}
layout!(EvtchnBindInterdomain: 8 { remote_domain: 0, remote_port: 4 });

/// `struct ioctl_evtchn_bind_unbound_port`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EvtchnBindUnboundPort {
    /// The domain that may bind to it.
    pub remote_domain: u32,
}
layout!(EvtchnBindUnboundPort: 4 { remote_domain: 0 });

/// `struct ioctl_evtchn_restrict_domid`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EvtchnRestrictDomid {
    /// The only domain to which the device binds from now on.
    pub domid: u16,
}
layout!(EvtchnRestrictDomid: 2 { domid: 0 });

/// `struct ioctl_evtchn_unbind` and `struct ioctl_evtchn_notify`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct EvtchnPort {
    /// A port of ours.
    pub port: u32,
}
layout!(EvtchnPort: 4 { port: 0 });

/// `IOCTL_EVTCHN_BIND_INTERDOMAIN`; returns our port.
pub const IOCTL_EVTCHN_BIND_INTERDOMAIN: libc::Ioctl =
    ioctl(b'E', 1, size_of::<EvtchnBindInterdomain>());
/// `IOCTL_EVTCHN_BIND_UNBOUND_PORT`; returns our port.
pub const IOCTL_EVTCHN_BIND_UNBOUND_PORT: libc::Ioctl =
    ioctl(b'E', 2, size_of::<EvtchnBindUnboundPort>());
/// `IOCTL_EVTCHN_UNBIND`.
pub const IOCTL_EVTCHN_UNBIND: libc::Ioctl = ioctl(b'E', 3, size_of::<EvtchnPort>());
/// `IOCTL_EVTCHN_NOTIFY`.
pub const IOCTL_EVTCHN_NOTIFY: libc::Ioctl = ioctl(b'E', 4, size_of::<EvtchnPort>());
/// `IOCTL_EVTCHN_RESET`: empties the queue of pending ports and clears its error.
pub const IOCTL_EVTCHN_RESET: libc::Ioctl = ioctl(b'E', 5, 0);
/// `IOCTL_EVTCHN_RESTRICT_DOMID`.
pub const IOCTL_EVTCHN_RESTRICT_DOMID: libc::Ioctl =
    ioctl(b'E', 6, size_of::<EvtchnRestrictDomid>());

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn ioctl_numbers_are_those_of_the_kernel() {
        assert_eq!(IOCTL_GNTDEV_MAP_GRANT_REF, 0x0018_4700);
        assert_eq!(IOCTL_GNTDEV_UNMAP_GRANT_REF, 0x0010_4701);
        assert_eq!(IOCTL_GNTDEV_GRANT_COPY, 0x0010_4708);
        assert_eq!(IOCTL_GNTALLOC_ALLOC_GREF, 0x0018_4705);
        assert_eq!(IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR, 0x0018_4702);
        assert_eq!(IOCTL_GNTDEV_SET_MAX_GRANTS, 0x0004_4703);
        assert_eq!(IOCTL_EVTCHN_BIND_INTERDOMAIN, 0x0008_4501);
        assert_eq!(IOCTL_EVTCHN_BIND_UNBOUND_PORT, 0x0004_4502);
        assert_eq!(IOCTL_EVTCHN_UNBIND, 0x0004_4503);
        assert_eq!(IOCTL_EVTCHN_NOTIFY, 0x0004_4504);
        assert_eq!(IOCTL_EVTCHN_RESET, 0x0000_4505);
        assert_eq!(IOCTL_EVTCHN_RESTRICT_DOMID, 0x0002_4506);
    }

    #[test]
    fn a_grant_entry_keeps_its_fields_as_one_word() {
        let entry = GrantEntryV1 { flags: GTF_PERMIT_ACCESS | GTF_READONLY, domid: 7, frame: 99 };
        assert_eq!(entry.to_word(), 0x0000_0063_0007_0005);
        assert_eq!(GrantEntryV1::from_word(entry.to_word()), entry);
    }
}
