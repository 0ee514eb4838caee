//! No image is used twice: by another disk, another program, or the host itself.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use polldisk::backing::{Access, Backing};
use polldisk::blkif::op;
use polldisk::sim::blkfront::device::Options;

use crate::host::{self, BLOCKS_4KN, LoopDevice, Mounted, folder, is_refused};
use crate::rig::{IMAGE_BYTES, Rig, raw, settle};

/// Opens a target for a disk.
fn open_as(user: &str, target: &str, read_only: bool) -> Result<Backing, String> {
    host::open(target, &Access { read_only, user: user.to_owned(), ..Access::default() })
}

/// The same for a new disk each time.
fn open(target: &str, read_only: bool) -> Result<Backing, String> {
    static DOMAINS: AtomicU32 = AtomicU32::new(1);
    let domid = DOMAINS.fetch_add(1, Ordering::Relaxed);
    open_as(&format!("disk xvda of domain {domid}"), target, read_only)
}

fn write(path: &Path) -> Result<Backing, String> {
    open(&raw(path), false)
}

fn read(path: &Path) -> Result<Backing, String> {
    open(&raw(path), true)
}

#[test]
fn a_second_disk_does_not_get_an_image_that_a_guest_writes_to() {
    let rig = Rig::start();
    let path = rig.image("one.img");
    let guest = rig.guest(1, &raw(&path));
    let device = guest.connect(Options::default());
    for domid in [2, 3] {
        let _domain = rig.domain(domid);
        for read_only in [false, true] {
            let refusal = rig.try_attach(domid, &raw(&path), read_only).unwrap_err();
            assert!(refusal.contains("one.img: disk xvda of domain 1 uses it;"), "{refusal}");
            assert!(rig.disk(domid).is_none(), "nothing is left of it");
        }
    }
    guest.close(device);
    rig.detach_by_force(1);
    let _domain = rig.domain(2);
    rig.attach(2, &raw(&path), false);
}

#[test]
fn a_file_has_one_writer_or_many_readers_whatever_its_name() {
    let folder = folder();
    let [path, soft, hard] =
        ["disk.img", "soft.img", "hard.img"].map(|name| folder.path().join(name));
    host::file(&path, IMAGE_BYTES);
    std::os::unix::fs::symlink(&path, &soft).unwrap();
    std::fs::hard_link(&path, &hard).unwrap();
    let bound = folder.path().join("bound.img");
    host::file(&bound, 0);
    let bind = Mounted::at(&bound, &path, &["--bind"]);
    let names = [&path, &soft, &hard, &bound];
    let names = if bind.is_some() { &names[..] } else { &names[..3] };
    for first in names {
        let writer = write(first).unwrap();
        for second in names {
            is_refused(write(second), &["disk xvda of domain", "uses it", "shareable"]);
            is_refused(read(second), &["disk xvda of domain", "uses it"]);
        }
        drop(writer);
        let readers: Vec<_> = names.iter().map(|second| read(second).unwrap()).collect();
        is_refused(write(first), &["disk xvda of domain", "uses it", "detach"]);
        drop(readers);
    }
    let held = open_as("disk hda of domain 7", &raw(&path), false).unwrap();
    is_refused(write(&path), &["disk hda of domain 7 uses it"]);
    let again = open_as("disk hda of domain 7", &raw(&path), false);
    assert!(again.is_ok(), "a disk does not exclude itself");
    drop(held);
    is_refused(write(&path), &["disk hda of domain 7 uses it"]);
    drop(again);
    drop(write(&path).unwrap());
}

#[test]
fn disks_share_what_all_of_them_call_shareable() {
    let folder = folder();
    let path = folder.path().join("cluster.img");
    host::file(&path, IMAGE_BYTES);
    let shared = format!("raw,shareable:{}", path.display());
    let writers = [open(&shared, false).unwrap(), open(&shared, false).unwrap()];
    let reader = open(&shared, true).unwrap();
    is_refused(write(&path), &["disk xvda of domain", "uses it"]);
    is_refused(read(&path), &["disk xvda of domain", "uses it"]);
    let access = Access { shareable: true, ..Access::default() };
    let by_mode = host::open(&raw(&path), &access).unwrap();
    is_refused(
        open(&format!("raw,shareable,emulate-512:{}", path.display()), false),
        &["emulate-512", "all disks"],
    );
    drop((writers, reader, by_mode));
    let plain = write(&path).unwrap();
    is_refused(open(&shared, false), &["disk xvda of domain", "uses it"]);
    drop(plain);
}

