//! The cost of a request on each backend, in instructions of the whole machine: guest, dom0 and Xen.
//!
//! While a processor of the emulated machine works, the machine's time is the number of executed
//! instructions, a nanosecond each. So the guest's IOPS give the instructions per request, and the host's
//! load changes nothing. Seconds on real hardware do not follow from them: there an instruction may wait
//! for memory, and a hypercall or an interrupt costs more than its instructions.
//!
//! All backends serve one guest in one boot. Each has a disk without storage behind it, and they take
//! turns under the same job.

mod fio;
mod report;

use anyhow::{Context, Result, ensure};

pub use self::report::{Case, Comparison, Setting};
use crate::backend::{Backend, Daemon, Storage};
use crate::lab::{self, Lab};
use crate::machine::Equipment;
use crate::qemu::{self, Idle};
use crate::scenario::guest_io::expect_disk;
use crate::xen::Guest;

/// How the comparison is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The kernel, the polldisk to measure and the folder for logs, as for scenarios.
    pub lab: lab::Options,
    /// What the report calls that polldisk.
    pub origin: String,
    /// Turns of each backend under each job.
    pub rounds: u32,
    /// Extra options for `polldisk serve`.
    pub serve: String,
}

/// A backend and its disk.
#[derive(Clone, Copy, Debug)]
struct Contender {
    backend: Backend,
    vdev: &'static str,
    device: &'static str,
}

/// All contenders, in the order of their turns.
const CONTENDERS: [Contender; 3] = [
    Contender { backend: Backend::Polldisk, vdev: "xvda", device: "/dev/nullb0" },
    Contender { backend: Backend::Qdisk, vdev: "xvdb", device: "/dev/nullb1" },
    Contender { backend: Backend::Blkback, vdev: "xvdc", device: "/dev/nullb2" },
];

/// Devices that answer at once and store nothing, so that only the backend and the guest are measured.
const DEVICES: &str = "modprobe null_blk nr_devices=3 queue_mode=2 irqmode=0 gb=4";
const DISK_BYTES: u64 = 4 << 30;

/// polldisk's type of backend. Not `vbd`, which the kernel's backend serves in this boot.
const POLLDISKS_TYPE: &str = "polldisk";

/// Runs the comparison on a machine of its own.
pub fn run(options: &Options) -> Result<Comparison> {
    let equipment = Equipment {
        kernel: options.lab.kernel,
        binaries: &options.lab.binaries,
        programs: false,
        idle: Idle::IsSkipped,
    };
    let work = |lab: &mut Lab| compare(lab, options);
    let (_, comparison) = lab::on_machine("compare", equipment, &options.lab, work)?;
    Ok(comparison)
}

fn compare(lab: &mut Lab, options: &Options) -> Result<Comparison> {
    let (daemon, mut guest) = connect(lab, options)?;
    let setting = lab.step("what it runs on", |lab| setting(lab, &mut guest, options))?;
    let mut cases = no_cases();
    for round in 1..=options.rounds {
        for job in fio::JOBS {
            lab.step(&format!("round {round} of {}: {}", options.rounds, job.name()), |lab| {
                let turns = fio::run(&mut guest.agent, job, &CONTENDERS.map(|one| one.vdev))?;
                for (contender, instructions) in CONTENDERS.iter().zip(turns) {
                    let backend = contender.backend.name();
                    lab.figure(backend, instructions.round());
                    let case = cases.iter_mut().find(|case| case.is(&job.name(), backend));
                    case.context("no case for this turn")?.instructions.push(instructions);
                }
                Ok(())
            })?;
        }
    }
    ensure!(daemon.is_alive(&mut lab.dom0), "polldisk has ended");
    Ok(Comparison::new(setting, cases))
}

/// An empty case for each job and backend, in the report's order.
fn no_cases() -> Vec<Case> {
    let backends = CONTENDERS.map(|one| one.backend.name());
    let of_job = |job: fio::Job| backends.map(|backend| Case::new(job.name(), backend));
    fio::JOBS.into_iter().flat_map(of_job).collect()
}

/// Creates a guest with a connected disk of each contender.
fn connect(lab: &mut Lab, options: &Options) -> Result<(Daemon, Guest)> {
    lab.step("null_blk devices as storage", |lab| lab.dom0.ask(DEVICES))?;
    let daemon = lab.step("polldisk and blkback start", |lab| {
        Backend::Blkback.start(&mut lab.dom0, None)?;
        let serve = format!("--backend-type {POLLDISKS_TYPE} {}", options.serve);
        Daemon::start(&mut lab.dom0, &serve)
    })?;
    let mut guest = lab.step("the guest boots with the others' disks", |lab| {
        let others = CONTENDERS.iter().filter(|one| one.backend != Backend::Polldisk);
        let disks = others
            .map(|Contender { backend, vdev, device }| {
                backend.disk(&mut lab.dom0, vdev, Storage::Device(device))
            })
            .collect::<Result<Vec<_>>>()?;
        lab.create_guest("compare", &disks)
    })?;
    lab.step("polldisk's disk joins them", |lab| {
        for Contender { vdev, device, .. } in
            CONTENDERS.iter().filter(|one| one.backend == Backend::Polldisk)
        {
            let domid = guest.domid;
            lab.dom0.ask(&format!(
                "polldisk attach --domid {domid} --vdev {vdev} --target raw:{device}"
            ))?;
        }
        CONTENDERS.iter().try_for_each(|one| expect_disk(&mut guest.agent, one.vdev, DISK_BYTES))
    })?;
    Ok((daemon, guest))
}

/// What the report says about the machine. Of the host, only its emulator matters.
fn setting(lab: &mut Lab, guest: &mut Guest, options: &Options) -> Result<Setting> {
    let dom0 = lab.dom0.ask(
        "xl info xen_version
         uname -r
         nproc
         /usr/libexec/xen-qemu-system-i386 --version | head -n 1",
    )?;
    let guests = guest.agent.ask("uname -r; nproc; fio --version")?;
    Ok(Setting {
        polldisk: options.origin.clone(),
        serve: options.serve.clone(),
        emulator: qemu::version()?,
        dom0: report::Dom0::parse(&dom0).with_context(|| format!("dom0's versions: {dom0}"))?,
        guest: report::InGuest::parse(&guests)
            .with_context(|| format!("the guest's versions: {guests}"))?,
        rounds: options.rounds,
        warmup_ms: fio::WARMUP_MS,
        turn_ms: fio::TURN_MS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_contenders_share_a_disk() {
        for (index, one) in CONTENDERS.iter().enumerate() {
            for other in &CONTENDERS[..index] {
                assert!(one.vdev != other.vdev && one.device != other.device, "{one:?}");
            }
        }
        assert!(DEVICES.contains(&format!("nr_devices={} ", CONTENDERS.len())));
    }
}
