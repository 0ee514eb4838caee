//! What storage is like, and what its admin is told about it: sizes, sectors, filesystems without
//! O_DIRECT, read-only devices. Finding it out changes nothing.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use polldisk::backing::{Access, Backing, Image};
use polldisk::blkif::op;
use polldisk::sim::blkfront::device::Options;
use polldisk::sim::blkfront::load::Load;
use polldisk::xen::PageAccess;
use rustix::fs::OFlags;

use crate::fuse;
use crate::host::{self, BLOCKS_4KN, Filesystem, LoopDevice, Mounted, folder};
use crate::rig::{Guest, IMAGE_BYTES, Rig, ask, load, raw, raw_request, run_verified, whole};

/// Opens a file or device with options of its target.
fn open(options: &str, path: &Path, read_only: bool) -> Result<Backing, String> {
    let target = format!("raw{options}:{}", path.display());
    host::open(&target, &Access { read_only, ..Access::default() })
}

/// All warnings for its admin.
fn warnings(options: &str, path: &Path) -> String {
    open(options, path, false).unwrap().warnings().join("\n")
}

fn file(folder: &Path, bytes: u64) -> PathBuf {
    let path = folder.join("disk.img");
    host::file(&path, bytes);
    path
}

#[test]
fn bytes_that_fill_no_sector_cause_a_warning() {
    let folder = folder();
    let path = file(folder.path(), IMAGE_BYTES);
    assert_eq!(warnings("", &path), "");
    host::file(&path, IMAGE_BYTES + 100);
    let told = warnings("", &path);
    assert!(told.contains("last 100 bytes") && told.contains("truncate"), "{told}");

    let filesystem = Filesystem::new("ext4", folder.path(), 64 << 20, &BLOCKS_4KN);
    let Some(filesystem) = filesystem else { return };
    let path = file(filesystem.folder(), IMAGE_BYTES + 7 * 512);
    let told = warnings("", &path);
    assert!(told.contains("last 3584 bytes") && told.contains("emulate-512"), "{told}");
    assert_eq!(warnings(",emulate-512", &path), "", "they are served");
    host::file(&path, IMAGE_BYTES + 7 * 512 + 1);
    let told = warnings(",emulate-512", &path);
    assert!(told.contains("last 1 bytes") && !told.contains("emulate-512"), "{told}");
}

/// The flags that storage was opened with, and those of its tail, if that has a descriptor of its own.
fn flags_of(options: &str, path: &Path, read_only: bool) -> [Option<OFlags>; 2] {
    let backing = open(options, path, read_only).unwrap();
    let Image::Raw(image) = &**backing.image() else { panic!("{backing:?}") };
    let flags = |fd| {
        let told = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let flags = told.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        OFlags::from_bits_retain(u32::from_str_radix(flags.trim(), 8).unwrap())
            & (OFlags::DIRECT | OFlags::RWMODE | OFlags::CLOEXEC)
    };
    let blocks = &image.target().below;
    let tail = blocks.tail.as_ref().map(|tail| flags(tail.below.raw_fd));
    [Some(flags(blocks.below.raw_fd)), tail]
}

#[test]
fn storage_is_opened_past_the_page_cache_and_for_writing_only_if_its_guest_may_write() {
    let folder = folder();
    let path = file(folder.path(), IMAGE_BYTES);
    let device = LoopDevice::new_4kn(&folder.path().join("device.img"), IMAGE_BYTES);
    let filesystem = Filesystem::new("ext4", folder.path(), 64 << 20, &BLOCKS_4KN);
    let uneven = filesystem.as_ref().map(|on| file(on.folder(), IMAGE_BYTES + 7 * 512));
    for (read_only, mode) in [(true, OFlags::RDONLY), (false, OFlags::RDWR)] {
        let end = mode | OFlags::CLOEXEC;
        let direct = end | OFlags::DIRECT;
        assert_eq!(flags_of("", &path, read_only), [Some(direct), None]);
        if let Some(device) = &device {
            assert_eq!(flags_of("", &device.path, read_only), [Some(direct), None]);
        }
        if let Some(uneven) = &uneven {
            assert_eq!(flags_of(",emulate-512", uneven, read_only), [Some(direct), Some(end)]);
        }
    }
}

