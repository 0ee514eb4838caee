//! Every feature that Linux's driver can negotiate, on each kind of storage, and then without each feature.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::guest_io::{
    expect_disk, read_pattern, verify, verify_on_cpus, verify_trims, write_pattern,
};
use super::{MEMORY_DEVICES, Scenario, end_idle_daemon};
use crate::backend::{Backend, Daemon, Storage};
use crate::lab::Lab;
use crate::xen::{Guest, Size, wait_for};

pub(super) const SCENARIO: Scenario = Scenario {
    name: "protocol",
    about: "4 queues, 64 KiB rings, 256 segments, persistent grants, trims; then without each",
    programs: false,
    blkload: false,
    run,
};

/// With all features at once, blkfront keeps a page for every segment of every entry of every ring:
/// 4 * 512 * 257 pages for one disk.
const GUEST: Size = Size { vcpus: QUEUES, memory_mib: 3072 };
const QUEUES: u32 = 4;

const DISK_MIB: u64 = 64;
const BLOCK_SIZES: [(&str, u32); 5] =
    [("4k", 64), ("16k", 32), ("64k", 32), ("256k", 16), ("1m", 8)];

/// Behind everything that `verify` writes: 8 MiB of trims, then 8 MiB of discards between two patterns.
const TRIM_MIB: u32 = 40;
const HOLE_MIB: u32 = 50;
const HOLE_LENGTH_MIB: u32 = 8;

const UNLOAD_LIMIT: Duration = Duration::from_secs(30);

/// A disk of the scenario.
#[derive(Clone, Copy, Debug)]
struct Disk {
    vdev: &'static str,
    /// Its number in xenstore.
    number: u32,
    about: &'static str,
    storage: Storage<'static>,
    sector_bytes: u32,
}

const DISKS: [Disk; 4] = [
    Disk {
        vdev: "xvda",
        number: 51712,
        about: "a device",
        storage: Storage::Device("/dev/nullb0"),
        sector_bytes: 512,
    },
    Disk {
        vdev: "xvdb",
        number: 51728,
        about: "a file",
        storage: Storage::File("/srv/disk.img"),
        sector_bytes: 512,
    },
    Disk {
        vdev: "xvdc",
        number: 51744,
        about: "a 4Kn device",
        storage: Storage::Device("/dev/nullb1"),
        sector_bytes: 4096,
    },
    Disk {
        vdev: "xvdd",
        number: 51760,
        about: "a file on a 4Kn device",
        storage: Storage::File("/srv/4kn/disk.img"),
        sector_bytes: 4096,
    },
];

/// What a frontend is allowed to use.
#[derive(Clone, Copy, Debug)]
struct Features {
    queues: u32,
    ring_page_order: u32,
    /// 0: no indirect requests.
    indirect_segments: u32,
    persistent: bool,
}

const ALL: Features =
    Features { queues: QUEUES, ring_page_order: 4, indirect_segments: 256, persistent: true };
const NONE: Features =
    Features { queues: 1, ring_page_order: 0, indirect_segments: 0, persistent: false };

/// The driver without each feature, on a file with sectors of 512 or a device with sectors of 4096.
const WITHOUT: [(&str, Features, Disk); 5] = [
    ("several queues", Features { queues: 1, ..ALL }, DISKS[1]),
    ("rings of several pages", Features { ring_page_order: 0, ..ALL }, DISKS[2]),
    ("indirect requests", Features { indirect_segments: 0, ..ALL }, DISKS[1]),
    ("persistent grants", Features { persistent: false, ..ALL }, DISKS[2]),
    ("any of these", NONE, DISKS[1]),
];

/// Most segments of a request that is not indirect.
const DIRECT_SEGMENTS: u32 = 11;

fn run(lab: &mut Lab) -> Result<()> {
    lab.step("devices of 512 and 4096, a file on each", make_storage)?;
    let daemon = lab
        .step("the backend starts with four queues", |lab| lab.start_backend_with_queues(QUEUES))?;
    let idle = daemon.as_ref().map(|daemon| daemon.footprint(&mut lab.dom0)).transpose()?;
    let mut guest = lab.step("a guest with four processors boots", |lab| {
        lab.create_guest_of(GUEST, "protocol", &[])
    })?;

    load_driver(&mut guest, ALL)?;
    for disk in DISKS {
        prove_all(lab, daemon.as_ref(), &mut guest, disk)?;
    }
    for (what, features, disk) in WITHOUT {
        load_driver(&mut guest, features)?;
        lab.step(&format!("{}: verified without {what}", disk.about), |lab| {
            attach(lab, daemon.as_ref(), &mut guest, disk, features)?;
            note_verified(lab, &mut guest, disk, &BLOCK_SIZES)?;
            guest.detach(&mut lab.dom0, disk.vdev)
        })?;
    }

    lab.step("the guest shuts down", |lab| guest.shut_down(&mut lab.dom0))?;
    end_idle_daemon(lab, daemon, idle)
}

