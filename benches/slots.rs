//! The life of requests in a queue's slots: taken, begun, pointed at their data, advanced to their
//! end and given back. As many are in flight as a small ring has entries; no I/O is done.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use polldisk::blkif::op;
use polldisk::blkif::request::{Kind, Request, Segment};
use polldisk::pool::Share;
use polldisk::queue::LargeTables;
use polldisk::queue::slots::{Advance, Slots};
use polldisk::xen::shm::{GuestBuf, LocalPages, PAGE_LEN};

/// Requests in flight.
const REQUESTS: u32 = 32;

const SEGMENT: Segment = Segment { gref: 8, offset: 0, len: 4096 };

/// Slots, and what their requests need. All segments have their data in one page.
struct Rig {
    slots: Slots,
    tables: LargeTables,
    share: Share,
    page: GuestBuf,
    in_flight: Vec<u32>,
    _memory: LocalPages,
}

impl Rig {
    fn new() -> Rig {
        let memory = LocalPages::new(1);
        Rig {
            slots: Slots::new(REQUESTS),
            tables: LargeTables::default(),
            share: Share::default(),
            page: memory.page(0),
            in_flight: Vec::new(),
            _memory: memory,
        }
    }

    fn begin_direct(&mut self, count: usize) {
        let (index, slot) = self.slots.take();
        slot.inline_segments_mut()[..count].fill(SEGMENT);
        slot.begin(request(count), count, None, 0);
        self.in_flight.push(index);
        self.locate();
    }

    fn begin_indirect(&mut self, count: usize) {
        let mut table = self.tables.take(&mut self.share).unwrap();
        table.segments_mut(count).fill(SEGMENT);
        let (index, slot) = self.slots.take();
        slot.begin(request(count), count, Some(table), 0);
        self.in_flight.push(index);
        self.locate();
    }

    /// Points the segments of the last request at their data.
    fn locate(&mut self) {
        let last = *self.in_flight.last().unwrap();
        let (segments, buffers) = self.slots.get_mut(last).segments_and_buffers();
        black_box(segments);
        buffers.fill(self.page);
    }

    /// Ends all requests.
    fn finish(&mut self) {
        for index in self.in_flight.drain(..) {
            let slot = self.slots.get_mut(index);
            slot.with_buffers(usize::MAX, |buffers| {
                black_box(buffers);
            });
            let moved = i32::try_from(slot.request.len_bytes).unwrap();
            assert_eq!(slot.advance(black_box(moved)), Advance::Done);
            if let Some(table) = self.slots.give_back(index) {
                self.tables.give_back(table, &mut self.share);
            }
        }
    }
}

fn request(count: usize) -> Request {
    let len_bytes = count as u64 * u64::from(PAGE_LEN);
    let request =
        Request { id: 7, operation: op::READ, kind: Kind::Read, offset_bytes: 4096, len_bytes };
    black_box(request)
}

fn lives(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("slots");
    group.throughput(Throughput::Elements(REQUESTS.into()));
    for count in [1, 11] {
        let mut rig = Rig::new();
        group.bench_function(format!("{REQUESTS} direct requests, segments: {count}"), |bencher| {
            bencher.iter(|| {
                (0..REQUESTS).for_each(|_| rig.begin_direct(count));
                rig.finish();
            });
        });
    }
    // Tables of one length are only filled; if lengths differ, tables also grow.
    for (name, counts) in
        [("12", [12, 12]), ("256", [256, 256]), ("1024", [1024, 1024]), ("12 or 256", [12, 256])]
    {
        let mut rig = Rig::new();
        group.bench_function(
            format!("{REQUESTS} indirect requests, segments: {name}"),
            |bencher| {
                bencher.iter(|| {
                    (0..REQUESTS as usize).for_each(|nth| rig.begin_indirect(counts[nth % 2]));
                    rig.finish();
                });
            },
        );
    }
    group.finish();
}

criterion_group!(benches, lives);
criterion_main!(benches);
