//! The report of a run: JSON with everything, and a short table.

use std::time::Duration;

use figures::{count, duration, or_dash};
use hdrhistogram::Histogram;
use serde::Serialize;

use crate::disk::Negotiated;
use crate::load::{Failed, Latencies, Tally};
use crate::measure::{Driven, Measured, Reading};
use crate::options::{NeighbourKind, Plan, WaitKind};
use crate::usage::Usage;

/// Everything that is known about a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// blkload's version.
    pub version: &'static str,
    /// The load that was asked for.
    pub load: LoadAsked,
    /// The backend that was asked for.
    pub backend: BackendAsked,
    /// Seconds from the start of the backend until all disks were connected.
    pub connect_s: f64,
    /// What both ends of each disk agreed on.
    pub disks: Vec<Negotiated>,
    /// Figures of the whole measured time.
    pub total: Figures,
    /// Figures of each sample.
    pub samples: Vec<Figures>,
    /// Requests answered with an error.
    pub errors: u64,
    /// How well the schedule of --rate was kept.
    pub schedule: Option<ScheduleFigures>,
    /// Figures of the guests of --neighbours.
    pub neighbours: Option<NeighbourFigures>,
    /// The first request that failed.
    #[serde(skip)]
    pub first_error: Option<Failed>,
}

/// The load that was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct LoadAsked {
    /// Reads among 100 requests.
    pub read_percent: u64,
    /// Whether blocks are sequential; otherwise random.
    pub sequential: bool,
    /// Bytes of each request.
    pub block_bytes: usize,
    /// Most requests in flight on each ring.
    pub depth: usize,
    /// Rings of each disk.
    pub queues: u16,
    /// Number of disks.
    pub disks: u32,
    /// Number of domains that the disks are spread over.
    pub domains: u32,
    /// Requests per second; `None` for as many as are answered.
    pub rate_iops: Option<u64>,
    /// `busy` or `block`.
    pub wait: &'static str,
    /// Microseconds of polling before each sleep.
    pub spin_us: u64,
    /// Cores of the rings' threads.
    pub cores: Vec<usize>,
    /// Seconds before the first sample.
    pub warmup_s: f64,
}

/// The backend that was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct BackendAsked {
    /// `child`, `echo`, `xen`, or `other`.
    pub kind: &'static str,
    /// Its command.
    pub command: Vec<String>,
    /// The type of its areas in xenstore.
    pub backend_type: String,
    /// What the disks hold.
    pub target: Option<String>,
    /// Extra nodes in its areas.
    pub nodes: Vec<String>,
}

/// How well a schedule was kept, from the start of the warm-up to the end.
#[derive(Clone, Debug, Serialize)]
pub struct ScheduleFigures {
    /// How long the schedule lasted.
    pub seconds: f64,
    /// Requests started.
    pub started: u64,
    /// Requests that were due at the end and had not been started: the backend, or the load, could
    /// not keep up.
    pub unsent: u64,
    /// Longest time between a request's due start and its actual one, in nanoseconds.
    pub late_max_ns: u64,
}

/// What the neighbours did in the whole measured time.
#[derive(Clone, Debug, Serialize)]
pub struct NeighbourFigures {
    /// The kind that was asked for.
    pub kind: NeighbourKind,
    /// Requests answered per second, all neighbours together.
    pub iops: f64,
    /// Figures of each neighbour.
    pub guests: Vec<GuestFigures>,
}

/// What one neighbour did.
#[derive(Clone, Debug, Serialize)]
pub struct GuestFigures {
    /// A short name for what it does.
    pub does: &'static str,
    /// What both ends of its disk agreed on.
    pub disk: Negotiated,
    /// Requests answered per second.
    pub iops: f64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests in flight at the end.
    pub in_flight: u64,
    /// Notifications to the backend per second.
    pub notifications_sent_per_s: f64,
}

/// Figures of a period. Figures per I/O are `None` if there was no I/O.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// The period's length.
    pub seconds: f64,
    /// Requests answered.
    pub ios: u64,
    /// Requests answered per second.
    pub iops: f64,
    /// Millions of bytes per second.
    pub mb_per_s: f64,
    /// Latencies of all requests.
    pub latency: LatencyFigures,
    /// Latencies of reads, if there were also writes.
    pub read_latency: Option<LatencyFigures>,
    /// Latencies of writes, if there were also reads.
    pub write_latency: Option<LatencyFigures>,
    /// What the backend used.
    pub backend: Option<BackendFigures>,
    /// CPU time of the load in microseconds per I/O.
    pub load_cpu_us_per_io: Option<f64>,
    /// Notifications to the backend.
    pub notifications_sent_per_io: Option<f64>,
    /// Notifications from the backend.
    pub notifications_received_per_io: Option<f64>,
}