#[test]
fn a_read_only_device_is_not_given_to_a_writer() {
    let folder = folder();
    let path = file(folder.path(), IMAGE_BYTES);
    let Some(device) = LoopDevice::over(&path, &["-r"]) else { return };
    let refused = || {
        let reason = open("", &device.path, false).map(drop).unwrap_err();
        assert!(reason.contains("device is read-only") && reason.contains("mode r"), "{reason}");
    };
    refused();
    drop(open("", &device.path, true).unwrap());
    let rig = Rig::start();
    let _domain = rig.domain(1);
    let reason = rig.try_attach(1, &raw(&device.path), false).unwrap_err();
    assert!(reason.contains("device is read-only"), "{reason}");
    rig.attach(1, &raw(&device.path), true);
    drop(rig);
    drop(device);

    let Some(device) = LoopDevice::over(&path, &[]) else { return };
    let blockdev = |option| host::run(Command::new("blockdev").arg(option).arg(&device.path));
    blockdev("--setro").unwrap();
    let reason = open("", &device.path, false).map(drop).unwrap_err();
    assert!(reason.contains("device is read-only"), "{reason}");
    blockdev("--setrw").unwrap();
    drop(open("", &device.path, false).unwrap());
}

#[test]
fn an_image_made_for_512_byte_sectors_is_recognised_on_larger_blocks() {
    let folder = folder();
    let disk = LoopDevice::new_4kn(&folder.path().join("disk.img"), IMAGE_BYTES);
    let Some(disk) = disk else { return };
    let write = |at: usize| {
        let mut start = vec![0; 8192];
        start[at..at + 8].copy_from_slice(b"EFI PART");
        let device = File::options().write(true).open(&disk.path).unwrap();
        device.write_all_at(&start, 0).unwrap();
        device.sync_all().unwrap();
    };
    assert_eq!(warnings("", &disk.path), "");
    write(4096);
    assert_eq!(warnings("", &disk.path), "");
    write(512);
    let told = warnings("", &disk.path);
    assert!(told.contains("partitioned") && told.contains("emulate-512"), "{told}");
    assert_eq!(warnings(",emulate-512", &disk.path), "");
}

#[test]
fn if_o_direct_is_refused_an_image_is_served_through_the_page_cache() {
    let rig = Rig::start();
    let folder = rig.images().join("ramfs");
    let Some(mounted) = Mounted::at(&folder, Path::new("none"), &["-t", "ramfs"]) else { return };
    let path = file(&mounted.folder, IMAGE_BYTES);
    let refusal = open(",direct=required", &path, false).map(drop).unwrap_err();
    assert!(refusal.contains("O_DIRECT"), "{refusal}");
    let told = warnings(",direct=auto", &path);
    assert!(told.contains("O_DIRECT") && told.contains("page cache"), "{told}");

    let guest = rig.guest(1, &raw(&path));
    let mut device = guest.connect(Options::default());
    let report = run_verified(&mut device, load(1, 4096), 1_000);
    assert!(report.flushes > 0);
    guest.close(device);
    guest.xenbus.start_over().unwrap();
    let mut device = guest.connect(Options { persistent: false, ..Options::default() });
    run_verified(&mut device, Load { zeroed: false, ..load(2, 1536) }, 1_000);
    guest.close(device);
    rig.detach_by_force(1);
}

#[test]
fn if_direct_reads_fail_an_image_is_served_through_the_page_cache_and_synced() {
    let rig = Rig::start();
    let Some(filesystem) = fuse::Filesystem::mount(&rig.images().join("fuse")) else { return };
    let path = filesystem.folder().join("disk.img");
    let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path);
    assert!(direct.is_ok(), "the filesystem allows the open");
    drop(direct);
    let refusal = open(",direct=required", &path, false).map(drop).unwrap_err();
    assert!(refusal.contains("O_DIRECT"), "{refusal}");
    let told = warnings("", &path);
    assert!(told.contains("O_DIRECT") && told.contains("page cache"), "{told}");
    let guest = rig.guest(1, &raw(&path));
    let mut device = guest.connect(Options::default());
    run_verified(&mut device, load(1, 4096), 500);
    let before = filesystem.syncs();
    assert_eq!(ask(&mut device, &[raw_request(op::FLUSH_DISKCACHE, 0, 0, &[])]), [0]);
    assert!(filesystem.syncs() > before, "a flush reaches the storage");
    guest.close(device);
    rig.detach_by_force(1);
}

