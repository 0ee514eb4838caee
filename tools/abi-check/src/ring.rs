//! Interface between polldisk and a guest: blkif's ring, in the layouts of both protocols.

use polldisk::blkif::codec::{
    RawDirect, RawDiscard, RawIndirect, RawRequest, RawResponse, RawSegment, SEGMENT_BYTES,
    load_request, load_response, store_request, store_response,
};
use polldisk::blkif::ring::{BackRing, ring_entries};
use polldisk::blkif::{Protocol, Status, op};
use polldisk::limits::{
    INDIRECT_PAGES_PER_REQUEST, RING_PAGES_MAX, SEGMENTS_PER_INDIRECT_PAGE, SEGMENTS_PER_REQUEST,
};
use polldisk::xen::shm::{LocalPages, PAGE_BYTES, SharedPage};

use crate::table::{EXAMPLE_BYTES, Table, same_bytes};

/// Headers that need no C library, since a 32-bit one is rarely installed.
const HEADERS: &[&str] = &["stddef.h", "stdint.h", "xen/io/blkif.h"];

/// Offset of the examples in their page: any place behind the ring's header works.
const ENTRY: usize = 64;

/// Values whose bytes all differ, so that swapped fields are noticed.
const ID: u64 = 0x1112_1314_1516_1718;
const SECTOR: u64 = 0x2122_2324_2526_2728;
const HANDLE: u16 = 0x3132;

/// The ring as the guests of one protocol see it.
pub fn table(protocol: Protocol) -> Table {
    let (name, flags): (_, &[&str]) = match protocol {
        Protocol::X86_64 => ("ring x86_64", &["-m64", "-ffreestanding"]),
        Protocol::X86_32 => ("ring x86_32", &["-m32", "-ffreestanding"]),
    };
    let mut table = Table::new(name, flags, HEADERS);
    constants(&mut table);
    sizes(&mut table, protocol);
    requests(&mut table, protocol);
    response(&mut table, protocol);
    segment(&mut table);
    whole_ring(&mut table, protocol);
    table
}

fn constants(table: &mut Table) {
    table.number("BLKIF_OP_READ", op::READ);
    table.number("BLKIF_OP_WRITE", op::WRITE);
    table.number("BLKIF_OP_WRITE_BARRIER", op::WRITE_BARRIER);
    table.number("BLKIF_OP_FLUSH_DISKCACHE", op::FLUSH_DISKCACHE);
    table.number("BLKIF_OP_DISCARD", op::DISCARD);
    table.number("BLKIF_OP_INDIRECT", op::INDIRECT);
    table.number("BLKIF_RSP_OKAY", Status::Okay as i16);
    table.number("BLKIF_RSP_ERROR", Status::Error as i16);
    table.number("BLKIF_RSP_EOPNOTSUPP", Status::NotSupported as i16);
    table.number("BLKIF_MAX_SEGMENTS_PER_REQUEST", SEGMENTS_PER_REQUEST);
    table.number("BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST", INDIRECT_PAGES_PER_REQUEST);
}

fn sizes(table: &mut Table, protocol: Protocol) {
    table.number("sizeof(union blkif_sring_entry)", protocol.entry_bytes());
    table.number("sizeof(struct blkif_request_segment)", SEGMENT_BYTES);
    let per_page = format!("{PAGE_BYTES} / sizeof(struct blkif_request_segment)");
    table.number(per_page, SEGMENTS_PER_INDIRECT_PAGE);
    for pages in 1..=RING_PAGES_MAX {
        let bytes = pages * PAGE_BYTES;
        table.number(format!("__CONST_RING_SIZE(blkif, {bytes})"), ring_entries(bytes, protocol));
    }
}

fn requests(table: &mut Table, protocol: Protocol) {
    for count in [0, 1, SEGMENTS_PER_REQUEST] {
        let (request, c_value) = direct(count);
        request_example(table, protocol, "struct blkif_request", c_value, request.into());
    }
    let (request, c_value) = indirect();
    request_example(table, protocol, "struct blkif_request_indirect", c_value, request);
    let (request, c_value) = discard();
    request_example(table, protocol, "struct blkif_request_discard", c_value, request);
}

/// Adds a request that polldisk must write as C does, and must read from the bytes that C wrote.
fn request_example(
    table: &mut Table,
    protocol: Protocol,
    c_type: &str,
    c_value: String,
    request: RawRequest,
) {
    let judge = move |theirs: &[u8]| {
        let page = LocalPages::new(1).into_shared();
        store_request(&page, ENTRY, protocol, &request);
        same_bytes(&bytes_of(&page, ENTRY), theirs)?;
        let back = load_request(&page_holding(ENTRY, theirs), ENTRY, protocol);
        if back == request { Ok(()) } else { Err(format!("reads back as {back:x?}")) }
    };
    table.example(c_type, c_value, Box::new(judge));
}

fn direct(count: usize) -> (RawDirect, String) {
    let mut request = RawDirect::new(op::WRITE, ID, SECTOR);
    request.handle = HANDLE;
    let mut c_segments = String::new();
    for (index, segment) in (0u8..).zip(&mut request.segments[..count]) {
        let gref = 0x4142_4300 + u32::from(index);
        *segment = RawSegment { gref, first: 0x50 + index, last: 0x60 + index };
        c_segments += &c_segment(segment);
        request.nr_segments = index + 1;
    }
    let c_value = format!(
        "{{ .operation = BLKIF_OP_WRITE, .nr_segments = {count}, .handle = {HANDLE}, \
         .id = {ID}ULL, .sector_number = {SECTOR}ULL, .seg = {{ {c_segments} }} }}"
    );
    (request, c_value)
}

