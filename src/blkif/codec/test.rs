use proptest::prelude::*;

use super::*;
use crate::xen::shm::{LocalPages, PAGE_BYTES};

fn any_direct() -> impl Strategy<Value = RawRequest> {
    let segment = (any::<u32>(), any::<u8>(), any::<u8>())
        .prop_map(|(gref, first, last)| RawSegment { gref, first, last });
    let segments = prop::collection::vec(segment, 0..=SEGMENTS_PER_REQUEST);
    let operation = any::<u8>().prop_filter("another layout", |operation| {
        !matches!(*operation, op::DISCARD | op::INDIRECT)
    });
    (operation, any::<u16>(), any::<u64>(), any::<u64>(), segments).prop_map(
        |(operation, handle, id, sector, segments)| {
            let mut request = RawDirect::new(operation, id, sector);
            request.handle = handle;
            request.nr_segments = segments.len().try_into().unwrap();
            request.segments[..segments.len()].copy_from_slice(&segments);
            RawRequest::Direct(request)
        },
    )
}

fn any_request() -> impl Strategy<Value = RawRequest> {
    let head = (any::<u8>(), any::<u16>(), any::<u64>(), any::<u64>(), any::<u16>());
    let indirect = (head, any::<[u32; INDIRECT_PAGES_PER_REQUEST]>()).prop_map(
        |((operation, nr_segments, id, sector, handle), pages)| {
            let indirect = RawIndirect { operation, nr_segments, id, sector, handle, pages };
            RawRequest::Indirect(indirect)
        },
    );
    let discard = (head, any::<u64>()).prop_map(|((flag, handle, id, sector, _), nr_sectors)| {
        RawRequest::Discard(RawDiscard { flag, handle, id, sector, nr_sectors })
    });
    prop_oneof![any_direct(), indirect, discard]
}

fn any_protocol() -> impl Strategy<Value = Protocol> {
    prop_oneof![Just(Protocol::X86_64), Just(Protocol::X86_32)]
}

proptest! {
    #[test]
    fn a_request_arrives_as_it_was_sent(request in any_request(), protocol in any_protocol()) {
        let page = LocalPages::new(1).into_shared();
        let at = 64 + 3 * protocol.entry_bytes();
        store_request(&page, at, protocol, &request);
        prop_assert_eq!(load_request(&page, at, protocol), request);
    }

    #[test]
    fn a_response_arrives_as_it_was_sent(
        id: u64, operation: u8, status: i16, protocol in any_protocol()
    ) {
        let page = LocalPages::new(1).into_shared();
        let at = 64 + 5 * protocol.entry_bytes();
        let response = RawResponse { id, operation, status };
        store_response(&page, at, protocol, &response);
        prop_assert_eq!(load_response(&page, at, protocol), response);
    }

    #[test]
    fn any_bytes_decode_to_some_request(bytes in prop::collection::vec(any::<u32>(), 28)) {
        let page = LocalPages::new(1).into_shared();
        page.store(64, &bytes);
        for protocol in [Protocol::X86_64, Protocol::X86_32] {
            load_request(&page, 64, protocol);
        }
    }
}

/// Offsets of `struct blkif_request` on x86_64: id 8, sector_number 16, seg 24, 8 bytes each.
#[test]
fn the_x86_64_layout_is_that_of_the_header() {
    let page = LocalPages::new(1).into_shared();
    let mut request = RawDirect::new(op::WRITE, 0x1112_1314_1516_1718, 0x2122_2324_2526_2728);
    request.nr_segments = 2;
    request.handle = 0x3132;
    request.segments[1] = RawSegment { gref: 0x4142_4344, first: 5, last: 7 };
    store_request(&page, 64, Protocol::X86_64, &RawRequest::Direct(request));
    assert_eq!(page.load::<u32, 1>(64), [0x3132_0201]);
    assert_eq!(page.load::<u64, 2>(72), [0x1112_1314_1516_1718, 0x2122_2324_2526_2728]);
    assert_eq!(page.load::<u32, 2>(96), [0x4142_4344, 0x0000_0705]);
}

/// The same on x86_32, which aligns a u64 to 4 bytes: id 4, sector_number 12, seg 20.
#[test]
fn the_x86_32_layout_is_that_of_the_header() {
    let page = LocalPages::new(1).into_shared();
    let mut request = RawDirect::new(op::READ, 0x1112_1314_1516_1718, 0x2122_2324_2526_2728);
    request.nr_segments = 1;
    request.segments[0] = RawSegment { gref: 0x4142_4344, first: 0, last: 7 };
    store_request(&page, 64, Protocol::X86_32, &RawRequest::Direct(request));
    assert_eq!(
        page.load::<u32, 7>(64),
        [0x100, 0x1516_1718, 0x1112_1314, 0x2526_2728, 0x2122_2324, 0x4142_4344, 0x700]
    );
}

#[test]
fn a_response_overwrites_its_padding() {
    let page = LocalPages::new(1).into_shared();
    page.store(0, &[u64::MAX; PAGE_BYTES / 8]);
    let response = RawResponse::new(7, op::READ, Status::NotSupported);
    store_response(&page, 64, Protocol::X86_64, &response);
    assert_eq!(page.load::<u64, 3>(64), [7, 0xfffe_0000, u64::MAX]);
    store_response(&page, 64 + 108, Protocol::X86_32, &response);
    assert_eq!(page.load::<u32, 4>(64 + 108), [7, 0, 0xfffe_0000, u32::MAX]);
}

/// `struct blkif_request_indirect`: nr_segments at 2, the pages at 28 (x86_64) and 24 (x86_32).
#[test]
fn the_indirect_layouts_are_those_of_the_header() {
    let page = LocalPages::new(1).into_shared();
    let request = RawRequest::Indirect(RawIndirect {
        operation: op::WRITE,
        nr_segments: 0x0102,
        id: 3,
        sector: 4,
        handle: 5,
        pages: [6, 7, 8, 9, 10, 11, 12, 13],
    });
    store_request(&page, 64, Protocol::X86_64, &request);
    assert_eq!(page.load::<u32, 1>(64), [0x0102_0106]);
    assert_eq!(page.load::<u64, 2>(72), [3, 4]);
    assert_eq!(page.load::<u32, 9>(64 + 24), [5, 6, 7, 8, 9, 10, 11, 12, 13]);
    store_request(&page, 64, Protocol::X86_32, &request);
    assert_eq!(page.load::<u32, 14>(64), [0x0102_0106, 3, 0, 4, 0, 5, 6, 7, 8, 9, 10, 11, 12, 13]);
}

/// `struct blkif_request_discard`: nr_sectors at 24 (x86_64) and 20 (x86_32).
#[test]
fn the_discard_layouts_are_those_of_the_header() {
    let page = LocalPages::new(1).into_shared();
    let discard = RawDiscard { flag: 1, handle: 2, id: 3, sector: 4, nr_sectors: 1 << 40 };
    let request = RawRequest::Discard(discard);
    store_request(&page, 64, Protocol::X86_64, &request);
    assert_eq!(page.load::<u32, 1>(64), [0x0002_0105]);
    assert_eq!(page.load::<u64, 3>(72), [3, 4, 1 << 40]);
    store_request(&page, 64, Protocol::X86_32, &request);
    assert_eq!(page.load::<u32, 7>(64), [0x0002_0105, 3, 0, 4, 0, 0, 0x100]);
}
