//! How much of each block device's request queue the rings of one worker use.
//!
//! If all tags of a device are taken the kernel has the next one who submits to a file sleep until one is free
//! ([`RequestQueue`]). It would have the worker sleep, and all of its guests wait for that device. So the
//! worker has requests for a part of the tags only, and what finds none stays on its ring: more would make
//! nothing faster, because beyond that a request waits in the kernel as well as on the ring.
//!
//! What the kernel makes of a request is known for a file in one piece. A guest can see to it that its file
//! is in as many pieces as pages. So as soon as the tags could be too few at that, threads of the kernel
//! submit ([`By::Thread`]), and sleep in place of the worker.

use slab::Slab;

use crate::backing::{Image, RequestQueue};
use crate::engine::By;
use crate::limits::{DEVICE_TAGS_COMMON_DIVISOR, DEVICE_TAGS_PER_QUEUE, device_tags_of_worker};
use crate::pool::{Pool, Share};

/// The devices that rings of this worker have their disks on.
#[derive(Debug)]
pub struct Devices {
    /// Workers that have requests on the same devices.
    workers: usize,
    devices: Slab<Device>,
}

#[derive(Debug)]
struct Device {
    number: u64,
    tags: Pool,
    /// Tags that what is in flight would take, each page of data in a request of its own,
    pages: usize,
    /// ... and up to how many the worker submits itself.
    most: usize,
    rings: usize,
}

/// What a ring uses of a device.
#[derive(Debug)]
pub struct DeviceShare {
    device: usize,
    share: Share,
    /// Pages of data that go into one request of the device.
    pages: usize,
}

impl DeviceShare {
    /// How many requests the kernel makes of one with this number of segments, if the file is in one piece.
    /// A flush or discard has no segments.
    fn requests(&self, segments: usize) -> usize {
        segments.div_ceil(self.pages).max(1)
    }
}

impl Devices {
    /// None yet; `workers` is how many the host has.
    pub fn new(workers: usize) -> Devices {
        Devices { workers, devices: Slab::new() }
    }

    /// What a ring that serves this image will use of its device, if it goes to one.
    pub fn join(&mut self, image: &Image) -> Option<DeviceShare> {
        image.request_queue().map(|queue| self.join_queue(&queue))
    }

    fn join_queue(&mut self, queue: &RequestQueue) -> DeviceShare {
        let there = self.devices.iter().find(|(_, device)| device.number == queue.device);
        let device = match there {
            Some((index, _)) => index,
            None => {
                let workers = self.workers.div_ceil(queue.hardware_queues.max(1));
                self.devices.insert(Device::new(queue.device, queue.tags / workers.max(1)))
            }
        };
        self.devices[device].rings += 1;
        DeviceShare { device, share: Share::default(), pages: queue.pages.max(1) }
    }

    /// A ring of which nothing is in flight leaves its device.
    pub fn leave(&mut self, share: Option<DeviceShare>) {
        let Some(share) = share else { return };
        assert_eq!(share.share.used(), 0, "nothing is in flight");
        let device = &mut self.devices[share.device];
        device.rings -= 1;
        if device.rings == 0 {
            self.devices.remove(share.device);
        }
    }

    /// Whether a ring can have one more request under way.
    #[inline(always)]
    pub fn has_room(&self, share: &Option<DeviceShare>) -> bool {
        share.as_ref().is_none_or(|share| self.has_tags(share))
    }

    #[inline(never)]
    fn has_tags(&self, share: &DeviceShare) -> bool {
        self.devices[share.device].tags.available(&share.share) > 0
    }

    /// Who is to submit what was taken.
    #[inline(always)]
    pub fn submitter(&self, share: &Option<DeviceShare>) -> By {
        share.as_ref().map_or(By::Worker, |share| self.submitter_to(share))
    }

    #[inline(never)]
    fn submitter_to(&self, share: &DeviceShare) -> By {
        let device = &self.devices[share.device];
        if device.pages > device.most { By::Thread } else { By::Worker }
    }

    /// A request with this number of segments gets under way.
    #[inline(always)]
    pub fn take(&mut self, share: &mut Option<DeviceShare>, segments: usize) {
        if let Some(share) = share {
            self.take_tags(share, segments);
        }
    }