/// Makes devices and files. Files are written in full, so that it is known how much a discard frees.
fn make_storage(lab: &mut Lab) -> Result<()> {
    lab.dom0
        .ask(&format!(
            "set -e
             {MEMORY_DEVICES}
             device nullb0 512 {DISK_MIB}
             device nullb1 4096 {DISK_MIB}
             device nullb2 4096 {}
             mkfs.ext4 -q -b 4096 /dev/nullb2
             mkdir -p /srv/4kn
             mount -t ext4 /dev/nullb2 /srv/4kn
             for file in /srv/disk.img /srv/4kn/disk.img; do
                 dd if=/dev/zero of=$file bs=1M count={DISK_MIB} conv=fsync 2>/dev/null
             done",
            DISK_MIB + 32
        ))
        .map(drop)
}

/// Loads the driver with these features at most. No disk is attached meanwhile.
fn load_driver(guest: &mut Guest, features: Features) -> Result<()> {
    let Features { queues, ring_page_order, indirect_segments, persistent } = features;
    let persistent = u32::from(persistent);
    // The kernel may still use the driver after the last disk is gone from sysfs.
    wait_for(&mut guest.agent, "rmmod xen_blkfront 2>/dev/null", UNLOAD_LIMIT)?;
    guest
        .agent
        .ask(&format!(
            "insmod /lib/modules/xen-blkfront.ko max_queues={queues} \
             max_ring_page_order={ring_page_order} max_indirect_segments={indirect_segments} \
             feature_persistent={persistent}"
        ))
        .map(drop)
}

/// Checks a disk with all features, from attaching to detaching it.
fn prove_all(lab: &mut Lab, daemon: Option<&Daemon>, guest: &mut Guest, disk: Disk) -> Result<()> {
    let about = disk.about;
    lab.step(&format!("{about}: every feature is agreed on"), |lab| {
        attach(lab, daemon, guest, disk, ALL)
    })?;
    lab.step(&format!("{about}: verified from 4 KiB to 1 MiB"), |lab| {
        note_verified(lab, guest, disk, &BLOCK_SIZES)
    })?;
    lab.step(&format!("{about}: verified on four queues at a time"), |lab| {
        let before = queue_events(guest)?;
        let requests = verify_on_cpus(&mut guest.agent, disk.vdev, QUEUES)?;
        let after = queue_events(guest)?;
        lab.figure("writes", requests.writes);
        let used = before.iter().zip(&after).filter(|(before, after)| after > before).count();
        ensure!(used == QUEUES as usize, "{used} queues were used: {before:?}, then {after:?}");
        Ok(())
    })?;
    lab.step(&format!("{about}: trims are verified"), |lab| {
        let trims = verify_trims(&mut guest.agent, disk.vdev, TRIM_MIB)?;
        lab.figure("trims", trims);
        Ok(())
    })?;
    lab.step(&format!("{about}: a discard frees and reads as zeroes"), |lab| {
        expect_discard(lab, guest, disk)
    })?;
    lab.step(&format!("{about}: the disk goes"), |lab| guest.detach(&mut lab.dom0, disk.vdev))
}

/// Attaches the disk and checks that both ends use exactly these features.
fn attach(
    lab: &mut Lab,
    daemon: Option<&Daemon>,
    guest: &mut Guest,
    disk: Disk,
    features: Features,
) -> Result<()> {
    let spec = lab.disk(disk.vdev, disk.storage)?;
    guest.attach(&mut lab.dom0, &spec)?;
    expect_disk(&mut guest.agent, disk.vdev, DISK_MIB << 20)?;
    expect_offer(lab, guest, disk)?;
    expect_frontend_area(lab, guest, disk, features)?;
    expect_driver(lab, guest, disk, features)?;
    if let Some(daemon) = daemon {
        let disks = daemon.list(&mut lab.dom0)?;
        let listed = disks
            .iter()
            .find(|listed| listed.vdev == disk.vdev && listed.domid == guest.domid)
            .with_context(|| format!("no {} in {disks:?}", disk.vdev))?;
        ensure!(listed.state == "Connected" && listed.queues == features.queues, "{listed:?}");
    }
    Ok(())
}