#[test]
fn an_open_that_fails_or_panics_leaves_nothing_claimed() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    host::file(&path, 100);
    is_refused(write(&path), &["no whole sector"]);
    host::file(&path, IMAGE_BYTES);
    let held = write(&path).unwrap();
    std::thread::scope(|scope| {
        let panics = scope.spawn(|| {
            let _held = held;
            std::panic::resume_unwind(Box::new(()));
        });
        assert!(panics.join().is_err());
    });
    drop(write(&path).unwrap());
    let image = write(&path).unwrap().image().clone();
    is_refused(write(&path), &["uses it"]);
    drop(image);
    drop(write(&path).unwrap());
}

/// A QEMU program that has an image open until this is dropped.
struct Qemu(Child);

impl Qemu {
    /// `None`, with a message, if QEMU is missing.
    fn open(path: &Path, options: &[&str]) -> Option<Qemu> {
        if !host::is_there("qemu-io") {
            return None;
        }
        let mut child = Command::new("qemu-io")
            .args(options)
            .args(["-f", "raw"])
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers once the image is open.
        child.stdin.as_mut().unwrap().write_all(b"read 0 512\n").unwrap();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap()).lines();
        let answer = lines.find_map(|line| line.ok().filter(|line| line.contains("read 512")));
        assert!(answer.is_some(), "qemu-io has not opened the image");
        Some(Qemu(child))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

/// Whether a QEMU program can open an image; `None` if the program is missing.
fn qemu(program: &str, arguments: &[&str], path: &Path) -> Option<bool> {
    if !host::is_there(program) {
        return None;
    }
    let output = Command::new(program).args(arguments).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || text.contains("lock"), "{text}");
    Some(output.status.success())
}

#[test]
fn we_refuse_an_image_that_qemu_has_open() {
    let folder = folder();
    let path = folder.path().join("theirs.img");
    host::file(&path, IMAGE_BYTES);
    let Some(writer) = Qemu::open(&path, &[]) else { return };
    for opened in [write(&path), read(&path)] {
        is_refused(opened, &["qemu-io", &format!("process {}", writer.0.id()), "end that"]);
    }
    drop(writer);
    let reader = Qemu::open(&path, &["-r"]).unwrap();
    drop(read(&path).unwrap());
    drop(reader);
    drop(write(&path).unwrap());
}

#[test]
fn qemu_refuses_an_image_that_we_have_open() {
    let folder = folder();
    let path = folder.path().join("ours.img");
    host::file(&path, IMAGE_BYTES);
    let write_512 = ["-f", "raw", "-c", "write 0 512"];
    let Some(can_write) = qemu("qemu-io", &write_512, &path) else { return };
    assert!(can_write);
    let convert = || {
        let copy = folder.path().join("copy.qcow2");
        let output = Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([&path, &copy])
            .output();
        output.unwrap().status.success()
    };
    let bench = || qemu("qemu-img", &["bench", "-w", "-c", "1", "-f", "raw"], &path).unwrap();
    let writes = || qemu("qemu-io", &write_512, &path).unwrap();
    let looks = || qemu("qemu-img", &["info", "-U", "-f", "raw"], &path).unwrap();
    let writer = write(&path).unwrap();
    assert_eq!([convert(), bench(), writes(), looks()], [false, false, false, true]);
    drop(writer);
    let reader = read(&path).unwrap();
    assert_eq!([convert(), bench(), writes(), looks()], [true, false, false, true]);
    drop(reader);
    let shared = open(&format!("raw,shareable:{}", path.display()), false).unwrap();
    assert_eq!([convert(), looks()], [false, true], "an image that may change is not converted");
    drop(shared);
    assert_eq!([convert(), bench(), writes(), looks()], [true; 4]);
}

