//! `polldisk list`: every disk, what it does and how fast.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{DiskReport, Reply, Request};
use polldisk::output;

use super::admin::Daemon;
use super::rates::{DiskRates, duration, rates, table, workers};

/// Show every disk: state, backing, worker, IOPS and latency percentiles
#[derive(Args, Debug)]
pub struct List {
    /// Print a JSON array with everything known of each disk
    #[arg(long)]
    json: bool,
    /// Seconds over which rates and percentiles are taken; 0: since each disk connected
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    interval: f64,
    #[command(flatten)]
    daemon: Daemon,
}

impl List {
    /// Asks the daemon twice and prints what happened in between.
    pub fn run(self) -> anyhow::Result<()> {
        let Ok(interval) = Duration::try_from_secs_f64(self.interval) else {
            bail!("--interval {}: give a number of seconds, 0 or more", self.interval);
        };
        let disks = observe(&self.daemon.admin, interval)?;
        if self.json {
            output::print(serde_json::to_string_pretty(&disks)?)?;
        } else {
            output::print(disk_table(&disks))?;
        }
        Ok(())
    }
}

fn observe(admin: &Path, interval: Duration) -> anyhow::Result<Vec<DiskRates>> {
    if interval.is_zero() {
        return Ok(rates(&[], list(admin)?, interval));
    }
    let start = Instant::now();
    let before = list(admin)?;
    std::thread::sleep(interval);
    let after = list(admin)?;
    Ok(rates(&before, after, start.elapsed()))
}

/// All disks of a daemon, as they are.
pub fn list(admin: &Path) -> anyhow::Result<Vec<DiskReport>> {
    match request(admin, &Request::List)? {
        Reply::Disks { disks } => Ok(disks),
        _ => bail!("the daemon answered something else than a list; is it another version?"),
    }
}

fn disk_table(disks: &[DiskRates]) -> comfy_table::Table {
    let header = [
        "DOMID", "VDEV", "STATE", "TARGET", "MODE", "SIZE", "WORKER", "IOPS", "MB/s", "P50", "P99",
        "P99.9",
    ];
    table(&header, disks.iter().map(row))
}

fn row(rates: &DiskRates) -> Vec<String> {
    let disk = &rates.disk;
    vec![
        disk.domid.to_string(),
        disk.vdev.clone(),
        if disk.failure.is_empty() {
            disk.state.clone()
        } else {
            format!("{} ({})", disk.state, disk.failure)
        },
        disk.target.clone(),
        if disk.read_only { "r" } else { "w" }.to_owned(),
        match disk.backing.as_str() {
            "empty" => "empty".to_owned(),
            _ => polldisk::units::Bytes(disk.sectors.saturating_mul(512)).to_string(),
        },
        workers(disk),
        format!("{:.0}", rates.iops),
        format!("{:.1}", rates.mb_per_s),
        duration(rates.p50_ns),
        duration(rates.p99_ns),
        duration(rates.p999_ns),
    ]
}