/// Checks what the backend offers in its area. The frontend need not use it.
fn expect_offer(lab: &mut Lab, guest: &Guest, disk: Disk) -> Result<()> {
    let path = format!("/local/domain/0/backend/vbd/{}/{}", guest.domid, disk.number);
    let area = Area::read(lab, &path)?;
    for (key, value) in [
        ("multi-queue-max-queues", QUEUES),
        ("max-ring-page-order", ALL.ring_page_order),
        ("feature-max-indirect-segments", ALL.indirect_segments),
        ("feature-persistent", 1),
        ("feature-discard", 1),
    ] {
        area.expect(key, Some(value))?;
    }
    Ok(())
}

/// Checks what Linux writes. It leaves out the keys of features that it does not use.
fn expect_frontend_area(
    lab: &mut Lab,
    guest: &Guest,
    disk: Disk,
    features: Features,
) -> Result<()> {
    let path = format!("/local/domain/{}/device/vbd/{}", guest.domid, disk.number);
    let area = Area::read(lab, &path)?;
    let several = |count: u32, least| Some(count).filter(|count| *count >= least);
    area.expect("multi-queue-num-queues", several(features.queues, 2))?;
    area.expect("ring-page-order", several(features.ring_page_order, 1))?;
    area.expect("feature-persistent", Some(u32::from(features.persistent)))?;

    let last_queue = match features.queues {
        1 => String::new(),
        queues => format!("queue-{}/", queues - 1),
    };
    let last_page = match features.ring_page_order {
        0 => String::new(),
        order => ((1 << order) - 1).to_string(),
    };
    let last = format!("{last_queue}ring-ref{last_page}");
    ensure!(area.0.contains_key(&last), "no {last} in {area:?}");
    Ok(())
}

/// An area of xenstore, by the keys below it. It is read with a single command, since each command takes
/// the emulator a large part of a second.
#[derive(Debug)]
struct Area(BTreeMap<String, String>);

impl Area {
    fn read(lab: &mut Lab, path: &str) -> Result<Self> {
        Ok(Self::parse(&lab.dom0.ask(&format!("xenstore-ls -f {path}"))?, path))
    }

    fn parse(text: &str, path: &str) -> Self {
        let entries = text.lines().filter_map(|line| {
            let (key, value) = line.strip_prefix(path)?.strip_prefix('/')?.split_once(" = ")?;
            Some((key.into(), value.trim_matches('"').into()))
        });
        Self(entries.collect())
    }

    fn expect(&self, key: &str, value: Option<u32>) -> Result<()> {
        let expected = value.map(|value| value.to_string());
        ensure!(self.0.get(key) == expected.as_ref(), "{key} is not {expected:?}: {self:?}");
        Ok(())
    }
}

/// Checks what the guest's kernel reports for the disk.
fn expect_driver(lab: &Lab, guest: &mut Guest, disk: Disk, features: Features) -> Result<()> {
    let vdev = disk.vdev;
    let (word, segments) = match features.indirect_segments {
        0 => ("disabled", DIRECT_SEGMENTS),
        segments => ("enabled", segments),
    };
    let grants = if features.persistent { "enabled" } else { "disabled" };
    let agreed = format!("persistent grants: {grants}; indirect descriptors: {word};");
    let found = guest.agent.ask(&format!(
        "cd /sys/block/{vdev}
         echo queues $(ls mq | wc -l)
         for limit in max_segments max_hw_sectors_kb logical_block_size; do
             echo $limit $(cat queue/$limit)
         done
         dmesg | grep 'blkfront: {vdev}:' | tail -n 1"
    ))?;
    // blkback serves a file through a loop device, which has sectors of 512 bytes on any storage.
    let sector_bytes = match (lab.backend, disk.storage) {
        (Backend::Blkback, Storage::File(_)) => 512,
        _ => disk.sector_bytes,
    };
    let expected = format!(
        "queues {}\nmax_segments {segments}\nmax_hw_sectors_kb {}\nlogical_block_size {sector_bytes}\n",
        features.queues,
        segments * 4
    );
    ensure!(found.starts_with(&expected), "{found}\ninstead of\n{expected}");
    ensure!(found.contains(&agreed), "{found}\nwithout {agreed}");
    Ok(())
}

