//! The guest's jobs: fio on one disk after the other.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::agent::Agent;

/// Warm-up of each turn, in milliseconds of the machine's time: the backend maps its persistent grants.
pub(super) const WARMUP_MS: u32 = 100;

/// Measured time of each turn, in milliseconds of the machine's time: some thousands of requests, which
/// take seconds on the host.
pub(super) const TURN_MS: u32 = 500;

/// Longest time for a job, in the machine's time.
const LIMIT: Duration = Duration::from_secs(60);

const NS_PER_S: f64 = 1e9;

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) operation: Operation,
    pub(super) depth: u32,
}

/// What its requests are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read,
    Write,
}

/// All jobs. Targets are judged by the first.
pub(super) const JOBS: [Job; 4] = [
    Job { operation: Operation::Read, depth: 32 },
    Job { operation: Operation::Read, depth: 1 },
    Job { operation: Operation::Write, depth: 32 },
    Job { operation: Operation::Write, depth: 1 },
];

impl Job {
    /// The job's name in the report.
    pub(super) fn name(self) -> String {
        let operation = match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
        };
        format!("4 KiB random {operation}, {} in flight", self.depth)
    }
}

/// Runs the job on one disk after the other. Returns instructions per request, in the disks' order.
pub(super) fn run(guest: &mut Agent, job: Job, disks: &[&str]) -> Result<Vec<f64>> {
    let output = guest.ask_within(&command(job, disks), LIMIT)?;
    parse(&output, job, disks).with_context(|| format!("fio: {output}"))
}

fn command(job: Job, disks: &[&str]) -> String {
    let rw = match job.operation {
        Operation::Read => "randread",
        Operation::Write => "randwrite",
    };
    let mut command = format!(
        "fio --output-format=json --direct=1 --thread --ioengine=libaio --bs=4k --norandommap \
         --rw={rw} --iodepth={} --time_based --ramp_time={WARMUP_MS}ms --runtime={TURN_MS}ms",
        job.depth
    );
    for disk in disks {
        command += &format!(" --name={disk} --stonewall --filename=/dev/{disk}");
    }
    command
}

#[derive(Deserialize)]
struct Report {
    jobs: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    jobname: String,
    error: i32,
    read: Direction,
    write: Direction,
}

#[derive(Deserialize)]
struct Direction {
    /// I/Os per second of the machine's time.
    iops: f64,
}

fn parse(text: &str, job: Job, disks: &[&str]) -> Result<Vec<f64>> {
    // fio may write notes before the report.
    let start = text.find('{').context("there is no report")?;
    let report: Report = serde_json::from_str(&text[start..])?;
    let names: Vec<&str> = report.jobs.iter().map(|turn| turn.jobname.as_str()).collect();
    ensure!(names == disks, "turns of {names:?}");
    let turns = report.jobs.iter().map(|turn| {
        let direction = match job.operation {
            Operation::Read => &turn.read,
            Operation::Write => &turn.write,
        };
        ensure!(turn.error == 0 && direction.iops > 0.0, "{} has failed", turn.jobname);
        Ok(NS_PER_S / direction.iops)
    });
    turns.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Job = Job { operation: Operation::Read, depth: 32 };
    const WRITE: Job = Job { operation: Operation::Write, depth: 1 };

    fn report(error: i32) -> String {
        let turn = |name, reads| {
            format!(
                "{{\"jobname\": \"{name}\", \"error\": {error}, \"read\": {{\"iops\": {reads}}}, \
                 \"write\": {{\"iops\": 0.0}}}}"
            )
        };
        format!("note\n{{\"jobs\": [{}, {}]}}", turn("xvda", 20_000.0), turn("xvdb", 8000.0))
    }

    #[test]
    fn iops_in_the_machines_time_give_instructions_per_request() {
        let turns = parse(&report(0), READ, &["xvda", "xvdb"]).expect("good");
        assert_eq!(turns, [50_000.0, 125_000.0]);
    }

    #[test]
    fn a_turn_that_did_not_do_what_it_should_is_an_error() {
        assert!(parse(&report(5), READ, &["xvda", "xvdb"]).is_err());
        assert!(parse(&report(0), WRITE, &["xvda", "xvdb"]).is_err(), "nothing was written");
        assert!(parse(&report(0), READ, &["xvda"]).is_err());
        assert!(parse("note", READ, &[]).is_err());
    }

    #[test]
    fn disks_take_turns() {
        let command = command(WRITE, &["xvda", "xvdb"]);
        assert!(command.contains(" --rw=randwrite --iodepth=1 "), "{command}");
        assert!(command.ends_with(
            " --name=xvda --stonewall --filename=/dev/xvda --name=xvdb --stonewall \
             --filename=/dev/xvdb"
        ));
    }

    #[test]
    fn the_judged_job_is_the_first() {
        assert_eq!(JOBS[0].name(), "4 KiB random read, 32 in flight");
    }
}