    #[inline(never)]
    fn take_tags(&mut self, share: &mut DeviceShare, segments: usize) {
        let requests = share.requests(segments);
        let device = &mut self.devices[share.device];
        device.pages += segments.max(1);
        device.tags.take_beyond(&mut share.share, requests);
    }

    /// It is done.
    #[inline(always)]
    pub fn give_back(&mut self, share: &mut Option<DeviceShare>, segments: usize) {
        if let Some(share) = share {
            self.give_back_tags(share, segments);
        }
    }

    #[inline(never)]
    fn give_back_tags(&mut self, share: &mut DeviceShare, segments: usize) {
        let requests = share.requests(segments);
        let device = &mut self.devices[share.device];
        device.pages -= segments.max(1);
        device.tags.give_back(&mut share.share, requests);
    }
}

impl Device {
    fn new(number: u64, tags: usize) -> Device {
        let common = (tags / DEVICE_TAGS_COMMON_DIVISOR).max(1);
        let most = device_tags_of_worker(tags);
        Device { number, tags: Pool::new(DEVICE_TAGS_PER_QUEUE, common), pages: 0, most, rings: 0 }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const QUEUE: RequestQueue = RequestQueue { device: 7, tags: 64, hardware_queues: 1, pages: 8 };

    fn join(devices: &mut Devices, queue: RequestQueue) -> Option<DeviceShare> {
        Some(devices.join_queue(&queue))
    }

    /// Requests of `segments` segments that a ring can have under way.
    fn take_all(devices: &mut Devices, share: &mut Option<DeviceShare>, segments: usize) -> usize {
        let mut taken = 0;
        while devices.has_room(share) {
            devices.take(share, segments);
            taken += 1;
        }
        taken
    }

    #[test]
    fn a_greedy_ring_leaves_others_their_part_and_threads_submit_what_may_find_no_tag() {
        let mut devices = Devices::new(1);
        let mut greedy = join(&mut devices, QUEUE);
        assert_eq!(take_all(&mut devices, &mut greedy, 1), 32 + DEVICE_TAGS_PER_QUEUE);
        let mut others: Vec<_> = (0..100).map(|_| join(&mut devices, QUEUE)).collect();
        for (ring, other) in others.iter_mut().enumerate() {
            assert_eq!(take_all(&mut devices, other, 0), DEVICE_TAGS_PER_QUEUE);
            let taken = 32 + DEVICE_TAGS_PER_QUEUE * (ring + 2);
            let by = if taken > 48 { By::Thread } else { By::Worker };
            assert_eq!(devices.submitter(other), by, "{taken} of 64");
        }
        devices.give_back(&mut greedy, 1);
        assert!(devices.has_room(&greedy) && devices.has_room(&others[99]));
    }

    #[test]
    fn large_requests_count_for_what_the_kernel_makes_of_them() {
        let mut devices = Devices::new(1);
        let mut share = join(&mut devices, QUEUE);
        assert_eq!(
            take_all(&mut devices, &mut share, 32),
            (32 + DEVICE_TAGS_PER_QUEUE).div_ceil(4)
        );
        for _ in 0..9 {
            devices.give_back(&mut share, 32);
        }
        assert_eq!(take_all(&mut devices, &mut share, 9), (32 + DEVICE_TAGS_PER_QUEUE).div_ceil(2));
        assert_eq!(devices.submitter(&share), By::Thread, "they may be in as many pieces as pages");
    }

    #[test]
    fn workers_share_the_tags_of_a_hardware_queue() {
        let most = |workers, hardware_queues| {
            let mut devices = Devices::new(workers);
            let mut share = join(&mut devices, RequestQueue { hardware_queues, ..QUEUE });
            take_all(&mut devices, &mut share, 1)
        };
        let alone = 32 + DEVICE_TAGS_PER_QUEUE;
        let halved = 16 + DEVICE_TAGS_PER_QUEUE;
        assert_eq!(
            [most(2, 1), most(2, 2), most(4, 2), most(2, 8)],
            [halved, alone, halved, alone]
        );
        assert!(most(1000, 1) > 0, "there is always one");
    }

    #[test]
    fn a_device_is_forgotten_with_its_last_ring() {
        let mut devices = Devices::new(1);
        let (one, two) = (join(&mut devices, QUEUE), join(&mut devices, QUEUE));
        devices.leave(one);
        assert_eq!(devices.devices.len(), 1);
        devices.leave(two);
        assert!(devices.devices.is_empty());
    }
}