#[test]
fn a_loop_device_and_its_file_are_one_storage() {
    let folder = folder();
    let path = folder.path().join("under.img");
    host::file(&path, IMAGE_BYTES);
    let Some(device) = LoopDevice::over(&path, &[]) else { return };
    let name = device.path.display().to_string();
    // The file is refused while a loop device has it, even if nobody uses the device.
    is_refused(write(&path), &[&name, "losetup -d"]);
    is_refused(read(&path), &[&name, "may write to it"]);
    // The loop device is refused while another program has its file.
    if let Some(qemu) = Qemu::open(&path, &[]) {
        is_refused(write(&device.path), &["qemu-io"]);
        drop(qemu);
    }
    // The file is refused while a disk of ours has the loop device.
    let writer = write(&device.path).unwrap();
    is_refused(write(&path), &["disk xvda of domain", "uses it"]);
    if let Some(gets_in) = qemu("qemu-io", &["-f", "raw", "-c", "write 0 512"], &path) {
        assert!(!gets_in, "the file is locked, too");
    }
    // So are another loop device over the file, and one on top of the first.
    let on_top = LoopDevice::over(&device.path, &[]).unwrap();
    let beside = LoopDevice::over(&path, &["-r"]).unwrap();
    for other in [&on_top, &beside] {
        is_refused(read(&other.path), &["disk xvda of domain", "uses it"]);
    }
    drop((on_top, beside));
    drop(writer);
    drop(device);
    let Some(device) = LoopDevice::over(&path, &["-r"]) else { return };
    drop(read(&path).unwrap());
    is_refused(write(&path), &[&device.path.display().to_string()]);
    let readers = [read(&device.path).unwrap(), read(&path).unwrap()];
    drop(readers);
}

#[test]
fn a_device_that_the_host_has_mounted_is_refused_but_may_be_read_if_the_host_only_reads() {
    let folder = folder();
    let path = folder.path().join("fs.img");
    host::file(&path, 8 << 20);
    let Some(device) = LoopDevice::over(&path, &[]) else { return };
    let place = folder.path().join("a place");
    let Some(mounted) = Mounted::new("ext4", &device.path, &place) else { return };
    let place = place.display().to_string();
    for opened in [write(&device.path), read(&device.path)] {
        is_refused(opened, &["mounted at", &place, "umount"]);
    }
    assert!(host::run(Command::new("mount").args(["-o", "remount,ro"]).arg(&place)).is_some());
    drop(read(&device.path).unwrap());
    is_refused(write(&device.path), &["mounted at", &place, "read-only (mode r)"]);
    drop(mounted);
    let writer = write(&device.path).unwrap();
    let mount = Command::new("mount").arg(&device.path).arg(&place).output().unwrap();
    assert!(!mount.status.success(), "the host can't mount a disk of ours");
    drop(writer);
    drop(Mounted::at(Path::new(&place), &device.path, &[]).unwrap());
}

