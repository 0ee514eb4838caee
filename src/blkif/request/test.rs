use proptest::prelude::*;

use super::*;
use crate::units::Bytes;

fn disk(sectors: u64, sector_bytes: u32, read_only: bool) -> DiskRules {
    let size = Bytes(sectors * 512);
    DiskRules {
        geometry: Geometry { size, sector_bytes, physical_sector_bytes: sector_bytes },
        read_only,
        indirect_segments: 256,
        discard: true,
        secure_discard: false,
    }
}

fn raw(operation: u8, sector: u64, segments: &[(u8, u8)]) -> RawDirect {
    let mut request = RawDirect::new(operation, 1, sector);
    request.nr_segments = segments.len().try_into().unwrap();
    for (slot, (first, last)) in request.segments.iter_mut().zip(segments) {
        *slot = RawSegment { gref: 9, first: *first, last: *last };
    }
    request
}

fn check(raw: &RawDirect, disk: &DiskRules) -> Result<(Request, Vec<Segment>), RequestFault> {
    let mut segments = [Segment::default(); SEGMENTS_PER_REQUEST];
    let (request, count) = disk.check_direct(raw, &mut segments)?;
    Ok((request, segments[..count].to_vec()))
}

fn fault(raw: &RawDirect, disk: &DiskRules) -> RequestFault {
    check(raw, disk).unwrap_err()
}

#[test]
fn a_good_request_keeps_its_numbers() {
    let (request, segments) =
        check(&raw(op::WRITE, 8, &[(0, 7), (2, 3)]), &disk(100, 512, false)).unwrap();
    assert_eq!((request.offset_bytes, request.len_bytes), (4096, 5120));
    assert_eq!(segments[1], Segment { gref: 9, offset: 1024, len: 1024 });
}

#[test]
fn segments_must_lie_in_their_page() {
    let disk = disk(100, 512, false);
    for (first, last) in [(0, 8), (0, 255), (3, 2), (255, 255), (8, 8)] {
        let fault = fault(&raw(op::READ, 0, &[(first, last)]), &disk);
        assert_eq!(fault, RequestFault::SegmentRange, "{first}..={last}");
    }
}

#[test]
fn the_count_of_segments_is_1_to_11() {
    let disk = disk(1000, 512, false);
    for operation in [op::READ, op::WRITE] {
        assert_eq!(fault(&raw(operation, 0, &[]), &disk), RequestFault::SegmentCount);
        for count in 12..=255 {
            let mut request = raw(operation, 0, &[(0, 7); 11]);
            request.nr_segments = count;
            assert_eq!(fault(&request, &disk), RequestFault::SegmentCount, "{count}");
        }
    }
}

#[test]
fn a_request_ends_with_the_disk() {
    let disk = disk(100, 512, false);
    assert!(check(&raw(op::READ, 92, &[(0, 7)]), &disk).is_ok());
    for sector in [93, 100, 1 << 55, u64::MAX, u64::MAX - 7] {
        let fault = fault(&raw(op::READ, sector, &[(0, 7)]), &disk);
        assert_eq!(fault, RequestFault::BeyondEnd, "{sector}");
    }
}

#[test]
fn a_read_only_disk_refuses_every_change_but_takes_a_flush() {
    let disk = disk(100, 512, true);
    for operation in [op::WRITE, op::FLUSH_DISKCACHE, op::WRITE_BARRIER] {
        assert_eq!(fault(&raw(operation, 0, &[(0, 7)]), &disk), RequestFault::ReadOnly);
    }
    assert!(check(&raw(op::READ, 0, &[(0, 7)]), &disk).is_ok());
    assert!(check(&raw(op::FLUSH_DISKCACHE, 0, &[]), &disk).is_ok());
}

#[test]
fn a_4kn_disk_takes_whole_blocks_only() {
    let disk = disk(800, 4096, false);
    assert!(check(&raw(op::WRITE, 8, &[(0, 7)]), &disk).is_ok());
    for bad in [raw(op::WRITE, 1, &[(0, 7)]), raw(op::WRITE, 8, &[(0, 3), (4, 7)])] {
        assert_eq!(fault(&bad, &disk), RequestFault::Unaligned);
    }
}

#[test]
fn an_undefined_operation_is_not_supported() {
    let disk = disk(100, 512, false);
    for operation in [4, 7, 255] {
        let fault = fault(&raw(operation, 0, &[(0, 7)]), &disk);
        assert_eq!(fault.status(), Status::NotSupported);
    }
}