/// What a backend used.
#[derive(Clone, Debug, Serialize)]
pub struct BackendFigures {
    /// CPU time in microseconds per I/O.
    pub cpu_us_per_io: Option<f64>,
    /// The part of it in user mode, estimated from the kernel's ticks.
    pub user_us_per_io: Option<f64>,
    /// The part of it in the kernel.
    pub system_us_per_io: Option<f64>,
    /// CPU time in percent of one core.
    pub cpu_percent: f64,
    /// Context switches because it slept.
    pub voluntary_switches_per_io: Option<f64>,
    /// Context switches because others wanted the core.
    pub involuntary_switches_per_io: Option<f64>,
    /// Memory in use at the end, guests' mapped pages included.
    pub rss_bytes: u64,
    /// The part of it that belongs to the backend alone.
    pub rss_anonymous_bytes: u64,
}

/// Latencies in nanoseconds, with three digits.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct LatencyFigures {
    pub count: u64,
    pub mean_ns: f64,
    pub stdev_ns: f64,
    pub min_ns: u64,
    pub p50_ns: u64,
    pub p90_ns: u64,
    pub p99_ns: u64,
    pub p999_ns: u64,
    pub p9999_ns: u64,
    pub max_ns: u64,
    /// The latencies' distribution; empty in samples.
    pub cdf: Vec<CdfPoint>,
}

/// A latency, and the percent of latencies that are at most that long.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[expect(missing_docs, reason = "the names say it")]
pub struct CdfPoint {
    pub value_ns: u64,
    pub percentile: f64,
}

/// Points of a distribution for each halving of the rest above.
const POINTS_PER_HALVING: u32 = 8;

impl Report {
    /// Puts together a run's figures.
    pub fn new(plan: &Plan, kind: &'static str, connect: Duration, driven: &Driven) -> Report {
        let Driven { measured: Measured { readings, tallies }, disks, neighbours } = driven;
        let of_sample = |index: usize| {
            let mut sum = Latencies::new();
            tallies.iter().for_each(|tally| sum.add(&tally.samples[index]));
            sum
        };
        let mut all = Latencies::new();
        let mut samples = Vec::new();
        for (index, ends) in readings.windows(2).enumerate() {
            let latencies = of_sample(index);
            samples.push(Figures::new(plan, &ends[0], &ends[1], &latencies, false));
            all.add(&latencies);
        }
        let (first, last) = (&readings[0], &readings[readings.len() - 1]);
        Report {
            version: env!("CARGO_PKG_VERSION"),
            load: LoadAsked::new(plan),
            backend: BackendAsked::new(plan, kind),
            connect_s: connect.as_secs_f64(),
            disks: disks.clone(),
            total: Figures::new(plan, first, last, &all, true),
            samples,
            errors: tallies.iter().map(|tally| tally.errors).sum(),
            schedule: plan.options.rate.map(|_| ScheduleFigures::new(tallies)),
            neighbours: plan
                .options
                .neighbours
                .map(|kind| NeighbourFigures::new(kind, first, last, neighbours)),
            first_error: tallies.iter().find_map(|tally| tally.first_error),
        }
    }
}

impl ScheduleFigures {
    fn new(tallies: &[Tally]) -> ScheduleFigures {
        let most = |of: fn(&Tally) -> u64| tallies.iter().map(of).max().unwrap_or(0);
        ScheduleFigures {
            seconds: most(|tally| tally.lasted_ns) as f64 / 1e9,
            started: tallies.iter().map(|tally| tally.started).sum(),
            unsent: tallies.iter().map(|tally| tally.unsent).sum(),
            late_max_ns: most(|tally| tally.late_max_ns),
        }
    }
}