#[test]
fn swap_space_is_not_given_to_a_guest() {
    let folder = folder();
    let path = folder.path().join("swap.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let Some(_) = host::run(Command::new("mkswap").arg(&path)) else { return };
    let swapped = Command::new("swapon").arg(&path).output().unwrap();
    if !swapped.status.success() {
        eprintln!("skipped: no swap space here ({})", String::from_utf8_lossy(&swapped.stderr));
        return;
    }
    let refusals = [write(&path), read(&path)].map(|opened| opened.map(drop));
    assert!(Command::new("swapoff").arg(&path).status().unwrap().success());
    for refusal in refusals {
        let reason = refusal.unwrap_err();
        assert!(reason.contains("swap space") && reason.contains("swapoff"), "{reason}");
    }
}

#[test]
fn a_partition_and_its_disk_exclude_each_other() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    host::file(&path, 8 << 20);
    let Some(disk) = LoopDevice::over(&path, &["--partscan"]) else { return };
    for (number, start) in [("1", "2048"), ("2", "4096")] {
        let mut addpart = Command::new("addpart");
        if host::run(addpart.arg(&disk.path).args([number, start, "2048"])).is_none() {
            return;
        }
    }
    let parts = ["p1", "p2"].map(|part| format!("{}{part}", disk.path.display()));
    if !Path::new(&parts[0]).exists() {
        eprintln!("skipped: no device nodes are made for partitions here");
        return;
    }
    let [first, second] = parts.each_ref().map(Path::new);
    let writers = [write(first).unwrap(), write(second).unwrap()];
    for opened in [write(&disk.path), read(&disk.path)] {
        is_refused(opened, &["disk xvda of domain", "uses it"]);
    }
    is_refused(write(&path), &["disk xvda of domain", "uses it"]);
    drop(writers);
    let whole = write(&disk.path).unwrap();
    is_refused(read(first), &["disk xvda of domain", "uses it"]);
    drop(whole);
    let readers = [&*disk.path, first, second].map(|path| read(path).unwrap());
    drop(readers);
    let Some(mounted) = Mounted::new("ext4", first, &folder.path().join("part")) else { return };
    is_refused(write(&disk.path), &["mounted at"]);
    drop(write(second).unwrap());
    drop(mounted);
}

#[test]
fn a_second_node_for_a_device_is_the_same_storage() {
    let folder = folder();
    let path = folder.path().join("disk.img");
    host::file(&path, IMAGE_BYTES);
    let Some(device) = LoopDevice::over(&path, &[]) else { return };
    let rdev = std::os::unix::fs::MetadataExt::rdev(&std::fs::metadata(&device.path).unwrap());
    let node = folder.path().join("node");
    let numbers = [libc::major(rdev), libc::minor(rdev)].map(|number| number.to_string());
    let Some(_) = host::run(Command::new("mknod").arg(&node).arg("b").args(numbers)) else {
        return;
    };
    if File::open(&node).is_err() {
        eprintln!("skipped: the filesystem of the tests allows no device nodes");
        return;
    }
    let writer = write(&device.path).unwrap();
    is_refused(write(&node), &["disk xvda of domain", "uses it"]);
    drop(writer);
    let readers = [read(&device.path).unwrap(), read(&node).unwrap(), read(&node).unwrap()];
    is_refused(write(&device.path), &["disk xvda of domain", "uses it"]);
    drop(readers);
    drop(write(&node).unwrap());
}

#[test]
fn disks_that_share_blocks_lose_no_partial_write() {
    const SECTORS: u64 = 32;
    let rig = Rig::with_workers(2);
    let path = rig.image("shared.img");
    let Some(device) = LoopDevice::over(&path, &BLOCKS_4KN) else { return };
    let target = device.target(",emulate-512,shareable");
    let guests = [1, 2].map(|domid| rig.guest(domid, &target));
    let mut devices = guests.each_ref().map(|guest| guest.connect(Options::default()));
    for round in 0..50u8 {
        // Even sectors by one disk, odd ones by the other.
        for (disk, device) in (0..).zip(&mut devices) {
            for sector in (disk..SECTORS).step_by(2) {
                let buffer = device.free_buffer().unwrap();
                device.fill(buffer, &[round ^ u8::try_from(sector).unwrap(); 512]);
                device.put(op::WRITE, sector, 512);
            }
            device.publish().unwrap();
        }
        devices.iter_mut().for_each(settle);
        let len = usize::try_from(SECTORS * 512).unwrap();
        let buffer = devices[0].put(op::READ, 0, len);
        devices[0].publish().unwrap();
        settle(&mut devices[0]);
        let mut data = vec![0; len];
        devices[0].drain(buffer, &mut data);
        for (sector, bytes) in (0..).zip(data.chunks(512)) {
            assert!(bytes.iter().all(|byte| *byte == round ^ sector), "sector {sector}");
        }
    }
    for (guest, device) in guests.iter().zip(devices) {
        guest.close(device);
    }
}
