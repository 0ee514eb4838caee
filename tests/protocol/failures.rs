//! Requests that fail late, when no other request's answer is there to be published with theirs.

use polldisk::backing::{Image, NullImage};
use polldisk::blkif::op;
use polldisk::limits::BOUNCE_PAGES_COMMON;
use polldisk::msg::GrantMode;
use polldisk::sim::blkfront::device::Options;
use polldisk::units::Bytes;

use crate::draw::{Combination, Fault, Request, SECTORS};
use crate::guest::{Disk, Guest};
use crate::workers::Rig;

/// Half of a worker's bounce memory.
const PAGES: usize = BOUNCE_PAGES_COMMON / 2;

/// Plays requests on a ring whose data is copied, on a disk that completes everything in the pass
/// that takes it.
fn play(requests: Vec<Request>) {
    let mut rig = Rig::start();
    let bad_gref = rig.domain.reserve_refs(1).unwrap()[0];
    let mut disk = Disk::new(1, bad_gref);
    let options = Options { persistent: false, segments: PAGES, buffers: 3, ..Options::default() };
    let combination = Combination {
        options,
        grant_mode: GrantMode::Copy,
        offered_segments: u16::try_from(PAGES).unwrap(),
        ..Combination::default()
    };
    let null = NullImage::new(Bytes(SECTORS * 512), true);
    let devices = rig.connect_to(Image::Null(null), &combination);
    let mut guest = Guest::new(&mut disk, combination, devices);
    guest.play(requests);
    rig.disconnect(guest.into_devices());
}

/// A request whose data cannot be fetched; it is not published by itself.
fn failing(operation: u8, indirect: bool) -> Request {
    let fault = Some(Fault::Grant { index: 0, absurd: false });
    Request { operation, fault, publish: false, ..Request::read(0, 0, 1, indirect) }
}

#[test]
fn a_barrier_that_fails_before_it_begins_is_answered() {
    play(vec![failing(op::WRITE_BARRIER, false)]);
}

#[test]
fn a_request_that_waited_for_bounce_memory_and_then_fails_is_answered() {
    let hoard = Request { publish: false, ..Request::read(0, 0, PAGES, true) };
    play(vec![hoard.clone(), hoard, failing(op::WRITE, true)]);
}
