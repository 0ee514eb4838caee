//! Storage that takes only buffers at some addresses, and a guest whose data begins anywhere in its pages.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::limits::SEGMENTS_MAPPED_MIN;
use polldisk::msg::{Command, GrantMode, ReplaceImage, Report};
use polldisk::sim::disk::Script;
use polldisk::units::Bytes;

use crate::scripted::{Bench, Shape, bench, rules};

const SEGMENTS: usize = SEGMENTS_MAPPED_MIN;

fn image(memory_alignment: u16) -> Image {
    Image::Null(NullImage::new(Bytes(1 << 30), false).with_memory_alignment(memory_alignment))
}

/// A guest on such an image, whose operations stay in storage.
fn guest_on(shape: Shape, memory_alignment: u16) -> (Bench, Rc<RefCell<Script>>) {
    let (mut bench, script) = bench();
    let guest = bench.guest_on(shape, image(memory_alignment));
    script.borrow_mut().hung.insert(guest);
    (bench, script)
}

/// Writes whole pages except for the last, which begins at this sector of its page. Returns how far the buffers
/// that storage got were from page alignment, and how many segments were copied to bounce memory.
fn write(bench: &mut Bench, script: &RefCell<Script>, last_from: u8) -> (usize, u64) {
    let device = &mut bench.guests[0];
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
    (taken[0].misaligned, bench.counters[0].grants_copied.get())
}

#[test]
fn data_that_is_not_aligned_as_storage_wants_is_bounced() {
    let map = Shape { grant_mode: GrantMode::Map, ..Shape::copied(2) };
    for shape in [Shape::mapped(2), map] {
        let write = |memory_alignment, last_from| {
            let (mut bench, script) = guest_on(shape, memory_alignment);
            write(&mut bench, &script, last_from)
        };
        for (memory_alignment, last_from) in [(4096, 1), (4096, 4), (1024, 1), (1024, 3)] {
            let bounced = write(memory_alignment, last_from);
            assert_eq!(bounced, (0, SEGMENTS as u64), "{shape:?}, {memory_alignment}");
        }
        for (memory_alignment, last_from) in [(4096, 0), (1024, 2), (512, 1), (1, 1)] {
            let in_place = write(memory_alignment, last_from);
            assert_eq!(in_place, (usize::from(last_from) * 512, 0), "{memory_alignment}");
        }
    }
}

#[test]
fn what_another_image_wants_counts_once_it_is_served() {
    for (before, after, copied) in [(1, 4096, SEGMENTS as u64), (4096, 1, 0)] {
        let (mut bench, script) = guest_on(Shape::mapped(2), before);
        let (key, image) = (bench.key(0), image(after));
        let replace = ReplaceImage { key, rules: rules(&image, 0), image: Arc::new(image) };
        bench.commands.send(Command::ReplaceImage(Box::new(replace))).unwrap();
        assert!(bench.settle());
        assert!(matches!(bench.report(), Report::ImageReplaced(_)));
        assert_eq!(write(&mut bench, &script, 1).1, copied, "{after}");
    }
}
