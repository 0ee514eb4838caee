//! More in flight than a worker has tables, bounce memory or room in io_uring for: the rest waits.

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::limits::{BOUNCE_PAGES_COMMON, PERSISTENT_GRANTS_PER_QUEUE, TABLES_COMMON};
use polldisk::msg::GrantMode;
use polldisk::sim::blkfront::device::Options;
use polldisk::units::Bytes;

use crate::draw::{Combination, Request, SECTORS};
use crate::guest::{Disk, Guest};
use crate::workers::Rig;

/// Writes and reads back `requests` places of `pages` pages, each time as one batch for all queues,
/// with pages kept mapped, mapped for each request, and with data copied.
fn play_batches(queues: usize, requests: usize, pages: usize) {
    let mut rig = Rig::start();
    let bad_gref = rig.domain.reserve_refs(1).unwrap()[0];
    let mut disk = Disk::new(1, bad_gref);
    let options = Options {
        buffers: requests / queues,
        ring_order: 5,
        segments: pages.max(12),
        ..Options::default()
    };
    for (persistent, grant_mode) in
        [(true, GrantMode::Persistent), (false, GrantMode::Map), (false, GrantMode::Copy)]
    {
        let combination = Combination {
            queues,
            options: Options { persistent, ..options },
            grant_mode,
            offered_segments: 512,
            ..Combination::default()
        };
        let devices = rig.connect(&combination);
        let mut guest = Guest::new(&mut disk, combination, devices);
        let places = (SECTORS / 8) / pages as u64;
        let batch = |operation| {
            (0..requests).map(move |number| {
                let place = number as u64 % places * 8 * pages as u64;
                let read = Request::read(number % queues, place, pages, true);
                Request { operation, publish: false, ..read }
            })
        };
        guest.play(batch(op::WRITE).take(usize::try_from(places).unwrap()));
        guest.play(batch(op::READ));
        rig.disconnect(guest.into_devices());
    }
}

#[test]
fn more_indirect_requests_than_tables_wait_in_their_ring() {
    const REQUESTS: usize = 600;
    const { assert!(REQUESTS > TABLES_COMMON) };
    play_batches(1, REQUESTS, 1);
}

#[test]
fn more_data_than_bounce_memory_or_mapped_pages_waits_or_is_copied() {
    const REQUESTS: usize = 12;
    const PAGES: usize = 512;
    // Queues 0 and 2 are on one worker.
    const { assert!(REQUESTS / 2 * PAGES > BOUNCE_PAGES_COMMON) };
    const { assert!(REQUESTS / 4 * PAGES > PERSISTENT_GRANTS_PER_QUEUE) };
    play_batches(4, REQUESTS, PAGES);
}

/// The disk completes each request at once, so no later completion brings the worker back to the
/// requests that wait.
#[test]
fn more_data_than_bounce_memory_waits_on_a_disk_without_contents_too() {
    const REQUESTS: usize = 12;
    const PAGES: usize = 512;
    const { assert!(REQUESTS * PAGES > 2 * BOUNCE_PAGES_COMMON) };
    let mut rig = Rig::start();
    let bad_gref = rig.domain.reserve_refs(1).unwrap()[0];
    let mut disk = Disk::new(1, bad_gref);
    let options = Options {
        buffers: REQUESTS,
        segments: PAGES,
        persistent: false,
        ring_order: 1,
        ..Options::default()
    };
    let combination = Combination {
        options,
        grant_mode: GrantMode::Copy,
        offered_segments: 512,
        ..Combination::default()
    };
    let image = Image::Null(NullImage::new(Bytes(SECTORS * 512), true));
    let devices = rig.connect_to(image, &combination);
    let mut guest = Guest::new(&mut disk, combination, devices);
    guest.play(
        (0..REQUESTS).map(|_| Request { publish: false, ..Request::read(0, 0, PAGES, true) }),
    );
    rig.disconnect(guest.into_devices());
}