impl NeighbourFigures {
    fn new(
        kind: NeighbourKind,
        start: &Reading,
        end: &Reading,
        guests: &[(&'static str, Negotiated)],
    ) -> NeighbourFigures {
        let seconds = (end.at_ns - start.at_ns) as f64 / 1e9;
        let counted = start.neighbours.iter().zip(&end.neighbours);
        let guests: Vec<_> = guests
            .iter()
            .zip(counted)
            .map(|((does, disk), (start, end))| GuestFigures {
                does,
                disk: disk.clone(),
                iops: (end.completed - start.completed) as f64 / seconds,
                errors: end.errors - start.errors,
                in_flight: end.started.saturating_sub(end.completed),
                notifications_sent_per_s: (end.notified - start.notified) as f64 / seconds,
            })
            .collect();
        NeighbourFigures { kind, iops: guests.iter().map(|guest| guest.iops).sum(), guests }
    }
}

impl LoadAsked {
    fn new(plan: &Plan) -> LoadAsked {
        let options = &plan.options;
        LoadAsked {
            read_percent: options.read,
            sequential: options.sequential,
            block_bytes: plan.block_bytes,
            depth: options.depth,
            queues: options.queues,
            disks: options.disks,
            domains: options.domains,
            rate_iops: options.rate,
            wait: match options.wait {
                WaitKind::Busy => "busy",
                WaitKind::Block => "block",
            },
            spin_us: options.spin_us,
            cores: plan.cores.clone(),
            warmup_s: options.warmup,
        }
    }
}

impl BackendAsked {
    fn new(plan: &Plan, kind: &'static str) -> BackendAsked {
        let options = &plan.options;
        BackendAsked {
            kind,
            command: options.command.clone(),
            backend_type: options.backend_type.clone(),
            target: options.target.clone(),
            nodes: options.nodes.clone(),
        }
    }
}

impl Figures {
    fn new(
        plan: &Plan,
        start: &Reading,
        end: &Reading,
        latencies: &Latencies,
        with_cdf: bool,
    ) -> Figures {
        let seconds = (end.at_ns - start.at_ns) as f64 / 1e9;
        let ios = end.completed - start.completed;
        let iops = ios as f64 / seconds;
        let per_io = |amount: f64| (ios > 0).then(|| amount / ios as f64);
        let usage = start.backend.zip(end.backend).map(|(start, end)| end - start);
        let load_cpu_ns = start.load_cpu_ns.zip(end.load_cpu_ns).map(|(start, end)| end - start);
        let figures = |histogram| LatencyFigures::new(histogram, with_cdf);
        let is_mix = !latencies.reads.is_empty() && !latencies.writes.is_empty();
        let mut all = latencies.reads.clone();
        all += &latencies.writes;
        Figures {
            seconds,
            ios,
            iops,
            mb_per_s: iops * plan.block_bytes as f64 / 1e6,
            latency: figures(&all),
            read_latency: is_mix.then(|| figures(&latencies.reads)),
            write_latency: is_mix.then(|| figures(&latencies.writes)),
            backend: usage.map(|usage| BackendFigures::new(&usage, seconds, per_io)),
            load_cpu_us_per_io: load_cpu_ns.and_then(|ns| per_io(ns as f64 / 1e3)),
            notifications_sent_per_io: per_io((end.sent - start.sent) as f64),
            notifications_received_per_io: per_io((end.received - start.received) as f64),
        }
    }
}

impl BackendFigures {
    fn new(usage: &Usage, seconds: f64, per_io: impl Fn(f64) -> Option<f64>) -> BackendFigures {
        let cpu_us = usage.cpu_ns as f64 / 1e3;
        let ticks = usage.user_ticks + usage.system_ticks;
        let share = |part: u64| (ticks > 0).then(|| per_io(cpu_us * part as f64 / ticks as f64));
        BackendFigures {
            cpu_us_per_io: per_io(cpu_us),
            user_us_per_io: share(usage.user_ticks).flatten(),
            system_us_per_io: share(usage.system_ticks).flatten(),
            cpu_percent: cpu_us / 1e4 / seconds,
            voluntary_switches_per_io: per_io(usage.voluntary_switches as f64),
            involuntary_switches_per_io: per_io(usage.involuntary_switches as f64),
            rss_bytes: usage.rss_bytes,
            rss_anonymous_bytes: usage.rss_anonymous_bytes,
        }
    }
}

impl LatencyFigures {
    fn new(histogram: &Histogram<u64>, with_cdf: bool) -> LatencyFigures {
        let points = histogram.iter_quantiles(POINTS_PER_HALVING).map(|point| CdfPoint {
            value_ns: point.value_iterated_to(),
            percentile: point.quantile() * 100.0,
        });
        LatencyFigures {
            count: histogram.len(),
            mean_ns: histogram.mean(),
            stdev_ns: histogram.stdev(),
            min_ns: histogram.min(),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            p999_ns: histogram.value_at_quantile(0.999),
            p9999_ns: histogram.value_at_quantile(0.9999),
            max_ns: histogram.max(),
            cdf: if with_cdf { points.collect() } else { Vec::new() },
        }
    }
}

/// The short form for people.
impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let total = &self.total;
        let spread = |of: fn(&Figures) -> f64| {
            let values = self.samples.iter().map(of);
            (values.clone().fold(f64::INFINITY, f64::min), values.fold(0.0, f64::max))
        };
        let (least, most) = spread(|figures| figures.iops);
        writeln!(
            f,
            "{} IOPS ({} to {} in {} samples), {:.1} MB/s",
            count(total.iops),
            count(least),
            count(most),
            self.samples.len(),
            total.mb_per_s
        )?;
        writeln!(f, "{}", self.latency_table())?;
        if let Some(backend) = &total.backend {
            writeln!(
                f,
                "backend CPU {} us per I/O (user {}, system {}), {:.0}% of a core, {} context \
                 switches per I/O",
                optional(backend.cpu_us_per_io),
                optional(backend.user_us_per_io),
                optional(backend.system_us_per_io),
                backend.cpu_percent,
                optional(backend.voluntary_switches_per_io),
            )?;
        }
        if total.load_cpu_us_per_io.is_some() {
            writeln!(f, "load CPU {} us per I/O", optional(total.load_cpu_us_per_io))?;
        }
        if total.ios == 0
            && let Some(backend) = &total.backend
        {
            writeln!(
                f,
                "backend CPU {:.3}% of a core, memory {} KiB for {} disks, connected within {:.3} s",
                backend.cpu_percent,
                backend.rss_bytes / 1024,
                self.disks.len(),
                self.connect_s
            )?;
        }
        write!(
            f,
            "notifications per I/O: {} to the backend, {} from it",
            optional(total.notifications_sent_per_io),
            optional(total.notifications_received_per_io)
        )?;
        if let Some(schedule) = &self.schedule {
            write!(
                f,
                "\nschedule: {} requests started, the latest {} late; {} more due and not started",
                schedule.started,
                duration(schedule.late_max_ns as f64),
                schedule.unsent
            )?;
        }
        for guest in self.neighbours.iter().flat_map(|neighbours| &neighbours.guests) {
            write!(
                f,
                "\nneighbour {} ({}): {} IOPS, {} with an error, {} in flight, {} notifications/s",
                guest.disk.disk,
                guest.does,
                count(guest.iops),
                guest.errors,
                guest.in_flight,
                count(guest.notifications_sent_per_s)
            )?;
        }
        Ok(())
    }
}

