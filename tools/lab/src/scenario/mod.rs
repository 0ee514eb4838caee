//! The scenarios. Each is a function that gets a fresh dom0.

mod blkload;
mod first_disk;
mod guest_32bit;
pub(crate) mod guest_io;
mod guest_suites;
mod protocol;
mod reconnect;

use std::fs;
use std::time::Instant;

use anyhow::Result;

use crate::backend::{Daemon, Footprint};
use crate::lab::{self, Lab, Options};
use crate::machine::Equipment;
use crate::qemu::Idle;
use crate::report::Report;

/// Something that the lab can prove.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it proves, in one line.
    pub about: &'static str,
    /// Whether its guests need the root with programs.
    pub programs: bool,
    /// Whether dom0 needs `blkload`.
    pub blkload: bool,
    /// Its steps; an error is a failure.
    pub run: fn(&mut Lab) -> Result<()>,
}

/// All scenarios, in the order of `lab all`.
pub const SCENARIOS: [Scenario; 6] = [
    first_disk::SCENARIO,
    reconnect::SCENARIO,
    protocol::SCENARIO,
    guest_32bit::SCENARIO,
    guest_suites::SCENARIO,
    blkload::SCENARIO,
];

/// Looks a scenario up by its name.
pub fn find(name: &str) -> Option<Scenario> {
    SCENARIOS.into_iter().find(|scenario| scenario.name == name)
}

/// Runs one scenario on a machine of its own.
pub fn run(scenario: &Scenario, options: &Options) -> Result<Report> {
    let start = Instant::now();
    lab::tell(format_args!("{}: on {}", scenario.name, options.backend.name()));
    let equipment = Equipment {
        kernel: options.kernel,
        binaries: &options.binaries,
        programs: scenario.programs,
        idle: Idle::Passes,
    };
    let (steps, ()) = lab::on_machine(scenario.name, equipment, options, scenario.run)?;
    let report = Report {
        scenario: scenario.name.into(),
        backend: options.backend.name().into(),
        steps,
        seconds: start.elapsed().as_secs_f64(),
    };
    if options.keep_logs {
        let file = options.logs.join(scenario.name).join("report.json");
        fs::write(file, serde_json::to_string_pretty(&report)?)?;
    }
    lab::tell(report.summary());
    Ok(report)
}

/// Shell code for dom0: `device NAME BLOCK_BYTES MIB` makes a block device in memory that supports
/// discards. The kernel numbers such devices in the order in which they are switched on.
const MEMORY_DEVICES: &str = "
    modprobe null_blk nr_devices=0
    mountpoint -q /sys/kernel/config || mount -t configfs configfs /sys/kernel/config
    device() {
        mkdir /sys/kernel/config/nullb/$1
        cd /sys/kernel/config/nullb/$1
        echo $2 >blocksize
        echo $3 >size
        echo 1 >memory_backed
        echo 1 >discard
        echo 1 >power
        [ $(blockdev --getss /dev/$1) = $2 ]
    }";

/// The last step if polldisk serves the disks.
fn end_daemon(lab: &mut Lab, daemon: Option<Daemon>) -> Result<()> {
    daemon.map_or(Ok(()), |daemon| {
        lab.step("SIGTERM ends polldisk with status 0", |lab| daemon.stop(&mut lab.dom0))
    })
}

/// [`end_daemon`] for a daemon that must hold no more now than when it was `idle`.
fn end_idle_daemon(lab: &mut Lab, daemon: Option<Daemon>, idle: Option<Footprint>) -> Result<()> {
    daemon.zip(idle).map_or(Ok(()), |(daemon, idle)| {
        lab.step("polldisk holds what it held before, and ends", |lab| {
            daemon.expect_footprint(&mut lab.dom0, idle)?;
            daemon.stop(&mut lab.dom0)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_is_found_by_its_name() {
        for scenario in SCENARIOS {
            assert_eq!(find(scenario.name).map(|found| found.about), Some(scenario.about));
        }
        assert!(find("all").is_none());
    }
}
