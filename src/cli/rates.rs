//! Rates and latency percentiles of disks between two reports, and tables of them.

use std::collections::HashMap;
use std::time::Duration;

use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use hdrhistogram::Histogram;
use polldisk::control::admin::protocol::DiskReport;
use polldisk::metrics::new_latency_histogram;
use serde::Serialize;

/// A disk with its rates.
#[derive(Debug, Serialize)]
pub struct DiskRates {
    /// What the daemon reports, with counts since the disk connected.
    #[serde(flatten)]
    pub disk: DiskReport,
    /// Reads, writes and flushes per second.
    pub iops: f64,
    /// Megabytes (10^6 bytes) moved per second.
    pub mb_per_s: f64,
    /// Median latency in nanoseconds.
    pub p50_ns: u64,
    /// Latency that 99 % of the requests did not exceed.
    pub p99_ns: u64,
    /// Latency that 99.9 % of the requests did not exceed.
    pub p999_ns: u64,
}

/// Rates of each disk in `after` over the `elapsed` time since `before`. A disk that is new or has
/// reconnected counts from its connection on.
pub fn rates(before: &[DiskReport], after: Vec<DiskReport>, elapsed: Duration) -> Vec<DiskRates> {
    let earlier: HashMap<_, _> =
        before.iter().map(|disk| ((disk.kind.as_str(), disk.domid, disk.devid), disk)).collect();
    after
        .into_iter()
        .map(|disk| {
            let before = earlier
                .get(&(disk.kind.as_str(), disk.domid, disk.devid))
                .copied()
                .filter(|before| before.uptime_ms <= disk.uptime_ms);
            let elapsed = match before {
                Some(_) => elapsed,
                None => Duration::from_millis(disk.uptime_ms),
            };
            disk_rates(before, disk, elapsed)
        })
        .collect()
}

fn disk_rates(before: Option<&DiskReport>, disk: DiskReport, elapsed: Duration) -> DiskRates {
    let seconds = elapsed.as_secs_f64().max(1e-9);
    let requests = |disk: &DiskReport| disk.counts.reads + disk.counts.writes + disk.counts.flushes;
    let bytes = |disk: &DiskReport| disk.counts.read_bytes + disk.counts.written_bytes;
    let since = |count: &dyn Fn(&DiskReport) -> u64| {
        count(&disk).saturating_sub(before.map_or(0, count)) as f64 / seconds
    };
    let latency = latency_between(before, &disk);
    DiskRates {
        iops: since(&requests),
        mb_per_s: since(&bytes) / 1e6,
        p50_ns: latency.value_at_quantile(0.5),
        p99_ns: latency.value_at_quantile(0.99),
        p999_ns: latency.value_at_quantile(0.999),
        disk,
    }
}

fn latency_between(before: Option<&DiskReport>, after: &DiskReport) -> Histogram<u64> {
    let histogram = |disk: &DiskReport| {
        let mut histogram = new_latency_histogram();
        for (value_ns, count) in &disk.latency {
            histogram.saturating_record_n(*value_ns, *count);
        }
        histogram
    };
    let mut latency = histogram(after);
    if let Some(before) = before {
        // This fails only if the earlier one holds more, as after a reconnect, for which `before` is `None`.
        let _ = latency.subtract(histogram(before));
    }
    latency
}

/// A table for people: the first column is aligned left, the others right.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header).add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.trim_fmt()
}

/// The worker of each ring of a disk.
pub fn workers(disk: &DiskReport) -> String {
    let workers: Vec<String> = disk.workers.iter().map(ToString::to_string).collect();
    if workers.is_empty() { "-".to_owned() } else { workers.join(",") }
}

/// Shortens a text to this width in its middle, because the ends of a path tell more.
pub fn shorten(text: &str, columns: usize) -> String {
    const GAP: &str = "...";
    if console::measure_text_width(text) <= columns {
        return text.to_owned();
    }
    let room = columns.saturating_sub(GAP.len());
    let head = take(text.chars(), room / 3);
    let tail = take(text.chars().rev(), room - room / 3);
    let tail: String = tail.chars().rev().collect();
    format!("{head}{GAP}{tail}")
}

