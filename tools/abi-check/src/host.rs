//! Interfaces between polldisk and the machine it runs on: the kernel's Xen devices, the grant table,
//! xenstore.

use polldisk::backing::Geometry;
use polldisk::blkif::codec::RawDiscard;
use polldisk::blkif::request::{DiskRules, Kind};
use polldisk::limits::{XENSTORE_ABS_PATH_MAX, XENSTORE_PAYLOAD_MAX, XENSTORE_REL_PATH_MAX};
use polldisk::units::{Bytes, DomId, GrantRef, Port};
use polldisk::xen::abi::*;
use polldisk::xen::keys::{VDISK_CDROM, VDISK_READONLY, VDISK_REMOVABLE, XenbusState};
use polldisk::xen::store::wire::{self, Header, Op};

use crate::structure;
use crate::table::{Table, same_bytes};

/// Headers of Xen, and of the C library for the ioctl and errno numbers.
const HEADERS: &[&str] = &[
    "errno.h",
    "stddef.h",
    "stdint.h",
    "sys/ioctl.h",
    "xen/xen.h",
    "xen/event_channel.h",
    "xen/grant_table.h",
    "xen/io/blkif.h",
    "xen/io/xenbus.h",
    "xen/io/xs_wire.h",
    "xen/sys/evtchn.h",
    "xen/sys/gntalloc.h",
    "xen/sys/gntdev.h",
];

/// Everything except the ring.
pub fn table() -> Table {
    let mut table = Table::new("host", &[], HEADERS);
    identifiers(&mut table);
    grant_table(&mut table);
    gntdev(&mut table);
    gntalloc(&mut table);
    evtchn(&mut table);
    disk_flags(&mut table);
    xenbus_states(&mut table);
    xenstore(&mut table);
    table
}

fn identifiers(table: &mut Table) {
    table.number("sizeof(domid_t)", size_of::<DomId>());
    table.number("sizeof(grant_ref_t)", size_of::<GrantRef>());
    table.number("sizeof(evtchn_port_t)", size_of::<Port>());
    let first_refused = (0u32..).find(|raw| DomId::try_from(*raw).is_err());
    table.number("DOMID_FIRST_RESERVED", first_refused.unwrap_or(0));
}

fn grant_table(table: &mut Table) {
    structure!(table, "struct grant_entry_v1" is GrantEntryV1 {
        "flags" is flags, "domid" is domid, "frame" is frame
    });
    let entry = GrantEntryV1 { flags: 0x1112, domid: 0x2122, frame: 0x3132_3334 };
    table.example(
        "struct grant_entry_v1",
        "{ .flags = 0x1112, .domid = 0x2122, .frame = 0x31323334 }".into(),
        Box::new(move |theirs| same_bytes(&entry.to_word().to_le_bytes(), theirs)),
    );
    table.number("GTF_permit_access", GTF_PERMIT_ACCESS);
    table.number("GTF_type_mask", GTF_TYPE_MASK);
    table.number("GTF_readonly", GTF_READONLY);
    table.number("GTF_reading", GTF_READING);
    table.number("GTF_writing", GTF_WRITING);
    table.number("GNTTAB_NR_RESERVED_ENTRIES", GNTTAB_RESERVED_ENTRIES);
    table.number("GNTST_okay", GNTST_OKAY);
    table.number("GNTST_general_error", GNTST_GENERAL_ERROR);
    table.number("GNTST_bad_domain", GNTST_BAD_DOMAIN);
    table.number("GNTST_bad_gntref", GNTST_BAD_GNTREF);
    table.number("GNTST_bad_page", GNTST_BAD_PAGE);
    table.number("GNTST_bad_copy_arg", GNTST_BAD_COPY_ARG);
    table.number("GNTST_no_space", GNTST_NO_SPACE);
    table.number("GNTCOPY_source_gref", GNTCOPY_SOURCE_GREF);
    table.number("GNTCOPY_dest_gref", GNTCOPY_DEST_GREF);
}