impl Report {
    fn latency_table(&self) -> comfy_table::Table {
        let mut table = comfy_table::Table::new();
        table
            .load_style(comfy_table::presets::NOTHING)
            .set_header(["LATENCY", "MEAN", "P50", "P90", "P99", "P99.9", "MAX"]);
        let total = &self.total;
        for (name, figures) in [
            ("all", Some(&total.latency)),
            ("read", total.read_latency.as_ref()),
            ("write", total.write_latency.as_ref()),
        ] {
            let Some(figures) = figures else { continue };
            let values = [figures.p50_ns, figures.p90_ns, figures.p99_ns, figures.p999_ns]
                .map(|ns| duration(ns as f64));
            let mut row = vec![name.to_owned(), duration(figures.mean_ns)];
            row.extend(values);
            row.push(duration(figures.max_ns as f64));
            table.add_row(row);
        }
        table
    }
}

fn optional(value: Option<f64>) -> String {
    or_dash(value, |value| format!("{value:.3}"))
}

#[cfg(test)]
mod test {
    use clap::Parser;

    use super::*;
    use crate::load::crowd::Progress;
    use crate::options::Options;

    fn reading(at_ns: u64, completed: u64, cpu_ns: u64) -> Reading {
        let usage = Usage { cpu_ns, user_ticks: 1, system_ticks: 3, ..Usage::default() };
        let first = if completed == 0 { Usage::default() } else { usage };
        Reading {
            at_ns,
            completed,
            sent: completed / 2,
            received: 0,
            backend: Some(first),
            load_cpu_ns: Some(at_ns / 10),
            neighbours: Default::default(),
        }
    }

    fn report() -> Report {
        let words = ["blkload", "--echo", "--samples", "2", "--read", "50", "--rate", "1000"];
        let plan = Options::try_parse_from(words).unwrap().check(&[0]).unwrap();
        let mut latencies = Latencies::new();
        for ns in 1..=1000 {
            latencies.reads.record(ns * 1000).unwrap();
        }
        latencies.writes.record(5_000_000).unwrap();
        let samples = vec![latencies, Latencies::new()];
        let tally = Tally { samples, started: 1001, unsent: 3, late_max_ns: 9, ..Tally::new(0) };
        let second = 1_000_000_000;
        let readings = vec![
            reading(0, 0, 0),
            reading(second, 1001, 2_002_000),
            reading(2 * second, 1001, 2_002_000),
        ];
        let measured = Measured { readings, tallies: vec![tally] };
        let driven = Driven { measured, disks: Vec::new(), neighbours: Vec::new() };
        Report::new(&plan, "echo", Duration::from_millis(1), &driven)
    }

