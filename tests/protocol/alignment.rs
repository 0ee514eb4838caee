//! Storage that takes only buffers at some addresses, and a guest whose data begins anywhere in its pages.

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::limits::SEGMENTS_MAPPED_MIN;
use polldisk::msg::GrantMode;
use polldisk::units::Bytes;

use crate::scripted::{Shape, bench};

const SEGMENTS: usize = SEGMENTS_MAPPED_MIN;

/// Writes whole pages but for the last, which begins at this sector of its page. How far from alignment
/// the buffers were that storage got, and how many segments were copied to bounce memory.
fn write(shape: Shape, memory_alignment: u16, last_from: u8) -> (usize, u64) {
    let (mut bench, script) = bench();
    let image = NullImage::new(Bytes(1 << 30), false).with_memory_alignment(memory_alignment);
    let guest = bench.guest_on(shape, Image::Null(image));
    script.borrow_mut().hung.insert(guest);
    let device = &mut bench.guests[guest];
    let buffer = device.free_buffer().unwrap();
    let first = |page| if page + 1 < SEGMENTS { 0 } else { last_from };
    let segments: Vec<_> =
        (0..SEGMENTS).map(|page| device.segment(buffer, page, first(page), 7)).collect();
    let request = device.direct(op::WRITE, 0, &segments);
    device.put_request(&request.into(), SEGMENTS);
    device.publish().unwrap();
    assert!(bench.settle());
    let taken = &script.borrow().taken;
    assert_eq!(taken.len(), 1);
    (taken[0].misaligned, bench.counters[guest].grants_copied.get())
}

#[test]
fn data_that_is_not_aligned_as_storage_wants_is_bounced() {
    let map = Shape { grant_mode: GrantMode::Map, ..Shape::copied(2) };
    for shape in [Shape::mapped(2), map] {
        for (memory_alignment, last_from) in [(4096, 1), (4096, 4), (1024, 1), (1024, 3)] {
            let bounced = write(shape, memory_alignment, last_from);
            assert_eq!(bounced, (0, SEGMENTS as u64), "{shape:?}, {memory_alignment}");
        }
        for (memory_alignment, last_from) in [(4096, 0), (1024, 2), (512, 1), (1, 1)] {
            let in_place = write(shape, memory_alignment, last_from);
            assert_eq!(in_place, (usize::from(last_from) * 512, 0), "{memory_alignment}");
        }
    }
}