fn c_segment(RawSegment { gref, first, last }: &RawSegment) -> String {
    format!("{{ .gref = {gref}, .first_sect = {first}, .last_sect = {last} }},")
}

fn indirect() -> (RawRequest, String) {
    let pages = [6, 7, 8, 9, 10, 11, 12, 13].map(|byte| 0x4142_4300 + byte);
    let request = RawIndirect {
        operation: op::WRITE,
        nr_segments: 0x0102,
        id: ID,
        sector: SECTOR,
        handle: HANDLE,
        pages,
    };
    let c_value = format!(
        "{{ .operation = BLKIF_OP_INDIRECT, .indirect_op = BLKIF_OP_WRITE, \
         .nr_segments = 0x0102, .id = {ID}ULL, .sector_number = {SECTOR}ULL, \
         .handle = {HANDLE}, .indirect_grefs = {{ {} }} }}",
        pages.map(|gref| gref.to_string()).join(", ")
    );
    (RawRequest::Indirect(request), c_value)
}

fn discard() -> (RawRequest, String) {
    let nr_sectors = 0x4142_4344_4546_4748;
    let request = RawDiscard { flag: 1, handle: HANDLE, id: ID, sector: SECTOR, nr_sectors };
    let c_value = format!(
        "{{ .operation = BLKIF_OP_DISCARD, .flag = BLKIF_DISCARD_SECURE, .handle = {HANDLE}, \
         .id = {ID}ULL, .sector_number = {SECTOR}ULL, .nr_sectors = {nr_sectors}ULL }}"
    );
    (RawRequest::Discard(request), c_value)
}

fn response(table: &mut Table, protocol: Protocol) {
    let response = RawResponse { id: ID, operation: op::INDIRECT, status: -2 };
    let judge = move |theirs: &[u8]| {
        let page = LocalPages::new(1).into_shared();
        store_response(&page, ENTRY, protocol, &response);
        same_bytes(&bytes_of(&page, ENTRY), theirs)?;
        let back = load_response(&page_holding(ENTRY, theirs), ENTRY, protocol);
        if back == response { Ok(()) } else { Err(format!("reads back as {back:x?}")) }
    };
    let c_value = format!(
        "{{ .id = {ID}ULL, .operation = BLKIF_OP_INDIRECT, .status = BLKIF_RSP_EOPNOTSUPP }}"
    );
    table.example("struct blkif_response", c_value, Box::new(judge));
}

/// Adds a single segment, as the pages of an indirect request hold it.
fn segment(table: &mut Table) {
    let segment = RawSegment { gref: 0x4142_4344, first: 5, last: 7 };
    let c_value = c_segment(&segment);
    let judge = move |theirs: &[u8]| {
        same_bytes(&segment.to_word().to_le_bytes(), theirs)?;
        let back =
            theirs.first_chunk().map(|word| RawSegment::from_word(u64::from_le_bytes(*word)));
        if back == Some(segment) { Ok(()) } else { Err(format!("reads back as {back:x?}")) }
    };
    table.example(
        "struct blkif_request_segment",
        c_value.trim_end_matches(',').into(),
        Box::new(judge),
    );
}

/// Adds a ring before and after polldisk answered the only request in it. The indices are chosen so that
/// swapped indices or a wrong place of the entries are noticed. The request's last part, which the response
/// does not overwrite, is zero.
fn whole_ring(table: &mut Table, protocol: Protocol) {
    let c_type = "struct { struct blkif_sring before, after; }";
    let c_value = format!(
        "{{ .before = {{ .req_prod = 33, .req_event = 7, .rsp_prod = 32, .rsp_event = 33, \
         .ring = {{ {{ .req = {{ .operation = BLKIF_OP_FLUSH_DISKCACHE, .id = {ID}ULL }} }} }} }}, \
         .after = {{ .req_prod = 33, .req_event = 34, .rsp_prod = 33, .rsp_event = 33, \
         .ring = {{ {{ .rsp = {{ .operation = BLKIF_OP_FLUSH_DISKCACHE, .id = {ID}ULL, \
         .status = BLKIF_RSP_ERROR }} }} }} }} }}"
    );
    let ring_bytes = ENTRY + protocol.entry_bytes();
    let judge = move |theirs: &[u8]| {
        let (before, after) = theirs.split_at(ring_bytes);
        let page = serve_one(page_holding(0, before), protocol)?;
        same_bytes(&bytes_of(&page, 0)[..ring_bytes], &after[..ring_bytes])
    };
    table.example(c_type, c_value, Box::new(judge));
    table.number("sizeof(struct blkif_sring)", ring_bytes);
}

/// Takes and answers the request in a ring, and returns the ring's memory.
fn serve_one(page: SharedPage, protocol: Protocol) -> Result<SharedPage, String> {
    let mut ring = BackRing::attach(page, protocol).map_err(|(fault, _)| fault.to_string())?;
    let waiting = ring.requests();
    if waiting != Ok(1) {
        return Err(format!("{waiting:?} requests are waiting"));
    }
    let request = ring.take();
    if request != RawDirect::new(op::FLUSH_DISKCACHE, ID, 0).into() {
        return Err(format!("the request in the ring is {request:x?}"));
    }
    ring.answer(&RawResponse::new(request.id(), request.operation(), Status::Error));
    if !ring.publish() {
        return Err("the frontend is not notified".into());
    }
    if ring.arm() {
        return Err("another request is waiting".into());
    }
    Ok(ring.into_page())
}

fn bytes_of(page: &SharedPage, at: usize) -> Vec<u8> {
    let words: [u32; EXAMPLE_BYTES / 4] = page.load(at);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn page_holding(at: usize, bytes: &[u8]) -> SharedPage {
    let page = LocalPages::new(1).into_shared();
    let words: Vec<u32> =
        bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
    page.store(at, &words);
    page
}
