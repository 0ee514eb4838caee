//! Several queues of one disk.

use crate::draw::{Combination, Request};
use crate::guest::{Disk, Guest};
use crate::workers::Rig;
use polldisk::blkif::op;

#[test]
fn queues_of_one_disk_are_served_by_different_workers_and_share_its_data() {
    let mut rig = Rig::start();
    let bad_gref = rig.domain.reserve_refs(1).unwrap()[0];
    let mut disk = Disk::new(1, bad_gref);
    let combination = Combination { queues: 2, ..Combination::default() };
    let devices = rig.connect(&combination);
    let mut guest = Guest::new(&mut disk, combination, devices);
    let read = |queue, place: u64| Request::read(queue, place * 8, 1, false);
    let write = |queue, place| Request { operation: op::WRITE, ..read(queue, place) };
    for place in 0..32 {
        guest.play([write(0, place), write(1, 32 + place)]);
        guest.play([read(1, place), read(0, 32 + place)]);
    }
    for (worker, queue, answered) in
        [(0, 0, Some(64)), (1, 1, Some(64)), (0, 1, None), (1, 0, None)]
    {
        assert_eq!(rig.answered(worker, queue), answered, "queue {queue} on worker {worker}");
    }
    rig.disconnect(guest.into_devices());
}