/// As many of the first characters as fit into this width.
fn take(chars: impl Iterator<Item = char>, columns: usize) -> String {
    let mut used = 0;
    chars
        .take_while(|c| {
            used += console::measure_text_width(c.encode_utf8(&mut [0; 4]));
            used <= columns
        })
        .collect()
}

/// Latencies below this are not shown in detail: workers read their clock once per pass, and a request that
/// is answered in the pass that took it is recorded as 1 ns.
const TOLD_NS_MIN: u64 = 1000;

/// A latency for people to read; 0: there was none.
pub fn duration(ns: u64) -> String {
    match ns {
        0 => "-".to_owned(),
        1..TOLD_NS_MIN => "<1 us".to_owned(),
        TOLD_NS_MIN..10_000 => format!("{:.1} us", ns as f64 / 1e3),
        10_000..10_000_000 => format!("{:.0} us", ns as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.0} ms", ns as f64 / 1e6),
        _ => format!("{:.0} s", ns as f64 / 1e9),
    }
}

#[cfg(test)]
pub mod test {
    use super::*;
    use polldisk::metrics::Counts;

    /// A disk with this number of reads.
    pub fn report(uptime_ms: u64, reads: u64, latency: &[(u64, u64)]) -> DiskReport {
        DiskReport {
            domid: 1,
            vdev: "xvda".to_owned(),
            devid: 51712,
            kind: "vbd".to_owned(),
            state: "Connected".to_owned(),
            failure: String::new(),
            warnings: Vec::new(),
            target: "null:8G".to_owned(),
            backing: "null".to_owned(),
            read_only: false,
            drive: false,
            sectors: 8,
            sector_size: 512,
            data_path: "persistent".to_owned(),
            queues: 1,
            workers: vec![0],
            worker: Some(0),
            counts: Counts { reads, read_bytes: reads * 4096, ..Counts::default() },
            latency: latency.to_vec(),
            uptime_ms,
        }
    }

    #[test]
    fn latencies_too_short_for_the_workers_clock_are_not_told_to_the_nanosecond() {
        for (ns, text) in [
            (0, "-"),
            (1, "<1 us"),
            (999, "<1 us"),
            (1_000, "1.0 us"),
            (9_940, "9.9 us"),
            (10_000, "10 us"),
            (25_000_000, "25 ms"),
            (12_000_000_000, "12 s"),
        ] {
            assert_eq!(duration(ns), text);
        }
    }

    #[test]
    fn the_middle_of_a_text_makes_room() {
        assert_eq!(shorten("raw:/a", 6), "raw:/a");
        assert_eq!(shorten("raw:/srv/guest.img", 15), "raw:...uest.img");
        assert_eq!(shorten("raw:/srv/guest.img", 3), "...");
        assert_eq!(shorten("raw:/srv/guest.img", 0), "...");
        // Each takes two columns.
        assert_eq!(
            shorten("\u{65e5}".repeat(10).as_str(), 12),
            "\u{65e5}...\u{65e5}\u{65e5}\u{65e5}"
        );
    }

    #[test]
    fn rates_are_those_of_the_interval() {
        let before = [report(1_000, 100, &[(1_000, 100)])];
        let after = vec![report(3_000, 300, &[(1_000, 100), (50_000, 200)])];
        let rates = &rates(&before, after, Duration::from_secs(2))[0];
        assert_eq!(rates.iops, 100.0);
        assert!((50_000..51_000).contains(&rates.p50_ns), "{}", rates.p50_ns);
    }

    #[test]
    fn a_disk_that_connected_anew_counts_from_there() {
        let before = [report(10_000, 1_000, &[(1_000, 1_000)])];
        let after = vec![report(500, 50, &[(2_000, 50)])];
        let rates = &rates(&before, after, Duration::from_secs(1))[0];
        assert_eq!(rates.iops, 100.0);
        assert!(rates.p50_ns >= 2_000);
    }
}
