//! A 32-bit boot loader uses the disks, then hands them on to a 64-bit kernel.
//!
//! The two have different layouts of a request, and the backend uses the one that the frontend writes to
//! xenstore. When the boot loader hands a disk over, it closes and connects again within one guest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guest_io::{expect_disk, read_pattern, write_pattern};
use super::{Scenario, end_daemon};
use crate::backend::Storage;
use crate::lab::Lab;
use crate::xen::{Guest, KERNEL_OPTIONS};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "guest-32bit",
    about: "a 32-bit boot loader reads and writes its disks and hands them on to a 64-bit kernel",
    programs: false,
    blkload: false,
    run,
};

const BOOT_MIB: u64 = 48;
const DISK: &str = "/srv/disk.img";
const DISK_MIB: u64 = 16;

/// Length of the part of the raw disk that GRUB reads, in sectors of 512. The kernel writes behind it.
const GRUB_SECTORS: u32 = 2048;
const PATTERN_MIB: u32 = 8;

/// xvda and xvdb in xenstore.
const VBDS: [u32; 2] = [51712, 51728];
const GRUB_LIMIT: Duration = Duration::from_secs(120);

fn run(lab: &mut Lab) -> Result<()> {
    lab.step("a disk to boot from and a file", make_storage)?;
    let daemon = lab.step("the backend starts", Lab::start_backend)?;
    let disks =
        [lab.disk("xvda", Storage::Device("/dev/ram0"))?, lab.disk("xvdb", Storage::File(DISK))?];
    let first_layouts = lab.dom0.start(&first_layouts_command(), Some(GRUB_LIMIT))?;
    let mut guest = lab.step("GRUB boots a kernel from its disk", |lab| {
        lab.create_guest_with_grub("loader", &disks)
    })?;
    lab.step("GRUB had both disks in the 32-bit layout", |lab| {
        let output = lab.dom0.finish(first_layouts)?;
        ensure!(output.stdout == "x86_32-abi\nx86_32-abi\n", "{output:?}");
        Ok(())
    })?;
    lab.step("the kernel has them in the 64-bit layout", |lab| {
        expect_disk(&mut guest.agent, "xvda", BOOT_MIB << 20)?;
        expect_disk(&mut guest.agent, "xvdb", DISK_MIB << 20)?;
        expect_layout(lab, &guest, "x86_64-abi")
    })?;
    lab.step("dom0 reads what the kernel writes", |lab| {
        let written = write_pattern(&mut guest.agent, "xvdb", PATTERN_MIB)?;
        let found = read_pattern(&mut lab.dom0, DISK, PATTERN_MIB)?;
        ensure!(written == found, "the guest wrote {written}, dom0 reads {found}");
        Ok(())
    })?;
    lab.step("the guest shuts down", |lab| guest.shut_down(&mut lab.dom0))?;
    lab.step("GRUB has written that it read what dom0 wrote", |lab| {
        lab.dom0.ask("mount -t ext4 -o ro /dev/ram0 /mnt")?;
        expect_verdict(&lab.dom0.ask("cat /mnt/boot/grub/grubenv; umount /mnt")?)
    })?;
    end_daemon(lab, daemon)
}

/// Makes the disks, with a GRUB script that checks a file on one disk and the start of the other, writes
/// the result to a file, and loads the kernel.
fn make_storage(lab: &mut Lab) -> Result<()> {
    lab.dom0
        .ask(&format!(
            "set -e
             modprobe brd rd_nr=1 rd_size={}
             dd if=/dev/urandom of={DISK} bs=1M count={DISK_MIB} conv=fsync 2>/dev/null
             tree=$(mktemp -d)
             mkdir -p $tree/boot/grub
             cp /boot/guest/vmlinuz /boot/guest/initramfs-small $tree/
             dd if=/dev/urandom of=$tree/data bs=1000 count=600 2>/dev/null
             (cd $tree && sha256sum data | sed 's,data,/data,') >$tree/file.sum
             sum=$(dd if={DISK} bs=512 count={GRUB_SECTORS} 2>/dev/null | sha256sum)
             echo \"${{sum%% *}}  (xen/xvdb)0+{GRUB_SECTORS}\" >$tree/disk.sum
             grub-editenv $tree/boot/grub/grubenv create
             cat >$tree/boot/grub/grub.cfg <<'END'
             if sha256sum --check /file.sum; then set file=good; fi
             if sha256sum --check /disk.sum; then set disk=good; fi
             save_env --file /boot/grub/grubenv file disk
             linux /vmlinuz {KERNEL_OPTIONS}
             initrd /initramfs-small
             boot
END
             mkfs.ext4 -q -d $tree /dev/ram0
             rm -r $tree",
            BOOT_MIB * 1024
        ))
        .map(drop)
}

/// A command that waits until the guest's first driver of each disk has named its layout.
fn first_layouts_command() -> String {
    let [first, second] = VBDS;
    format!(
        "for vbd in {first} {second}; do
             until xenstore-read /local/domain/$(xl domid loader)/device/vbd/$vbd/protocol; do
                 sleep 0.1
             done 2>/dev/null
         done"
    )
}

fn expect_layout(lab: &mut Lab, guest: &Guest, layout: &str) -> Result<()> {
    for vbd in VBDS {
        let path = format!("/local/domain/{}/device/vbd/{vbd}/protocol", guest.domid);
        let found = lab.dom0.ask(&format!("xenstore-read {path}"))?;
        ensure!(found == layout, "{path} is {found}");
    }
    Ok(())
}

/// Reads GRUB's environment block.
fn expect_verdict(text: &str) -> Result<()> {
    for line in ["file=good", "disk=good"] {
        text.lines()
            .find(|found| *found == line)
            .with_context(|| format!("no {line} in {text}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_disks_must_have_been_read() {
        let block = "# GRUB Environment Block\nfile=good\ndisk=good\n#######";
        assert!(expect_verdict(block).is_ok());
        assert!(expect_verdict(&block.replace("disk=good\n", "")).is_err());
    }
}
