//! A whole request on a null disk, both ends in one thread: written by the guest, taken, checked,
//! located, submitted, completed, answered, and taken by the guest.
#![allow(missing_docs, unsafe_code)]

mod rig;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use polldisk::blkif::op;
use polldisk::sim::blkfront::device::Options;
use rig::Rig;

const KIB: usize = 1024;

fn requests(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("request");
    for (name, persistent, count, len) in [
        ("mapped 4 KiB, 1 at a time", true, 1, 4 * KIB),
        ("mapped 4 KiB, 32 at a time", true, 32, 4 * KIB),
        ("mapped 44 KiB, 32 at a time", true, 32, 44 * KIB),
        ("copied 4 KiB, 32 at a time", false, 32, 4 * KIB),
    ] {
        let mut rig = Rig::connect("null:1G", Options { persistent, ..Options::default() });
        group.throughput(Throughput::Elements(count));
        group.bench_function(name, |bencher| bencher.iter(|| rig.batch(op::READ, count, len)));
    }
    let options = Options { segments: 64, ..Options::default() };
    let mut rig = Rig::connect("null:1G", options);
    group.throughput(Throughput::Elements(16));
    group.bench_function("indirect 256 KiB, 16 at a time", |bencher| {
        bencher.iter(|| rig.batch(op::READ, 16, 256 * KIB));
    });
    group.finish();
}

criterion_group!(benches, requests);
criterion_main!(benches);
