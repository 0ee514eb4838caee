//! How much of each block device's request queue the rings of one worker use.
//!
//! If all tags of a device are taken, the kernel puts the next thread that submits to a file to sleep until
//! one is free ([`RequestQueue`]). If that thread were the worker, all of its guests would wait for that
//! device. So the worker uses only a part of the tags, and requests beyond that stay on their rings. This
//! slows nothing down: they would only wait in the kernel instead.
//!
//! How many tags a request takes is known only if its file is contiguous, and a guest can make its file so
//! fragmented that each page takes one. So as soon as the tags might not suffice for that, kernel threads
//! submit ([`By::Thread`]) and sleep in the worker's place.

use slab::Slab;

use crate::backing::{Image, RequestQueue};
use crate::engine::By;
use crate::limits::{DEVICE_TAGS_COMMON_DIVISOR, DEVICE_TAGS_PER_QUEUE, device_tags_of_worker};
use crate::pool::{Pool, Share};

/// The block devices that hold the disks of this worker's rings.
#[derive(Debug)]
pub struct Devices {
    /// How many workers share the devices.
    workers: usize,
    devices: Slab<Device>,
}

#[derive(Debug)]
struct Device {
    number: u64,
    tags: Pool,
    /// Tags that the requests in flight would take if each page of data took one.
    worst_tags: usize,
    /// The worker itself submits until `worst_tags` exceeds this.
    worker_submits_up_to: usize,
    rings: usize,
}

/// A ring's share of a device's tags.
#[derive(Debug)]
pub struct DeviceShare {
    device: usize,
    share: Share,
    /// Pages of data that fit into one request of the device.
    pages_per_request: usize,
}

impl DeviceShare {
    /// How many requests of the device the kernel makes of one with this number of segments, if the file is
    /// contiguous. A flush or discard has no segments.
    fn requests(&self, segments: usize) -> usize {
        segments.div_ceil(self.pages_per_request).max(1)
    }
}

impl Devices {
    /// No devices yet; `workers` is how many workers share each device.
    pub fn new(workers: usize) -> Devices {
        Devices { workers, devices: Slab::new() }
    }

    /// Adds a ring that serves this image to its device; `None`: the image is on no device with tags.
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
        DeviceShare { device, share: Share::default(), pages_per_request: queue.pages.max(1) }
    }

    /// Removes a ring, which must have nothing in flight, from its device.
    pub fn leave(&mut self, share: Option<DeviceShare>) {
        let Some(share) = share else { return };
        assert_eq!(share.share.used(), 0, "nothing is in flight");
        let device = &mut self.devices[share.device];
        device.rings -= 1;
        if device.rings == 0 {
            self.devices.remove(share.device);
        }
    }

    /// Whether a ring can start one more request.
    #[inline(always)]
    pub fn has_room(&self, share: &Option<DeviceShare>) -> bool {
        share.as_ref().is_none_or(|share| self.has_tags(share))
    }

    #[inline(never)]
    fn has_tags(&self, share: &DeviceShare) -> bool {
        self.devices[share.device].tags.available(&share.share) > 0
    }

    /// Who is to submit the ring's requests.
    #[inline(always)]
    pub fn submitter(&self, share: &Option<DeviceShare>) -> By {
        share.as_ref().map_or(By::Worker, |share| self.submitter_to(share))
    }

    #[inline(never)]
    fn submitter_to(&self, share: &DeviceShare) -> By {
        let device = &self.devices[share.device];
        if device.worst_tags > device.worker_submits_up_to { By::Thread } else { By::Worker }
    }

    /// Takes the tags of a request with this number of segments.
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
        device.worst_tags += segments.max(1);
        device.tags.take_beyond(&mut share.share, requests);
    }

    /// Gives the tags of such a request back.
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
        device.worst_tags -= segments.max(1);
        device.tags.give_back(&mut share.share, requests);
    }
}

impl Device {
    fn new(number: u64, tags: usize) -> Device {
        let common = (tags / DEVICE_TAGS_COMMON_DIVISOR).max(1);
        let (tags, worker_submits_up_to) =
            (Pool::new(DEVICE_TAGS_PER_QUEUE, common), device_tags_of_worker(tags));
        Device { number, tags, worst_tags: 0, worker_submits_up_to, rings: 0 }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    const QUEUE: RequestQueue = RequestQueue { device: 7, tags: 64, hardware_queues: 1, pages: 8 };

    fn join(devices: &mut Devices, queue: RequestQueue) -> Option<DeviceShare> {
        Some(devices.join_queue(&queue))
    }

    /// Starts as many requests of `segments` segments as a ring can; says how many.
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
        assert_eq!(devices.submitter(&share), By::Thread, "each page may take a tag");
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
        assert!(most(1000, 1) > 0, "there is always at least one");
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
