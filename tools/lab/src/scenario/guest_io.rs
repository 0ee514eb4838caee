//! Checked I/O from inside a guest, shared by the scenarios.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::agent::Agent;
use crate::xen::wait_for;

/// The emulator does hundreds of requests per second, far fewer on a busy host.
const IO_LIMIT: Duration = Duration::from_secs(300);
const APPEAR_LIMIT: Duration = Duration::from_secs(60);

/// Length of a block size's own region, so that no job overwrites what another one verifies.
const REGION_MIB: u32 = 8;

/// Requests of one fio run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requests {
    /// Reads, each of them verified.
    pub reads: u32,
    /// Writes.
    pub writes: u32,
}

/// Waits until the guest has a disk, and checks its size.
pub fn expect_disk(guest: &mut Agent, vdev: &str, bytes: u64) -> Result<()> {
    wait_for(guest, &format!("[ -b /dev/{vdev} ]"), APPEAR_LIMIT)?;
    // The device node appears before the capacity is set.
    let size = format!("/sys/block/{vdev}/size");
    wait_for(guest, &format!("[ \"$(cat {size})\" != 0 ]"), APPEAR_LIMIT)?;
    let sectors: u64 = guest.ask(&format!("cat {size}"))?.parse()?;
    ensure!(sectors * 512 == bytes, "{vdev} has {} bytes instead of {bytes}", sectors * 512);
    Ok(())
}

/// Writes at random places with each block size, reads everything back and verifies it.
pub fn verify(
    guest: &mut Agent,
    vdev: &str,
    sizes: &[(&str, u32)],
    seed: usize,
) -> Result<Requests> {
    let output = guest.ask_within(&fio_command(vdev, sizes, seed), IO_LIMIT)?;
    parse_fio(&output).with_context(|| format!("fio: {output}"))
}

/// [`verify`] from several processors at the same time, each in a region of its own, so that a driver
/// with a queue for each processor uses all queues.
pub fn verify_on_cpus(guest: &mut Agent, vdev: &str, cpus: u32) -> Result<Requests> {
    let output = guest.ask_within(&cpus_command(vdev, cpus), IO_LIMIT)?;
    parse_fio(&output).with_context(|| format!("fio: {output}"))
}

/// Trims blocks, writes them again and trims some once more. Blocks that were written last must read
/// back; blocks that were trimmed last must read as zeroes. Then trims others, at random, which must read
/// as zeroes, too. Returns the number of trims. Uses 8 MiB from `mebibyte` on.
pub fn verify_trims(guest: &mut Agent, vdev: &str, mebibyte: u32) -> Result<u32> {
    let output = guest.ask_within(&trims_command(vdev, mebibyte), IO_LIMIT)?;
    parse_trims(&output).with_context(|| format!("fio: {output}"))
}

/// Makes a file system, checks it through an unmount, and leaves the disk unmounted.
pub fn check_file_system(guest: &mut Agent, vdev: &str) -> Result<()> {
    let script = format!(
        "set -e
         mkfs.ext4 -q -F /dev/{vdev}
         mount -t ext4 /dev/{vdev} /mnt
         for n in 1 2 3 4 5 6; do
             dd if=/dev/urandom of=/mnt/$n bs=48k count=$n 2>/dev/null
         done
         (cd /mnt && sha256sum [1-6]) >/tmp/sums
         sync
         umount /mnt
         blockdev --flushbufs /dev/{vdev}
         echo 3 >/proc/sys/vm/drop_caches
         mount -t ext4 -o ro /dev/{vdev} /mnt
         (cd /mnt && sha256sum -c /tmp/sums >/dev/null)
         umount /mnt
         e2fsck -f -n /dev/{vdev}"
    );
    guest.ask_within(&script, IO_LIMIT).map(drop)
}

/// Writes random bytes at a place in MiB and returns their checksum.
pub fn write_pattern(guest: &mut Agent, vdev: &str, mebibyte: u32) -> Result<String> {
    guest.ask(&format!(
        "set -e
         dd if=/dev/urandom of=/tmp/pattern bs=4k count=16 2>/dev/null
         dd if=/tmp/pattern of=/dev/{vdev} bs=4k seek=$(({mebibyte} * 256)) oflag=direct 2>/dev/null
         sha256sum </tmp/pattern"
    ))
}

/// Returns the checksum of the same place, read in dom0.
pub fn read_pattern(dom0: &mut Agent, path: &str, mebibyte: u32) -> Result<String> {
    dom0.ask(&format!(
        "dd if={path} bs=4k count=16 skip=$(({mebibyte} * 256)) iflag=direct 2>/dev/null | sha256sum"
    ))
}

/// The start of every fio command. Options before the first `--name` apply to all jobs.
fn fio(vdev: &str) -> String {
    format!(
        "fio --output-format=json --filename=/dev/{vdev} --direct=1 --thread --ioengine=libaio \
         --iodepth=8 --verify_fatal=1"
    )
}

fn fio_command(vdev: &str, sizes: &[(&str, u32)], seed: usize) -> String {
    let mut command = fio(vdev);
    command += &format!(" --rw=randwrite --verify=crc32c --randseed={seed} --size={REGION_MIB}M");
    for ((size, count), region) in sizes.iter().zip(0u32..) {
        let offset = region * REGION_MIB;
        command += &format!(
            " --name={size} --stonewall --bs={size} --offset={offset}M --number_ios={count}"
        );
    }
    command
}

fn cpus_command(vdev: &str, cpus: u32) -> String {
    let mut command = fio(vdev);
    command += &format!(
        " --rw=randwrite --verify=crc32c --size={REGION_MIB}M --bsrange=4k-128k --number_ios=48"
    );
    for cpu in 0..cpus {
        let offset = cpu * REGION_MIB;
        command += &format!(" --name=cpu{cpu} --cpus_allowed={cpu} --offset={offset}M");
    }
    command
}