    #[test]
    fn figures_are_what_the_readings_say() {
        let report = report();
        let (total, [first, second]) = (&report.total, &report.samples[..]) else { panic!() };
        assert_eq!((total.ios, total.iops, first.iops, second.iops), (1001, 500.5, 1001.0, 0.0));
        assert_eq!(total.mb_per_s, 500.5 * 4096.0 / 1e6);
        let backend = total.backend.as_ref().unwrap();
        assert_eq!(backend.cpu_us_per_io, Some(2.0));
        assert_eq!((backend.user_us_per_io, backend.system_us_per_io), (Some(0.5), Some(1.5)));
        assert_eq!(backend.cpu_percent, 2.002 / 2000.0 * 100.0);
        let second = second.backend.as_ref().unwrap();
        assert_eq!(second.cpu_us_per_io, None, "without I/O there is no cost per I/O");
        let reads = total.read_latency.as_ref().unwrap();
        assert!((499_000..=501_000).contains(&reads.p50_ns), "{reads:?}");
        assert!((989_000..=991_500).contains(&reads.p99_ns), "{reads:?}");
        assert_eq!((total.latency.count, reads.count), (1001, 1000));
        assert!(total.latency.max_ns >= 5_000_000);
    }

    #[test]
    fn the_distribution_rises_to_all_of_it() {
        let cdf = report().total.latency.cdf;
        assert!(cdf.len() > 20 && cdf.is_sorted_by_key(|point| (point.value_ns, point.percentile)));
        let last = cdf.last().unwrap();
        assert!(last.percentile == 100.0 && last.value_ns >= 5_000_000, "{last:?}");
    }

    #[test]
    fn json_has_everything_by_name() {
        let json = serde_json::to_value(report()).unwrap();
        for path in [
            "/load/block_bytes",
            "/load/rate_iops",
            "/backend/kind",
            "/connect_s",
            "/total/iops",
            "/total/latency/p999_ns",
            "/total/latency/cdf/0/percentile",
            "/total/backend/cpu_us_per_io",
            "/total/notifications_sent_per_io",
            "/samples/1/ios",
            "/errors",
            "/schedule/unsent",
        ] {
            assert!(json.pointer(path).is_some_and(|value| !value.is_null()), "{path}: {json:#}");
        }
        assert!(json.pointer("/samples/1/load_cpu_us_per_io").unwrap().is_null());
    }

    #[test]
    fn neighbours_have_figures_of_their_own() {
        let disk = Negotiated {
            disk: "2:xvda".to_owned(),
            sectors: 8,
            sector_bytes: 512,
            read_only: false,
            queues: 1,
            ring_order: 0,
            depth: 4,
            persistent: true,
            indirect: false,
            protocol: "x86_64",
        };
        let guests = vec![("copies", disk.clone()), ("storm", disk)];
        let (start, mut end) = (reading(0, 0, 0), reading(2_000_000_000, 1, 1));
        end.neighbours[0] = Progress { started: 104, completed: 100, errors: 3, notified: 0 };
        end.neighbours[1] = Progress { notified: 50, ..Progress::default() };
        let figures = NeighbourFigures::new(NeighbourKind::Worst, &start, &end, &guests);
        let json = serde_json::to_value(&figures).unwrap();
        assert_eq!((&json["kind"], &json["iops"]), (&"worst".into(), &50.0.into()));
        let [copies, storm] = &figures.guests[..] else { panic!("{figures:?}") };
        assert_eq!((copies.iops, copies.errors, copies.in_flight), (50.0, 3, 4));
        assert_eq!((storm.iops, storm.notifications_sent_per_s), (0.0, 25.0));
        let text = Report { neighbours: Some(figures), ..report() }.to_string();
        let line = "\nneighbour 2:xvda (copies): 50 IOPS, 3 with an error, 4 in flight, 0 \
                    notifications/s";
        assert!(text.contains(line), "{text}");
    }

    #[test]
    fn the_table_is_short_and_names_its_units() {
        let text = report().to_string();
        assert!(text.starts_with("500 IOPS (0 to 1001 in 2 samples), 2.1 MB/s\n"), "{text}");
        assert!(text.contains("backend CPU 2.000 us per I/O (user 0.500, system 1.500)"), "{text}");
        assert!(
            text.contains("1001 requests started, the latest 9ns late; 3 more due and not"),
            "{text}"
        );
    }
}
