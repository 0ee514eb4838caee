//! Disks on files of tmpfs, which every Linux has at /dev/shm: workers copy from and to their
//! mappings.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use polldisk::blkif::codec::{RawDiscard, RawRequest};
use polldisk::blkif::op;
use polldisk::sim::Gfn;
use polldisk::sim::blkfront::device::{Device, Options};
use polldisk::sim::blkfront::load::Load;
use polldisk::units::GrantRef;
use polldisk::xen::PageAccess;

use crate::rig::{
    Guest, IMAGE_BYTES, Neighbour, Rig, ask, load, raw, raw_request, run_verified, whole,
};

const ERROR: i16 = -1;
const PAGES: u64 = IMAGE_BYTES / 4096;

/// A file in memory, with all of its pages allocated or none.
struct Image {
    path: PathBuf,
    file: File,
    _folder: tempfile::TempDir,
}

impl Image {
    fn sparse() -> Image {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = folder.path().join("disk.img");
        let file = File::create(&path).unwrap();
        file.set_len(IMAGE_BYTES).unwrap();
        Image { path, file, _folder: folder }
    }

    fn of(byte: u8) -> Image {
        let image = Image::sparse();
        image.file.write_all_at(&vec![byte; usize::try_from(IMAGE_BYTES).unwrap()], 0).unwrap();
        image
    }

    /// Bytes of memory that it takes.
    fn allocated(&self) -> u64 {
        self.file.metadata().unwrap().blocks() * 512
    }
}

/// A guest that does one request at a time.
struct Asking {
    guest: Guest,
    device: Device,
    page: Gfn,
    gref: GrantRef,
}

impl Asking {
    fn on(rig: &Rig, domid: u32, image: &Image) -> Asking {
        Asking::on_target(rig, domid, &raw(&image.path))
    }

    fn on_target(rig: &Rig, domid: u32, target: &str) -> Asking {
        let guest = rig.guest(domid, target);
        let device = guest.connect(Options::default());
        let (page, gref) = guest.grant(PageAccess::ReadWrite);
        Asking { guest, device, page, gref }
    }

    fn io(&mut self, operation: u8, page: u64) -> i16 {
        let segments = [whole(self.gref)];
        ask(&mut self.device, &[raw_request(operation, 0, page * 8, &segments)])[0]
    }

    /// Reads a page, and returns the byte that fills it.
    fn read(&mut self, page: u64) -> Result<u8, i16> {
        self.guest.domain.page(self.page).copy_from(&[0xee; 4096]);
        let status = self.io(op::READ, page);
        let mut data = [0; 4096];
        self.guest.domain.page(self.page).copy_to(&mut data);
        assert!(status != 0 || data == [data[0]; 4096], "a mixture of bytes");
        if status == 0 { Ok(data[0]) } else { Err(status) }
    }

    fn write(&mut self, page: u64, byte: u8) -> i16 {
        self.guest.domain.page(self.page).copy_from(&[byte; 4096]);
        self.io(op::WRITE, page)
    }

    fn discard(&mut self, page: u64, pages: u64) -> i16 {
        let (sector, nr_sectors) = (page * 8, pages * 8);
        let discard = RawDiscard { flag: 0, handle: 0, id: 0, sector, nr_sectors };
        ask(&mut self.device, &[RawRequest::Discard(discard)])[0]
    }

    fn close(self) {
        self.guest.close(self.device);
    }
}

#[test]
fn a_file_in_memory_keeps_data() {
    let rig = Rig::start();
    let image = Image::sparse();
    let guest = rig.guest(1, &raw(&image.path));
    let mut zeroed = true;
    for (seed, persistent) in [(1, true), (2, false)] {
        for block_bytes in [512, 16 * 1024, 45056] {
            let mut device = guest.connect(Options { persistent, ..Options::default() });
            let load = Load { zeroed, ..load(seed, block_bytes) };
            let report = run_verified(&mut device, load, 2_000);
            assert!(report.verified > 0 && report.writes > 0 && report.flushes > 0);
            guest.close(device);
            guest.xenbus.start_over().unwrap();
            zeroed = false;
        }
    }
    assert_eq!(rig.disk(1).unwrap().counts.errors, 0);
}

#[test]
fn a_guest_that_reads_a_sparse_file_allocates_no_memory_for_it() {
    let rig = Rig::start();
    let image = Image::sparse();
    let mut asking = Asking::on(&rig, 1, &image);
    for _ in 0..2 {
        (0..PAGES).for_each(|page| assert_eq!(asking.read(page), Ok(0)));
        assert_eq!(image.allocated(), 0);
    }
    asking.close();
}

#[test]
fn discarded_data_is_gone_and_its_memory_with_it() {
    let rig = Rig::start();
    let image = Image::of(0x5a);
    let mut asking = Asking::on(&rig, 1, &image);
    (0..PAGES).for_each(|page| assert_eq!(asking.read(page), Ok(0x5a)));
    assert_eq!(asking.discard(0, PAGES / 2), 0);
    for _ in 0..2 {
        (0..PAGES / 2).for_each(|page| assert_eq!(asking.read(page), Ok(0)));
        assert_eq!(image.allocated(), IMAGE_BYTES / 2);
    }
    assert_eq!(asking.write(7, 0x11), 0);
    assert_eq!((asking.read(7), asking.read(PAGES / 2)), (Ok(0x11), Ok(0x5a)));
    asking.close();
}

#[test]
fn a_file_made_shorter_under_its_guest_causes_errors_for_this_guest_only() {
    let rig = Rig::start();
    let neighbour = Neighbour::start(&rig, 100);
    let image = Image::of(0x5a);
    let mut asking = Asking::on(&rig, 1, &image);
    (0..PAGES).for_each(|page| assert_eq!(asking.read(page), Ok(0x5a)));
    image.file.set_len(IMAGE_BYTES / 2).unwrap();
    for page in PAGES / 2..PAGES {
        assert_eq!(asking.read(page), Err(ERROR));
    }
    assert_eq!(asking.read(PAGES / 2 - 1), Ok(0x5a));
    neighbour.goes_on();

    image.file.set_len(IMAGE_BYTES).unwrap();
    assert_eq!(asking.read(PAGES - 1), Ok(0));
    assert_eq!(asking.write(PAGES - 1, 0x22), 0);
    assert_eq!(asking.read(PAGES - 1), Ok(0x22));
    asking.close();
    neighbour.finish();
}

#[test]
fn two_disks_on_one_file_see_each_others_changes() {
    let rig = Rig::with_workers(2);
    let image = Image::of(0x5a);
    let target = format!("raw,shareable:{}", image.path.display());
    let mut both = [1, 2].map(|domid| Asking::on_target(&rig, domid, &target));
    for page in 0..PAGES {
        both.iter_mut().for_each(|asking| assert_eq!(asking.read(page), Ok(0x5a)));
    }
    assert_eq!(both[0].write(3, 0x33), 0);
    assert_eq!(both[1].read(3), Ok(0x33));
    // What the other disk knows about the pages is stale now.
    assert_eq!(both[0].discard(0, 64), 0);
    assert_eq!(both[1].read(3), Ok(0));
    assert_eq!(both[1].write(4, 0x44), 0);
    assert_eq!(both[0].read(4), Ok(0x44));
    both.into_iter().for_each(Asking::close);
    assert_eq!(fs::metadata(&image.path).unwrap().len(), IMAGE_BYTES);
}