/// The first job is fio's own verification of trims: fio trims `--trim_percentage` of the blocks that it
/// wrote, in a batch after each `--trim_backlog`, and they must read as zeroes (`--trim_verify_zero`).
/// Before 3.40 fio fails an assertion (`fio_ro_check`) if such a job only writes, so this one is a
/// `trimwrite`; before 3.41, `randtrimwrite` writes nothing at an `--offset`. Only one request is in
/// flight, because fio does not wait for the end of a write before it trims the block.
fn trims_command(vdev: &str, mebibyte: u32) -> String {
    let (first, second) = (mebibyte, mebibyte + 4);
    let mut command = fio(vdev);
    command += " --size=4M";
    for (name, job) in [
        (
            "backlog",
            format!(
                "--offset={first}M --rw=trimwrite --bs=32k --iodepth=1 --verify=crc32c \
                 --trim_percentage=50 --trim_verify_zero=1 --trim_backlog=16"
            ),
        ),
        ("fill", format!("--offset={second}M --rw=write --bs=256k")),
        ("trim", format!("--offset={second}M --rw=randtrim --bs=64k")),
        (
            "zeroes",
            format!("--offset={second}M --rw=read --bs=256k --verify=pattern --verify_pattern=0"),
        ),
    ] {
        command += &format!(" --name={name} --stonewall {job}");
    }
    command
}

#[derive(Deserialize)]
struct FioReport {
    jobs: Vec<FioJob>,
}

#[derive(Deserialize)]
struct FioJob {
    error: i32,
    read: FioDirection,
    write: FioDirection,
    trim: FioDirection,
}

#[derive(Deserialize)]
struct FioDirection {
    total_ios: u32,
}

fn parse_jobs(text: &str) -> Result<Vec<FioJob>> {
    // fio may write notes before the report.
    let start = text.find('{').context("there is no report")?;
    let report: FioReport = serde_json::from_str(&text[start..])?;
    ensure!(report.jobs.iter().all(|job| job.error == 0), "a job failed");
    Ok(report.jobs)
}

fn parse_fio(text: &str) -> Result<Requests> {
    let jobs = parse_jobs(text)?;
    let requests = Requests {
        reads: jobs.iter().map(|job| job.read.total_ios).sum(),
        writes: jobs.iter().map(|job| job.write.total_ios).sum(),
    };
    ensure!(
        requests.writes > 0 && requests.reads >= requests.writes,
        "not everything was read back: {requests:?}"
    );
    Ok(requests)
}

fn parse_trims(text: &str) -> Result<u32> {
    let jobs = parse_jobs(text)?;
    let [backlog, fill, trim, zeroes] = &jobs[..] else {
        bail!("{} jobs instead of 4", jobs.len());
    };
    let (written, read_back) = (backlog.write.total_ios, backlog.read.total_ios);
    ensure!(written > 0 && read_back >= written, "not everything was read back");
    ensure!(
        fill.write.total_ios == zeroes.read.total_ios,
        "not everything was read after its trim"
    );
    // Each block is trimmed before it is written.
    ensure!(backlog.trim.total_ios > written, "nothing was trimmed after it was written");
    ensure!(trim.trim.total_ios > 0, "nothing was trimmed at random");
    Ok(backlog.trim.total_ios + trim.trim.total_ios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_sizes_do_not_share_a_region() {
        let command = fio_command("xvda", &[("512", 48), ("4k", 64)], 3);
        assert!(command.contains("--name=512 --stonewall --bs=512 --offset=0M --number_ios=48"));
        assert!(command.contains("--name=4k --stonewall --bs=4k --offset=8M --number_ios=64"));
    }

    #[test]
    fn fio_must_have_read_back_what_it_wrote() {
        let report = |error, reads, writes| {
            parse_fio(&format!(
                "note\n{{\"jobs\": [{{\"error\": {error}, \"read\": {{\"total_ios\": {reads}}}, \
                 \"write\": {{\"total_ios\": {writes}}}, \"trim\": {{\"total_ios\": 0}}}}]}}"
            ))
        };
        assert_eq!(report(0, 8, 8).expect("good"), Requests { reads: 8, writes: 8 });
        assert!(report(84, 8, 8).is_err());
        assert!(report(0, 7, 8).is_err());
        assert!(report(0, 0, 0).is_err());
    }

    #[test]
    fn each_processor_writes_in_a_region_of_its_own() {
        let command = cpus_command("xvda", 2);
        assert!(command.contains("--name=cpu0 --cpus_allowed=0 --offset=0M"), "{command}");
        assert!(command.contains("--name=cpu1 --cpus_allowed=1 --offset=8M"), "{command}");
    }

    #[test]
    fn trims_count_only_if_their_blocks_were_read_afterwards() {
        let job = |reads, writes, trims| {
            format!(
                "{{\"error\": 0, \"read\": {{\"total_ios\": {reads}}}, \
                 \"write\": {{\"total_ios\": {writes}}}, \"trim\": {{\"total_ios\": {trims}}}}}"
            )
        };
        let report = |backlog, zeroes, trims| {
            let jobs = [job(8, 8, backlog), job(0, 4, 0), job(0, 0, trims), job(zeroes, 0, 0)];
            parse_trims(&format!("{{\"jobs\": [{}]}}", jobs.join(", ")))
        };
        assert_eq!(report(12, 4, 5).expect("good"), 17);
        assert!(report(8, 4, 5).is_err());
        assert!(report(12, 3, 5).is_err());
        assert!(report(12, 4, 0).is_err());
    }
}
