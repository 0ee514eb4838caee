//! `polldisk list`: every disk, its state and its rates.

use std::borrow::Cow;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;
use polldisk::control::admin::client::request;
use polldisk::control::admin::protocol::{DiskReport, Reply, Request};
use polldisk::output;
use polldisk::text::printable;

use super::admin::Daemon;
use super::rates::{DiskRates, duration, rates, shorten, table, workers};

/// Show every disk: state, backing, worker, IOPS and latency percentiles
#[derive(Args, Debug)]
pub struct List {
    /// Print a JSON array with everything known about each disk
    #[arg(long)]
    json: bool,
    /// Seconds over which to measure rates and percentiles; 0: since each disk connected
    ///
    /// Workers read their clock once per pass over their rings. A request that is answered in the same pass
    /// has no measurable latency and is shown as "<1 us".
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, allow_negative_numbers = true)]
    interval: f64,
    #[command(flatten)]
    daemon: Daemon,
}

impl List {
    /// Asks the daemon twice and prints the rates in between.
    pub fn run(self) -> anyhow::Result<()> {
        let Ok(interval) = Duration::try_from_secs_f64(self.interval) else {
            bail!("--interval {}: give a number of seconds, 0 or more", self.interval);
        };
        let disks = observe(&self.daemon.admin, interval)?;
        if self.json {
            output::print(serde_json::to_string_pretty(&disks)?)?;
        } else {
            output::print(page(&disks, columns()))?;
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

/// The current state of all disks of a daemon.
pub fn list(admin: &Path) -> anyhow::Result<Vec<DiskReport>> {
    match request(admin, &Request::List)? {
        Reply::Disks { disks } => Ok(disks),
        _ => bail!("the daemon did not answer with a list; is it another version?"),
    }
}

/// The width of the terminal; `None` if output does not go to one.
fn columns() -> Option<usize> {
    let (_, columns) = console::Term::stdout().size_checked()?;
    Some(columns.into())
}

/// The whole output: a table, whose targets are shortened until it fits `columns`, and below it the
/// failures and warnings of disks.
fn page(disks: &[DiskRates], columns: Option<usize>) -> String {
    let widest = disks.iter().map(|disk| console::measure_text_width(&target(disk))).max();
    let widest = widest.unwrap_or(0);
    let mut page = disk_table(disks, widest);
    let excess = width(&page).saturating_sub(columns.unwrap_or(usize::MAX));
    if excess > 0 {
        page = disk_table(disks, widest.saturating_sub(excess).max(TARGET_COLUMNS_MIN));
    }
    let remarks = disks.iter().flat_map(|rates| remarks(&rates.disk)).collect::<String>();
    match remarks.as_str() {
        "" => page,
        remarks => format!("{page}\n{remarks}"),
    }
}

/// A line for each failure or warning of a disk.
fn remarks(disk: &DiskReport) -> impl Iterator<Item = String> {
    let failure = (!disk.failure.is_empty()).then(|| disk.failure.clone());
    let warnings = disk.warnings.iter().map(|warning| format!("warning: {warning}"));
    let line = |text: String| format!("\n{} {}: {}", disk.domid, disk.vdev, printable(&text));
    failure.into_iter().chain(warnings).map(line)
}

/// Columns that a target gets at least, however narrow the terminal is.
const TARGET_COLUMNS_MIN: usize = 16;

fn width(table: &str) -> usize {
    table.lines().map(console::measure_text_width).max().unwrap_or(0)
}

fn target(rates: &DiskRates) -> Cow<'_, str> {
    printable(&rates.disk.target)
}

fn disk_table(disks: &[DiskRates], target_columns: usize) -> String {
    let header = [
        "DOMID", "VDEV", "STATE", "TARGET", "MODE", "SIZE", "WORKER", "IOPS", "MB/s", "P50", "P99",
        "P99.9",
    ];
    table(&header, disks.iter().map(|disk| row(disk, target_columns)))
}

fn row(rates: &DiskRates, target_columns: usize) -> Vec<String> {
    let disk = &rates.disk;
    vec![
        disk.domid.to_string(),
        disk.vdev.clone(),
        disk.state.clone(),
        shorten(&target(rates), target_columns),
        if disk.read_only { "r" } else { "w" }.to_owned(),
        match disk.backing.as_str() {
            "" => "-".to_owned(),
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

#[cfg(test)]
mod test {
    use super::super::rates::test::report;
    use super::*;

    fn disk(domid: u32, target: &str, failure: &str) -> DiskRates {
        let mut disk = report(1000, 5, &[(1, 5)]);
        (disk.domid, disk.target, disk.failure) = (domid, target.into(), failure.into());
        rates(&[], vec![disk], Duration::ZERO).remove(0)
    }

    #[test]
    fn targets_are_shortened_until_the_table_fits_the_terminal() {
        let long = format!("raw:/srv/{}/guest.img", "x".repeat(200));
        let disks = [disk(5, &long, ""), disk(6, "null:8G", "")];
        assert!(page(&disks, None).contains(&long));
        for columns in [100, 120, 200] {
            let page = page(&disks, Some(columns));
            assert_eq!(width(&page), columns, "{page}");
            assert!(
                page.contains("raw:") && page.contains("...") && page.contains("t.img"),
                "{page}"
            );
        }
        // Even if the terminal is too narrow for a table, it gets one.
        for columns in [0, 1, 40] {
            assert!(page(&disks, Some(columns)).contains("guest.img"));
        }
        assert!(page(&disks, Some(1000)).contains(&long));
        assert_eq!(page(&[], Some(80)).lines().count(), 1);
    }

    #[test]
    fn failures_stand_below_the_table_a_line_each() {
        let disks =
            [disk(5, "null:8G", ""), disk(6, "raw:/a\nb", "it\nfailed"), disk(7, "", "so did it")];
        let page = page(&disks, Some(80));
        let lines: Vec<&str> = page.lines().collect();
        assert_eq!(lines[4..], ["", "6 xvda: it\\nfailed", "7 xvda: so did it"], "{page}");
        assert!(lines[..4].iter().all(|line| !line.contains("failed")), "{page}");
    }

    #[test]
    fn warnings_stand_there_too() {
        let mut disk = disk(5, "raw:/a", "");
        disk.disk.warnings = vec!["it is slow".to_owned()];
        let page = page(&[disk], None);
        assert!(page.ends_with("\n\n5 xvda: warning: it is slow"), "{page}");
    }
}