fn gntdev(table: &mut Table) {
    structure!(table, "struct ioctl_gntdev_grant_ref" is GntdevGrantRef {
        "domid" is domid, "ref" is gref
    });
    // The header's array has one element, polldisk's a whole batch, so the sizes differ.
    let refs = std::mem::offset_of!(GntdevMapGrantRef, refs);
    for (field, offset) in [
        ("count", std::mem::offset_of!(GntdevMapGrantRef, count)),
        ("pad", std::mem::offset_of!(GntdevMapGrantRef, pad)),
        ("index", std::mem::offset_of!(GntdevMapGrantRef, index)),
        ("refs", refs),
    ] {
        table.number(format!("offsetof(struct ioctl_gntdev_map_grant_ref, {field})"), offset);
    }
    let with_one = refs + size_of::<GntdevGrantRef>();
    table.number("sizeof(struct ioctl_gntdev_map_grant_ref)", with_one);
    structure!(table, "struct ioctl_gntdev_unmap_grant_ref" is GntdevUnmapGrantRef {
        "index" is index, "count" is count, "pad" is pad
    });
    structure!(table, "struct ioctl_gntdev_grant_copy_segment" is GntdevCopySegment {
        "source" is source, "dest" is dest, "len" is len, "flags" is flags, "status" is status
    });
    // The header's structure for a granted side has no name of its own; the source is at 0.
    for (field, offset) in [
        ("ref", std::mem::offset_of!(GntdevForeign, gref)),
        ("offset", std::mem::offset_of!(GntdevForeign, offset)),
        ("domid", std::mem::offset_of!(GntdevForeign, domid)),
    ] {
        let c = format!("offsetof(struct ioctl_gntdev_grant_copy_segment, source.foreign.{field})");
        table.number(c, offset);
    }
    structure!(table, "struct ioctl_gntdev_grant_copy" is GntdevGrantCopy {
        "count" is count, "segments" is segments
    });
    table.number("IOCTL_GNTDEV_MAP_GRANT_REF", IOCTL_GNTDEV_MAP_GRANT_REF);
    table.number("IOCTL_GNTDEV_UNMAP_GRANT_REF", IOCTL_GNTDEV_UNMAP_GRANT_REF);
    structure!(table, "struct ioctl_gntdev_get_offset_for_vaddr" is GntdevGetOffsetForVaddr {
        "vaddr" is vaddr, "offset" is offset, "count" is count, "pad" is pad
    });
    structure!(table, "struct ioctl_gntdev_set_max_grants" is GntdevSetMaxGrants {
        "count" is count
    });
    table.number("IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR", IOCTL_GNTDEV_GET_OFFSET_FOR_VADDR);
    table.number("IOCTL_GNTDEV_SET_MAX_GRANTS", IOCTL_GNTDEV_SET_MAX_GRANTS);
    table.number("IOCTL_GNTDEV_GRANT_COPY", IOCTL_GNTDEV_GRANT_COPY);
}

fn gntalloc(table: &mut Table) {
    // The header's array has one element, polldisk's a whole batch, so the sizes differ.
    for (field, offset) in [
        ("domid", std::mem::offset_of!(GntallocAllocGref, domid)),
        ("flags", std::mem::offset_of!(GntallocAllocGref, flags)),
        ("count", std::mem::offset_of!(GntallocAllocGref, count)),
        ("index", std::mem::offset_of!(GntallocAllocGref, index)),
        ("gref_ids", std::mem::offset_of!(GntallocAllocGref, refs)),
    ] {
        table.number(format!("offsetof(struct ioctl_gntalloc_alloc_gref, {field})"), offset);
    }
    table.number("GNTALLOC_FLAG_WRITABLE", GNTALLOC_FLAG_WRITABLE);
    table.number("IOCTL_GNTALLOC_ALLOC_GREF", IOCTL_GNTALLOC_ALLOC_GREF);
}

fn evtchn(table: &mut Table) {
    structure!(table, "struct ioctl_evtchn_bind_interdomain" is EvtchnBindInterdomain {
        "remote_domain" is remote_domain, "remote_port" is remote_port
    });
    structure!(table, "struct ioctl_evtchn_bind_unbound_port" is EvtchnBindUnboundPort {
        "remote_domain" is remote_domain
    });
    structure!(table, "struct ioctl_evtchn_unbind" is EvtchnPort { "port" is port });
    structure!(table, "struct ioctl_evtchn_notify" is EvtchnPort { "port" is port });
    structure!(table, "struct ioctl_evtchn_bind_unbound_port" is EvtchnBindUnboundPort {
        "remote_domain" is remote_domain
    });
    structure!(table, "struct ioctl_evtchn_restrict_domid" is EvtchnRestrictDomid {
        "domid" is domid
    });
    table.number("IOCTL_EVTCHN_BIND_UNBOUND_PORT", IOCTL_EVTCHN_BIND_UNBOUND_PORT);
    table.number("IOCTL_EVTCHN_RESTRICT_DOMID", IOCTL_EVTCHN_RESTRICT_DOMID);
    table.number("IOCTL_EVTCHN_BIND_INTERDOMAIN", IOCTL_EVTCHN_BIND_INTERDOMAIN);
    table.number("IOCTL_EVTCHN_BIND_UNBOUND_PORT", IOCTL_EVTCHN_BIND_UNBOUND_PORT);
    table.number("IOCTL_EVTCHN_UNBIND", IOCTL_EVTCHN_UNBIND);
    table.number("IOCTL_EVTCHN_NOTIFY", IOCTL_EVTCHN_NOTIFY);
    table.number("IOCTL_EVTCHN_RESET", IOCTL_EVTCHN_RESET);
}