#[test]
fn an_image_on_a_filesystem_whose_server_died_is_refused() {
    let folder = folder();
    let Some(mut filesystem) = fuse::Filesystem::mount(&folder.path().join("fuse")) else { return };
    let path = filesystem.folder().join("disk.img");
    drop(open("", &path, false).unwrap());
    filesystem.die();
    for read_only in [false, true] {
        let refusal = open("", &path, read_only).map(drop).unwrap_err();
        assert!(refusal.contains("disk.img"), "{refusal}");
    }
}

#[test]
fn an_image_on_squashfs_is_served() {
    let rig = Rig::start();
    let source = rig.images().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("disk.iso"), vec![0x5a; 1 << 20]).unwrap();
    let packed = rig.images().join("packed.squashfs");
    let mut mksquashfs = Command::new("mksquashfs");
    if host::run(mksquashfs.arg(&source).arg(&packed).arg("-quiet")).is_none() {
        return;
    }
    let options = ["-o", "loop,ro"];
    let Some(mounted) = Mounted::at(&rig.images().join("squashfs"), &packed, &options) else {
        return;
    };
    let path = mounted.folder.join("disk.iso");
    let refusal = open("", &path, false).map(drop).unwrap_err();
    assert!(refusal.contains("read-only"), "{refusal}");
    let domain = rig.domain(1);
    rig.attach(1, &raw(&path), true);
    let guest = Guest::of(domain);
    let mut device = guest.connect(Options::default());
    let (page, gref) = guest.grant(PageAccess::ReadWrite);
    let read = raw_request(op::READ, 0, (1 << 11) - 8, &[whole(gref)]);
    assert_eq!(ask(&mut device, &[read]), [0]);
    let mut data = [0; 4096];
    guest.domain.page(page).copy_to(&mut data);
    assert!(data.iter().all(|byte| *byte == 0x5a));
    guest.close(device);
    rig.detach_by_force(1);
}

#[test]
fn opening_an_image_changes_nothing_about_it() {
    let folder = folder();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let xfs = Filesystem::new("xfs", folder.path(), 400 << 20, &[]);
    let folders = [Some(folder.path()), Some(memory.path()), xfs.as_ref().map(Filesystem::folder)];
    for folder in folders.into_iter().flatten() {
        let path = file(folder, IMAGE_BYTES);
        let times = |path: &Path| {
            let metadata = std::fs::metadata(path).unwrap();
            [metadata.mtime(), metadata.mtime_nsec(), metadata.ctime(), metadata.ctime_nsec()]
        };
        let before = [times(&path), times(folder)];
        // Clocks of filesystems tick every few milliseconds.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let backing = open("", &path, false).unwrap();
        assert!(backing.discard().is_some(), "{}", folder.display());
        drop(backing);
        assert_eq!([times(&path), times(folder)], before, "{}", folder.display());
    }
}

#[test]
fn no_device_is_asked_to_erase_an_empty_range() {
    let folder = folder();
    let Some(device) = LoopDevice::over(&file(folder.path(), IMAGE_BYTES), &[]) else { return };
    if !host::is_there("strace") {
        return;
    }
    let trace = folder.path().join("trace");
    let output = Command::new("strace")
        .args(["-f", "-e", "trace=ioctl", "-o"])
        .arg(&trace)
        .args([env!("CARGO_BIN_EXE_polldisk"), "check-target", "--mode", "w"])
        .arg(&device.path)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let trace = std::fs::read_to_string(&trace).unwrap();
    assert!(trace.contains("BLKGETSIZE64"), "the device was probed:\n{trace}");
    for line in trace.lines().filter(|line| line.contains("BLKSECDISCARD")) {
        assert!(!line.contains("[0, 0]"), "this drops the page cache: {line}");
    }
}