proptest! {
    #[test]
    fn a_request_that_passes_is_inside_the_disk_and_its_pages(
        operation in 0u8..8,
        nr_segments: u8,
        sector in prop_oneof![0u64..2000, any::<u64>()],
        segments in prop::array::uniform11((0u8..9, 0u8..9)),
        sector_bytes in prop_oneof![Just(512u32), Just(4096)],
    ) {
        let disk = disk(1024, sector_bytes, false);
        let mut raw = raw(operation, sector, &segments);
        raw.nr_segments = nr_segments;
        if let Ok((request, segments)) = check(&raw, &disk) {
            let end = request.offset_bytes + request.len_bytes;
            prop_assert!(end <= disk.geometry.size.0);
            let sum: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
            prop_assert_eq!(sum, request.len_bytes);
            prop_assert!(request.len_bytes.is_multiple_of(sector_bytes.into()));
            for segment in segments {
                prop_assert!(segment.len > 0 && segment.offset + segment.len <= 4096);
            }
        }
    }
}

fn indirect(operation: u8, nr_segments: u16) -> RawIndirect {
    RawIndirect {
        operation,
        nr_segments,
        id: 1,
        sector: 0,
        handle: 0,
        pages: [1, 2, 3, 4, 5, 6, 7, 8],
    }
}

#[test]
fn an_indirect_request_has_1_to_the_offered_count_of_segments() {
    let disk = disk(10_000, 512, false);
    for count in [0, 257, 512, 4096, u16::MAX] {
        let fault = disk.check_indirect(&indirect(op::READ, count)).unwrap_err();
        assert_eq!(fault, RequestFault::SegmentCount, "{count}");
    }
    let offered_more = DiskRules { indirect_segments: 600, ..disk };
    let head = offered_more.check_indirect(&indirect(op::READ, 600)).unwrap();
    assert_eq!(head.pages().collect::<Vec<_>>(), [(1, 512), (2, 88)]);
}

#[test]
fn an_indirect_request_reads_or_writes_and_nothing_else() {
    let writable = disk(10_000, 512, false);
    for operation in [op::FLUSH_DISKCACHE, op::WRITE_BARRIER, op::DISCARD, op::INDIRECT, 255] {
        let fault = writable.check_indirect(&indirect(operation, 1)).unwrap_err();
        assert_eq!(fault.status(), Status::NotSupported);
    }
    let read_only = disk(10_000, 512, true);
    let fault = read_only.check_indirect(&indirect(op::WRITE, 1)).unwrap_err();
    assert_eq!(fault, RequestFault::ReadOnly);
    let never_offered = DiskRules { indirect_segments: 0, ..writable };
    let fault = never_offered.check_indirect(&indirect(op::READ, 1)).unwrap_err();
    assert_eq!(fault.status(), Status::NotSupported);
}

#[test]
fn the_segments_of_an_indirect_request_are_checked_like_any_other() {
    let disk = disk(100, 512, false);
    let head = disk.check_indirect(&indirect(op::READ, 20)).unwrap();
    let mut segments = [Segment::default(); 20];
    let whole = RawSegment { gref: 5, first: 0, last: 7 };
    let fault = disk.check_indirect_segments(&head, vec![whole; 20].into_iter(), &mut segments);
    assert_eq!(fault, Err(RequestFault::BeyondEnd));
    let mut raw = vec![RawSegment { gref: 5, first: 1, last: 2 }; 20];
    let request =
        disk.check_indirect_segments(&head, raw.clone().into_iter(), &mut segments).unwrap();
    assert_eq!((request.len_bytes, request.operation), (20 * 1024, op::READ));
    raw[19].last = 8;
    let fault = disk.check_indirect_segments(&head, raw.into_iter(), &mut segments);
    assert_eq!(fault, Err(RequestFault::SegmentRange));
}

#[test]
fn a_discard_lies_on_the_disk_and_is_refused_if_it_was_not_offered() {
    let disk = disk(800, 4096, false);
    let discard =
        |flag, sector, nr_sectors| RawDiscard { flag, handle: 0, id: 1, sector, nr_sectors };
    let request = disk.check_discard(&discard(0, 8, 792)).unwrap();
    assert_eq!((request.offset_bytes, request.len_bytes), (4096, 792 * 512));
    for (sector, nr_sectors) in [(8, 800), (0, u64::MAX - 7), (u64::MAX - 7, 8), (1 << 60, 8)] {
        let fault = disk.check_discard(&discard(0, sector, nr_sectors)).unwrap_err();
        assert_eq!(fault, RequestFault::BeyondEnd, "{sector} {nr_sectors}");
    }
    for (sector, nr_sectors) in [(1, 8), (8, 1), (8, 0)] {
        let fault = disk.check_discard(&discard(0, sector, nr_sectors)).unwrap_err();
        assert_eq!(fault, RequestFault::Unaligned, "{sector} {nr_sectors}");
    }
    let secure = disk.check_discard(&discard(1, 0, 8)).unwrap_err();
    assert_eq!(secure.status(), Status::NotSupported);
    let never_offered = DiskRules { discard: false, ..disk };
    let fault = never_offered.check_discard(&discard(0, 0, 8)).unwrap_err();
    assert_eq!(fault.status(), Status::NotSupported);
    let read_only = DiskRules { read_only: true, ..disk };
    let fault = read_only.check_discard(&discard(0, 0, 8)).unwrap_err();
    assert_eq!(fault, RequestFault::ReadOnly);
}