fn note_verified(
    lab: &mut Lab,
    guest: &mut Guest,
    disk: Disk,
    sizes: &[(&str, u32)],
) -> Result<()> {
    let requests = verify(&mut guest.agent, disk.vdev, sizes, 1)?;
    lab.figure("writes", requests.writes);
    lab.figure("reads", requests.reads);
    Ok(())
}

/// The number of events of each ring of the guest's only disk, on all processors.
fn queue_events(guest: &mut Guest) -> Result<Vec<u64>> {
    let interrupts = guest.agent.ask("grep -w blkif /proc/interrupts")?;
    Ok(interrupts.lines().map(sum_events).collect())
}

fn sum_events(line: &str) -> u64 {
    line.split_whitespace().skip(1).map_while(|field| field.parse::<u64>().ok()).sum()
}

/// Discards a range between two patterns: the range must read as zeroes, the patterns must stay, and a
/// file must get holes.
fn expect_discard(lab: &mut Lab, guest: &mut Guest, disk: Disk) -> Result<()> {
    let vdev = disk.vdev;
    let fill = format!(
        "dd if=/dev/urandom of=/dev/{vdev} bs=1M seek={HOLE_MIB} count={HOLE_LENGTH_MIB} \
         oflag=direct 2>/dev/null"
    );
    guest.agent.ask(&fill)?;
    let ends = [HOLE_MIB - 1, HOLE_MIB + HOLE_LENGTH_MIB];
    let mut patterns = Vec::new();
    for end in ends {
        patterns.push((end, write_pattern(&mut guest.agent, vdev, end)?));
    }
    let before = file_bytes(lab, disk)?;

    let offset = u64::from(HOLE_MIB) << 20;
    let length = u64::from(HOLE_LENGTH_MIB) << 20;
    guest.agent.ask(&format!("blkdiscard -o {offset} -l {length} /dev/{vdev}"))?;
    let after = file_bytes(lab, disk)?;
    if let Some((before, after)) = before.zip(after) {
        lab.figure("KiB freed", u32::try_from(before.saturating_sub(after) >> 10)?);
        ensure!(before - after == length, "{before} bytes before, {after} after");
    }
    let left = guest.agent.ask(&format!(
        "dd if=/dev/{vdev} bs=1M skip={HOLE_MIB} count={HOLE_LENGTH_MIB} iflag=direct 2>/dev/null |
         tr -d '\\000' | wc -c"
    ))?;
    ensure!(left.trim() == "0", "{left} bytes are not zero");
    for (end, written) in patterns {
        let found = read_pattern(&mut guest.agent, &format!("/dev/{vdev}"), end)?;
        ensure!(found == written, "the pattern at {end} MiB has changed");
    }
    Ok(())
}

/// How much space a disk's file takes up on its filesystem.
fn file_bytes(lab: &mut Lab, disk: Disk) -> Result<Option<u64>> {
    let Storage::File(path) = disk.storage else {
        return Ok(None);
    };
    let blocks: u64 = lab.dom0.ask(&format!("stat -c %b {path}"))?.parse()?;
    Ok(Some(blocks * 512))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_all_processors_are_summed() {
        assert_eq!(sum_events(" 48:  12  0  3  5  xen-dyn  -event  blkif"), 20);
    }

    #[test]
    fn an_absent_key_is_not_an_empty_one() {
        let text = "/a/b/1 = \"\"\n/a/b/1/info = \"0\"\n/a/b/1/queue-3/ring-ref15 = \"8\"";
        let area = Area::parse(text, "/a/b/1");
        assert!(area.expect("info", Some(0)).is_ok());
        assert!(area.expect("info", None).is_err());
        assert!(area.expect("ring-ref", None).is_ok());
        assert!(area.0.contains_key("queue-3/ring-ref15"));
    }

    #[test]
    fn a_disks_number_belongs_to_its_name() {
        for (disk, letter) in DISKS.iter().zip('a'..) {
            assert_eq!(disk.vdev, format!("xvd{letter}"));
            assert_eq!(disk.number, 51712 + 16 * (u32::from(letter) - u32::from('a')));
        }
    }
}
