//! The ring alone: entries in and out, without executing any request. The cost of both ends here
//! is the least that a request can cost.
#![allow(missing_docs, unsafe_code)]

use std::ptr::NonNull;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use polldisk::blkif::codec::{RawDirect, RawRequest, RawResponse, RawSegment};
use polldisk::blkif::ring::{BackRing, FrontRing};
use polldisk::blkif::{Protocol, Status, op};
use polldisk::xen::shm::{LocalPages, SharedPage};

fn ends(memory: &LocalPages, protocol: Protocol) -> (FrontRing, BackRing) {
    let address: NonNull<u8> = memory.page(0).address();
    // SAFETY: the page lives as long as both ends do.
    let page = || unsafe { SharedPage::from_raw(address, 4096) };
    let front = FrontRing::init(page(), protocol);
    (front, BackRing::attach(page(), protocol).unwrap())
}

fn round_trips(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ring");
    group.throughput(Throughput::Elements(32));
    for (name, protocol) in [("x86_64", Protocol::X86_64), ("x86_32", Protocol::X86_32)] {
        let memory = LocalPages::new(1);
        let (mut front, mut back) = ends(&memory, protocol);
        let mut request = RawDirect::new(op::READ, 0, 0);
        request.nr_segments = 1;
        request.segments[0] = RawSegment { gref: 8, first: 0, last: 7 };
        let request = RawRequest::Direct(request);
        group.bench_function(format!("32 requests and responses, {name}"), |bencher| {
            bencher.iter(|| {
                for _ in 0..32 {
                    front.put(&request);
                }
                front.publish();
                for _ in 0..back.requests().unwrap() {
                    let taken = back.take();
                    back.answer(&RawResponse::new(taken.id(), taken.operation(), Status::Okay));
                }
                back.publish();
                while front.next_response().is_some() {}
            });
        });
    }
    group.finish();
}

criterion_group!(benches, round_trips);
criterion_main!(benches);