fn disk_flags(table: &mut Table) {
    table.number("VDISK_CDROM", VDISK_CDROM);
    table.number("VDISK_REMOVABLE", VDISK_REMOVABLE);
    table.number("VDISK_READONLY", VDISK_READONLY);
    let secure = (0..8).map(|bit| 1 << bit).find(|flag| is_secure_discard(*flag));
    table.number("BLKIF_DISCARD_SECURE", secure.unwrap_or(0));
}

/// Whether polldisk takes a discard with this flag as a secure one. The flag's number is private to polldisk.
fn is_secure_discard(flag: u8) -> bool {
    let size = Bytes(1 << 20);
    let rules = DiskRules {
        geometry: Geometry { size, sector_bytes: 512, physical_sector_bytes: 512 },
        read_only: false,
        indirect_segments: 0,
        discard: true,
        secure_discard: true,
    };
    let request = RawDiscard { flag, handle: 0, id: 0, sector: 0, nr_sectors: 8 };
    rules.check_discard(&request).is_ok_and(|request| request.kind == Kind::SecureDiscard)
}

fn xenbus_states(table: &mut Table) {
    for state in XenbusState::ALL {
        table.number(format!("XenbusState{state}"), state.number());
    }
}

fn xenstore(table: &mut Table) {
    table.number("XENSTORE_PAYLOAD_MAX", XENSTORE_PAYLOAD_MAX);
    table.number("XENSTORE_ABS_PATH_MAX", XENSTORE_ABS_PATH_MAX);
    table.number("XENSTORE_REL_PATH_MAX", XENSTORE_REL_PATH_MAX);
    table.number("sizeof(struct xsd_sockmsg)", wire::HEADER_BYTES);
    let header = Header { kind: 0x1112_1314, req_id: 0x2122, tx_id: 0x3132, len: 0x4142 };
    table.example(
        "struct xsd_sockmsg",
        "{ .type = 0x11121314, .req_id = 0x2122, .tx_id = 0x3132, .len = 0x4142 }".into(),
        Box::new(move |theirs| {
            same_bytes(&header.to_bytes(), theirs)?;
            let back = theirs.first_chunk().map(Header::from_bytes);
            if back == Some(header) { Ok(()) } else { Err(format!("reads back as {back:?}")) }
        }),
    );
    for &op in Op::ALL {
        if let Some(name) = operation_name(op) {
            table.number(name, op as u32);
        }
    }
    xenstore_errors(table);
}

/// The header's name of an operation; `None` for those that Xen 4.17's header does not have yet.
fn operation_name(op: Op) -> Option<&'static str> {
    Some(match op {
        Op::Control => "XS_CONTROL",
        Op::Directory => "XS_DIRECTORY",
        Op::Read => "XS_READ",
        Op::GetPerms => "XS_GET_PERMS",
        Op::Watch => "XS_WATCH",
        Op::Unwatch => "XS_UNWATCH",
        Op::TransactionStart => "XS_TRANSACTION_START",
        Op::TransactionEnd => "XS_TRANSACTION_END",
        Op::Introduce => "XS_INTRODUCE",
        Op::Release => "XS_RELEASE",
        Op::GetDomainPath => "XS_GET_DOMAIN_PATH",
        Op::Write => "XS_WRITE",
        Op::Mkdir => "XS_MKDIR",
        Op::Rm => "XS_RM",
        Op::SetPerms => "XS_SET_PERMS",
        Op::WatchEvent => "XS_WATCH_EVENT",
        Op::Error => "XS_ERROR",
        Op::IsDomainIntroduced => "XS_IS_DOMAIN_INTRODUCED",
        Op::Resume => "XS_RESUME",
        Op::SetTarget => "XS_SET_TARGET",
        Op::ResetWatches => "XS_RESET_WATCHES",
        Op::DirectoryPart => "XS_DIRECTORY_PART",
        Op::GetFeature | Op::SetFeature | Op::GetQuota | Op::SetQuota => return None,
    })
}

/// Each error that polldisk names must have the C library's number, and the header must name as many.
fn xenstore_errors(table: &mut Table) {
    let named =
        |errno: &i32| wire::error_number(wire::error_name(*errno).as_bytes()) == Some(*errno);
    let numbers: Vec<i32> = (1..200).filter(named).collect();
    table.number("sizeof(xsd_errors) / sizeof(xsd_errors[0])", numbers.len());
    for errno in numbers {
        table.number(wire::error_name(errno), errno);
    }
}
