//! The emulator's command line.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// The emulator's program.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// How many guests can have a console in one boot, whether at the same time or one after another.
pub const GUEST_PORTS: usize = 24;

/// Where the first console of Xen and dom0 goes.
#[derive(Clone, Copy, Debug)]
pub enum Console<'a> {
    /// To a file.
    File(&'a Path),
    /// To the terminal of the caller, input included.
    Terminal,
}

/// How the machine's time passes while none of its processors has anything to execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Idle {
    /// As on the host.
    Passes,
    /// Time jumps to the next timer at once. Measurements then depend only on executed instructions and
    /// timers, never on the host.
    IsSkipped,
}

/// In MiB. Xen keeps for the guests what dom0 does not get. Memory that no guest touches costs the host
/// nothing.
const MACHINE_MEMORY: &str = "6144";
const XEN_OPTIONS: &str = "dom0_mem=1536M,max:1536M dom0_max_vcpus=2 console=com1 com1=115200,8n1 \
                           bootscrub=0 loglvl=info guest_loglvl=info";
const DOM0_OPTIONS: &str = "console=hvc0 net.ifnames=0 panic=1 mitigations=off quiet";

/// The first line of the emulator's version.
pub fn version() -> Result<String> {
    let output = Command::new(PROGRAM).arg("--version").output();
    let output = output.with_context(|| format!("cannot run {PROGRAM}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("unknown").into())
}

/// The arguments for a machine that finds the image's files in its working directory, the payload
/// at `payload`, and makes its sockets in `sockets`.
pub fn arguments(payload: &Path, sockets: &Path, console: Console, idle: Idle) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut add = |option: &str, value: String| arguments.extend([option.into(), value]);

    // While the machine works, its time is the number of executed instructions, a nanosecond each, so
    // libxl's time-outs do not depend on how busy the host is. This needs a single thread.
    add("-accel", "tcg,thread=single".into());
    add(
        "-icount",
        match idle {
            Idle::Passes => "shift=0".into(),
            Idle::IsSkipped => "shift=0,sleep=off".into(),
        },
    );
    // An old AMD processor with nested paging, for PVH guests. Without rdrand each kernel needs half a
    // minute for its first random number. SSE 4.2 speeds up the checksums of fio and ext4.
    let processor = "phenom,+svm,+npt,+rdrand,+ssse3,+sse4.1,+sse4.2";
    // The emulator's time-stamp counter is invariant, like that of any current processor, but without
    // these options the emulator does not report it. Xen would then emulate each read of the counter in a
    // guest, which takes a third of the guests' time.
    add("-cpu", format!("{processor},+invtsc,x-force-features=on"));
    add("-smp", "2".into());
    add("-m", MACHINE_MEMORY.into());
    add("-display", "none".into());
    add("-monitor", "none".into());
    add(
        "-serial",
        match console {
            Console::File(path) => format!("file:{}", path.display()),
            Console::Terminal => "mon:stdio".into(),
        },
    );

    // Xen is a multiboot kernel, dom0's kernel and initramfs are its two modules.
    add("-kernel", "xen".into());
    add("-append", XEN_OPTIONS.into());
    add("-initrd", format!("vmlinuz {DOM0_OPTIONS},dom0.cpio"));

    // dom0 tells its disks apart by the controller's ports. No faster controller than AHCI works: with NVMe
    // and virtio, the guest skips doorbells depending on shared memory. That needs memory barriers, which
    // the emulator omits for a single processor thread although its devices run in other threads, so a
    // request may wait for ever. The disks' writes go to temporary files that the emulator has unlinked,
    // because it has no read-only disks for AHCI.
    add("-device", "ich9-ahci,id=sata".into());
    add("-drive", "file=root.img,format=raw,if=none,id=root,snapshot=on".into());
    add("-device", disk("root", 1));
    let payload = payload.display();
    add("-drive", format!("file={payload},format=raw,if=none,id=payload,snapshot=on"));
    add("-device", disk("payload", 2));

    add("-device", format!("virtio-serial-pci,max_ports={}", GUEST_PORTS + 2));
    for (index, port) in ports().enumerate() {
        let socket = sockets.join(&port);
        let socket = socket.display();
        add("-chardev", format!("socket,id={port},path={socket},server=on,wait=off"));
        add("-device", format!("virtserialport,chardev={port},name={port},nr={}", index + 1));
    }

    // If dom0 crashes, Xen resets the machine, which must end the emulator.
    arguments.extend(["-nodefaults".into(), "-no-reboot".into()]);
    arguments
}

/// A disk of dom0 on the port that the kernel calls `ata<port>`.
fn disk(drive: &str, port: u32) -> String {
    format!("ide-hd,drive={drive},bus=sata.{}", port - 1)
}

/// Further arguments for a third disk, with programs for guests.
pub fn programs_disk(image: &Path) -> [String; 4] {
    let image = image.display();
    [
        "-drive".into(),
        format!("file={image},format=raw,if=none,id=programs,snapshot=on"),
        "-device".into(),
        disk("programs", 3),
    ]
}

/// The name of a guest's port and of the port's socket.
pub fn guest_port(slot: usize) -> String {
    format!("guest{slot}")
}

fn ports() -> impl Iterator<Item = String> {
    std::iter::once("dom0".into()).chain((0..GUEST_PORTS).map(guest_port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line_with(idle: Idle) -> String {
        let console = Console::File(Path::new("/logs/console"));
        arguments(Path::new("/run/payload.img"), Path::new("/run"), console, idle).join(" ")
    }

    fn line() -> String {
        line_with(Idle::Passes)
    }

    #[test]
    fn time_is_the_number_of_executed_instructions() {
        for idle in [Idle::Passes, Idle::IsSkipped] {
            let line = line_with(idle);
            assert!(line.contains("-accel tcg,thread=single -icount shift=0"), "{line}");
            assert_eq!(line.contains("shift=0,sleep=off "), idle == Idle::IsSkipped, "{line}");
        }
    }

    #[test]
    fn no_disk_skips_doorbells() {
        let line = line() + &programs_disk(Path::new("/cache/programs.img")).join(" ");
        assert_eq!(line.matches("bus=sata.").count(), 3);
        assert!(line.contains("ich9-ahci,id=sata"));
        assert!(!line.contains("nvme") && !line.contains("virtio-blk"), "{line}");
    }

    #[test]
    fn the_cached_root_is_never_written() {
        assert!(line().contains("file=root.img,format=raw,if=none,id=root,snapshot=on"));
    }

    #[test]
    fn the_cached_programs_are_never_written() {
        let line = programs_disk(Path::new("/cache/programs.img")).join(" ");
        assert!(
            line.contains("file=/cache/programs.img,format=raw,if=none,id=programs,snapshot=on")
        );
    }

    #[test]
    fn each_guest_has_a_port_of_its_own() {
        let line = line();
        assert_eq!(line.matches("virtserialport,").count(), GUEST_PORTS + 1);
        assert!(line.contains("virtserialport,chardev=dom0,name=dom0,nr=1 "));
        assert!(line.contains("socket,id=guest1,path=/run/guest1,server=on,wait=off"));
        assert!(line.contains("virtserialport,chardev=guest1,name=guest1,nr=3"));
    }

    #[test]
    fn a_crash_of_dom0_ends_the_emulator() {
        assert!(line().ends_with("-no-reboot"));
    }
}
