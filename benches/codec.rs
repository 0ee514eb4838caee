//! Entries of a ring and pages of segments, in and out of shared memory, as many entries as a small
//! ring has. `ring.rs` measures the ring around them.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use polldisk::blkif::codec::{
    RawDirect, RawDiscard, RawIndirect, RawRequest, RawResponse, RawSegment, SEGMENT_BYTES,
    load_request, store_request, store_response,
};
use polldisk::blkif::{Protocol, Status, op};
use polldisk::xen::shm::LocalPages;

const PROTOCOLS: [(&str, Protocol); 2] =
    [("x86_64", Protocol::X86_64), ("x86_32", Protocol::X86_32)];

/// Entries of a ring of one page.
const ENTRIES: usize = 32;

/// Offset of the first entry, in bytes.
const FIRST_ENTRY: usize = 64;

const SEGMENT: RawSegment = RawSegment { gref: 8, first: 0, last: 7 };

/// Offsets of a ring's entries, in bytes.
fn places(protocol: Protocol) -> impl Iterator<Item = usize> {
    (0..ENTRIES).map(move |index| FIRST_ENTRY + index * protocol.entry_bytes())
}

fn direct(segments: u8) -> RawRequest {
    let mut request = RawDirect::new(op::READ, 7, 64);
    request.nr_segments = segments;
    request.segments[..segments.into()].fill(SEGMENT);
    request.into()
}

fn indirect(segments: u16) -> RawRequest {
    RawRequest::Indirect(RawIndirect {
        operation: op::READ,
        nr_segments: segments,
        id: 7,
        sector: 64,
        handle: 0,
        pages: [8; 8],
    })
}

fn discard() -> RawRequest {
    RawRequest::Discard(RawDiscard { flag: 0, handle: 0, id: 7, sector: 64, nr_sectors: 64 })
}

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(ENTRIES as u64));
    for (layout, protocol) in PROTOCOLS {
        for (name, request) in [
            ("direct requests of 1 segment", direct(1)),
            ("direct requests of 11 segments", direct(11)),
            ("indirect requests without their segments", indirect(256)),
            ("discards", discard()),
        ] {
            let page = LocalPages::new(1).into_shared();
            places(protocol).for_each(|at| store_request(&page, at, protocol, &request));
            group.bench_function(format!("{ENTRIES} {name} decoded, {layout}"), |bencher| {
                bencher.iter(|| {
                    for at in places(black_box(protocol)) {
                        black_box(&load_request(&page, at, protocol));
                    }
                });
            });
        }
    }
    group.finish();
}

fn responses(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    group.throughput(Throughput::Elements(ENTRIES as u64));
    for (layout, protocol) in PROTOCOLS {
        let page = LocalPages::new(1).into_shared();
        group.bench_function(format!("{ENTRIES} responses encoded, {layout}"), |bencher| {
            bencher.iter(|| {
                for (id, at) in (0u64..).zip(places(black_box(protocol))) {
                    let response = RawResponse::new(black_box(id), op::READ, Status::Okay);
                    store_response(&page, at, protocol, &response);
                }
            });
        });
    }
    group.finish();
}

/// The segments of an indirect request, from a mapped page. They look the same in all layouts.
fn segments(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("codec");
    for count in [32, 256, 512] {
        let memory = LocalPages::new(1);
        let words = vec![SEGMENT.to_word().to_le_bytes(); count];
        let written = words.as_flattened();
        let page = memory.page(0).part(0, written.len().try_into().unwrap()).unwrap();
        page.copy_from(written);
        let mut bytes = vec![0; count * SEGMENT_BYTES];
        let mut segments = vec![RawSegment::default(); count];
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("{count} indirect segments decoded"), |bencher| {
            bencher.iter(|| {
                page.copy_to(&mut bytes);
                let words = black_box(&bytes).as_chunks::<SEGMENT_BYTES>().0;
                for (segment, word) in segments.iter_mut().zip(words) {
                    *segment = RawSegment::from_word(u64::from_le_bytes(*word));
                }
                black_box(&segments);
            });
        });
    }
    group.finish();
}

criterion_group!(benches, requests, responses, segments);
criterion_main!(benches);
