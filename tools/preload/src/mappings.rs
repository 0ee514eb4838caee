//! Granted pages in the program's memory, by address, since munmap gives nothing else.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use polldisk::xen::shm::PAGE_BYTES;

use crate::gntdev::Gntdev;
use crate::handles::lock;

/// A range of granted pages.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// Number of pages.
    pub count: usize,
    /// The offset of the device at which it was mapped.
    pub index: u64,
    /// The stand-in's handle for it.
    pub cookie: u64,
    /// The device that it was mapped from.
    pub device: Arc<Mutex<Gntdev>>,
}

impl Mapping {
    fn bytes(&self) -> usize {
        self.count * PAGE_BYTES
    }
}

/// All mappings, by first address. They do not overlap.
static MAPPINGS: Mutex<BTreeMap<usize, Mapping>> = Mutex::new(BTreeMap::new());

/// Held by each test that has some: all tests of the program share them.
#[cfg(test)]
pub static TESTS: Mutex<()> = Mutex::new(());

/// The number of mappings. A program without any pays only this load for each munmap.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Adds a mapping.
pub fn insert(address: usize, mapping: Mapping) {
    lock(&MAPPINGS).insert(address, mapping);
    COUNT.fetch_add(1, Ordering::Release);
}

/// Whether there are any mappings.
#[inline]
pub fn exist() -> bool {
    COUNT.load(Ordering::Acquire) != 0
}

/// Removes the mapping that is exactly this range; `None` if the range touches no mapping. A part of a
/// mapping, or more than one mapping, is refused with EINVAL.
pub fn remove(address: usize, len: usize) -> io::Result<Option<Mapping>> {
    let len = len.next_multiple_of(PAGE_BYTES);
    let mut mappings = lock(&MAPPINGS);
    let Some(last) = touched(&mappings, address, len) else { return Ok(None) };
    if last != address || mappings.get(&last).is_none_or(|mapping| mapping.bytes() != len) {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    COUNT.fetch_sub(1, Ordering::Release);
    Ok(mappings.remove(&last))
}

/// The mapping that contains an address, after its first address.
pub fn find(address: usize) -> Option<(usize, Mapping)> {
    let mappings = lock(&MAPPINGS);
    let first = touched(&mappings, address, 1)?;
    Some((first, mappings.get(&first)?.clone()))
}

/// Forgets all mappings in a child after fork, since they are the parent's.
pub fn forget_all() {
    COUNT.store(0, Ordering::Relaxed);
}

/// The last mapping that a range touches.
fn touched(mappings: &BTreeMap<usize, Mapping>, address: usize, len: usize) -> Option<usize> {
    let (first, mapping) = mappings.range(..address.saturating_add(len)).next_back()?;
    (first + mapping.bytes() > address).then_some(*first)
}

#[cfg(test)]
mod test {
    use polldisk::sim::StandIn;

    use super::*;
    use crate::settings::{Settings, Toll};

    const PAGE: usize = PAGE_BYTES;

    #[test]
    fn only_a_whole_mapping_is_removed() {
        let _alone = lock(&TESTS);
        let stand_in = StandIn::start_temporary().unwrap();
        let settings = Settings { folder: stand_in.folder().to_owned(), toll: Toll::None };
        let device = Arc::new(Mutex::new(Gntdev::open(&settings).unwrap()));
        let mapping = |count| Mapping { count, index: 0, cookie: 0, device: Arc::clone(&device) };
        // Addresses that no process has.
        let first = usize::MAX / 2 + 1;
        insert(first, mapping(2));
        insert(first + 2 * PAGE, mapping(1));

        let count_at = |address| find(address).map(|(first, mapping)| (first, mapping.count));
        assert_eq!(count_at(first + 2 * PAGE - 1), Some((first, 2)));
        assert_eq!(count_at(first + 2 * PAGE), Some((first + 2 * PAGE, 1)));
        assert_eq!(count_at(first + 3 * PAGE), None);
        assert_eq!(count_at(first - 1), None);

        for (address, pages) in
            [(first, 1), (first, 3), (first - PAGE, 2), (first + PAGE, 1), (first + PAGE, 3)]
        {
            let refused = remove(address, pages * PAGE).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EINVAL), "{pages} pages");
        }
        assert!(remove(first - PAGE, PAGE).unwrap().is_none());
        assert!(remove(first + 3 * PAGE, PAGE).unwrap().is_none());
        assert_eq!(remove(first, 2 * PAGE - 5).unwrap().unwrap().count, 2);
        assert_eq!(remove(first + 2 * PAGE, PAGE).unwrap().unwrap().count, 1);
        assert!(!exist());
    }
}
