//! How many requests a block device can have in flight, read from sysfs.

use std::ffi::OsString;
use std::fs::read_dir;

use super::device::{parse_number, sysfs, sysfs_value};

/// Bytes of a page of a guest's data.
const PAGE_BYTES: usize = 4096;

/// The kernel's request queue of a block device (`blk-mq`).
///
/// A request needs one of the device's tags. A thread that submits I/O on a file while no tag is free
/// sleeps in the kernel until one is (`blk_mq_get_tag`, `block/blk-mq-tag.c`), because filesystems do not
/// pass on io_uring's request not to wait (`REQ_NOWAIT`). If the device hangs, the thread sleeps for ever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestQueue {
    /// The device's number.
    pub device: u64,
    /// Requests that each of its hardware queues can have at a time.
    pub tags: usize,
    /// Its hardware queues. Each serves some of the host's cores.
    pub hardware_queues: usize,
    /// Pages of data that fit into one request, wherever they lie in memory.
    pub pages: usize,
}

impl RequestQueue {
    /// The queue of the device with this number. For a partition it is that of the disk, for a device made
    /// of others (device-mapper, md) that of the one with the fewest tags. `None`: there is no queue, as
    /// for a device in memory or a filesystem that does not lie on a single device.
    pub fn of(device: u64) -> Option<RequestQueue> {
        let parts = entries(device, "slaves");
        if parts.is_empty() {
            return RequestQueue::of_leaf(device);
        }
        let numbers = parts.iter().filter_map(|part| {
            let number = sysfs(device).join("slaves").join(part).join("dev");
            parse_number(&std::fs::read_to_string(number).ok()?)
        });
        numbers.filter_map(RequestQueue::of).min_by_key(|queue| queue.tags)
    }

    fn of_leaf(number: u64) -> Option<RequestQueue> {
        let device = disk(number);
        let limit = |name| sysfs_value::<usize>(device, name);
        let bytes = limit("queue/max_sectors_kb")? << 10;
        Some(RequestQueue {
            device,
            tags: limit("queue/nr_requests")?,
            hardware_queues: Some(entries(device, "mq").len()).filter(|count| *count > 0)?,
            pages: limit("queue/max_segments")?.min(bytes / PAGE_BYTES).max(1),
        })
    }
}

/// For a partition, the number of its disk; for any other device, its own.
fn disk(number: u64) -> u64 {
    let folder = sysfs(number);
    if !folder.join("partition").exists() {
        return number;
    }
    let disk = std::fs::read_to_string(folder.join("..").join("dev")).ok();
    disk.and_then(|text| parse_number(&text)).unwrap_or(number)
}

/// The entries of a device's folder in sysfs.
fn entries(number: u64, name: &str) -> Vec<OsString> {
    let entries = read_dir(sysfs(number).join(name)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name()).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_disk_of_this_host_has_a_queue_and_its_partitions_have_the_same() {
        for entry in read_dir("/sys/block").into_iter().flatten().flatten() {
            let read = |path| std::fs::read_to_string(path).ok();
            let Some(number) = read(entry.path().join("dev")).and_then(|it| parse_number(&it))
            else {
                continue;
            };
            let queue = RequestQueue::of(number);
            let is_one = entry.path().join("mq").exists();
            assert!(queue.is_some() || !is_one, "{entry:?}");
            let Some(queue) = queue else { continue };
            assert!(queue.tags > 0 && queue.pages > 0, "{entry:?}: {queue:?}");
            for partition in read_dir(entry.path()).unwrap().flatten() {
                if partition.path().join("partition").exists() {
                    let number =
                        parse_number(&read(partition.path().join("dev")).unwrap()).unwrap();
                    assert_eq!(RequestQueue::of(number), Some(queue), "{partition:?}");
                }
            }
        }
        let of_no_device = RequestQueue::of(libc::makedev(0, 1));
        assert_eq!(of_no_device, None);
    }
}
